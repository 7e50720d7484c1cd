"""Opening base models: embedded ones, Diffusers folders, single-file checkpoints, repositories on the hub.

Only safetensors files are read and no code that lies beside them is run, whoever made the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from lora_convert.converters.models import (
    KNOWN_FAMILIES,
    LEFT_OUT,
    BasePlace,
    files_in,
    located,
    read_index,
    reason,
    unreadable,
    weight_files,
)
from lora_convert.errors import LoraConvertError, UsageError
from lora_convert.families import FAMILIES
from lora_convert.report import listed, shown
from lora_convert.runtime import bases
from lora_convert.runtime.architectures import PIPELINES, canonical_prefix
from lora_convert.runtime.folders import pipeline_class_of, snapshot
from lora_convert.runtime.loading import collected_warnings
from lora_convert.runtime.weights import Shapes, checkpoint_family, matching_family, read_weights, stored_shapes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["base_record", "device_of", "dtype_of", "family_of", "live_components", "open_pipeline"]

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_ADAPTABLE = ("unet", "text_encoder", "text_encoder_2")
_TOKENS = "text_model.embeddings.token_embedding"


@dataclass(frozen=True, slots=True)
class _Examined:
    """What the files of a base model say before it is loaded.

    `load` makes the pipeline in a dtype, `fix` says what to do if that fails.
    """

    family: str
    record: Mapping[str, str]
    load: Callable[[torch.dtype], Any]
    fix: str = ""


def open_pipeline(
    base: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    *,
    family: str | None = None,
    config: str | Path | None = None,
) -> DiffusionPipeline:
    """Open a base model, ready to draw: on its device, in eval mode, without gradients or a safety checker.

    `base` is the name of an embedded model, a Diffusers folder, a single-file checkpoint (.safetensors), a repository
    (`owner/repo`, `owner/repo@revision`), or the `hf://` address of a repository or checkpoint. What the hub's cache
    has is not asked for again. `device` is `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`: cuda, else mps, else cpu. `dtype`
    is `float32`, `float16`, `bfloat16` (or `fp32`, `fp16`, `bf16`), or `auto`: float32 on the CPU, float16 elsewhere.
    With `family` a base of another one is refused. `config` is a Diffusers folder that has a checkpoint's configuration
    and tokenizer; without it the embedded one or the hub's is taken.

    Raises UsageError for a base that does not exist, is of no known family or is not meant to be opened (a pickle), and
    for a device that is not there; FileError for one that is damaged or cannot be fetched.
    """
    place = _device(device)
    precision = _dtype(dtype, place)
    found = located(base)
    path = _fetched(found)
    examined = _checkpoint(path, found.name, config) if found.location == "file" else _folder(path, found.name)
    if family is not None and examined.family != family:
        raise UsageError(f"{shown(found.name)} is of the family {examined.family}, and {family} was asked for")
    with collected_warnings():
        pipeline = _load(examined, found.name, precision, place)
    record = {"name": found.name, "family": examined.family, "location": found.location}
    if found.location == "hub" and path.parent.name == "snapshots":
        record["revision"] = path.name
    pipeline._lora_convert_base = record | dict(examined.record)
    return pipeline


def base_record(pipeline: Any) -> Mapping[str, Any]:
    """What `open_pipeline` knows of the base model that it opened; empty for a pipeline of other origin.

    `name` is as the user gave it, for folders and files without the folders above; `location` is `embedded`, `folder`,
    `file` or `hub`; `revision` the hub's commit; `sha256` that of the weights: of the file, or of a list of all files'
    (`SHA-256  component/file`, as sha256sum prints it). Above 64 MiB it is `sampled_sha256`, the same from each file's
    size, header and 256 evenly spaced pieces of its data.
    """
    return MappingProxyType(dict(getattr(pipeline, "_lora_convert_base", {})))


def live_components(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The components that adapters are made for, of those that the pipeline has, by name."""
    models = {name: getattr(pipeline, name, None) for name in _ADAPTABLE}
    return {name: model for name, model in models.items() if isinstance(model, torch.nn.Module)}


def family_of(pipeline: Any) -> str | None:
    """The family of a pipeline, by names and shapes of its components; None if it is of none that is known.

    Adapters that are loaded do not matter, nor tokens that were added, and a first convolution of more channels is that
    of a variant (inpainting).
    """
    return matching_family({name: _live_shapes(model) for name, model in live_components(pipeline).items()})


def _live_shapes(model: torch.nn.Module) -> Shapes:
    prefix = canonical_prefix(model)
    names = ((name.replace(".base_layer.", "."), weight) for name, weight in model.named_parameters())
    shapes = {
        prefix + name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in names
        if name.endswith(".weight") and ".lora_" not in name
    }
    if _TOKENS in shapes and (rows := shapes[_TOKENS][0]) > (known := _vocabulary(rows)):
        shapes[_TOKENS] = (known, *shapes[_TOKENS][1:])
    return shapes


def _vocabulary(rows: int) -> int:
    """The rows that a table of tokens had before any were added: as many as the largest one of a family has."""
    sizes = {
        part.modules[_TOKENS].shape[0]
        for family in FAMILIES.values()
        for part in family.components
        if _TOKENS in part.modules
    }
    return max((size for size in sizes if size <= rows), default=rows)


def device_of(pipeline: Any) -> torch.device:
    """Where the pipeline's UNet is."""
    weight: torch.Tensor = next(pipeline.unet.parameters())
    return weight.device


def dtype_of(pipeline: Any) -> torch.dtype:
    """The dtype of the pipeline's UNet."""
    weight: torch.Tensor = next(pipeline.unet.parameters())
    return weight.dtype


def _device(name: str) -> torch.device:
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there[:0] = ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device(there[0])
    if name not in there:
        raise UsageError(f"there is no device {shown(str(name))} here; there is {', '.join(there)}")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    plain = str(name).removeprefix("torch.")
    if plain not in _DTYPES:
        raise UsageError(f"dtype {shown(plain)!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[plain]


def _fetched(base: BasePlace) -> Path:
    """The folder or file itself; one on the hub is downloaded unless the cache has it."""
    if base.location == "hub":
        return snapshot(base.name, base.revision)
    if base.location == "file" and base.name.startswith("hf://"):
        from lora_convert.containers.hub import download

        return download(base.name)
    return base.path


def _folder(folder: Path, name: str) -> _Examined:
    index = read_index(folder, name)
    with collected_warnings():
        pipeline_class = pipeline_class_of(index, name)
    variant, files = weight_files(files_in(folder), index, name)
    headers, record = read_weights([(file, folder / file) for file in files])
    stored: dict[str, dict[str, tuple[int, ...]]] = {}
    for file, header in zip(files, headers, strict=True):
        shapes = {tensor: info.shape for tensor, info in header.tensors.items()}
        stored.setdefault(file.partition("/")[0], {}).update(shapes)
    family = matching_family({part: stored_shapes(stored[part]) for part in _ADAPTABLE if part in stored})
    if family is None:
        raise UsageError(f"{shown(name)} is a {pipeline_class.__name__} of other sizes; {KNOWN_FAMILIES}")

    def load(dtype: torch.dtype) -> Any:
        options = {"torch_dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
        pipeline = pipeline_class.from_pretrained(str(folder), **options, **_left_out(pipeline_class))
        _check_complete(pipeline, name, stored)
        return pipeline

    return _Examined(family, record, load)


def _checkpoint(path: Path, name: str, config: str | Path | None) -> _Examined:
    (header,), record = read_weights([(name, path)])
    family = checkpoint_family(header)
    if family is None:
        said = f"{shown(name)} holds no UNet under a checkpoint's names (model.diffusion_model.…) and in known sizes"
        raise UsageError(f"{said}; {KNOWN_FAMILIES}")
    if config is None and family in bases.NAMES:
        config = bases.folder(family)
    if config is not None:
        read_index(Path(config), str(config))

    def load(dtype: torch.dtype) -> Any:
        import diffusers

        pipeline_class = getattr(diffusers, PIPELINES[family])
        options = {"torch_dtype": dtype, "local_files_only": True} | ({"config": str(config)} if config else {})
        pipeline = pipeline_class.from_single_file(str(path), **options, **_left_out(pipeline_class))
        if family_of(pipeline) != family:
            raise UsageError(f"the configuration of {shown(name)} is not one of {family}, which its weights are")
        return pipeline

    return _Examined(family, record, load, "" if config else _NO_CONFIG)


_NO_CONFIG = (
    "A checkpoint has no configuration and no tokenizer: they come from the hub, or from a Diffusers folder of the "
    "same family that is given as config."
)


def _load(examined: _Examined, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The pipeline on its device, in eval mode and without gradients.

    Raises FileError, with the library's own words, for whatever loading raises.
    """
    try:
        pipeline = examined.load(dtype)
        for model in pipeline.components.values():
            if isinstance(model, torch.nn.Module):
                model.eval().requires_grad_(False)
        return pipeline.to(device)
    except torch.OutOfMemoryError:
        said = f"there is not enough memory on {device} for {shown(name)}"
        raise UsageError(f"{said}; open it in fp16 or bf16, or on the CPU") from None
    except LoraConvertError:
        raise
    except Exception as error:
        raise unreadable(name, f"diffusers cannot load it: {reason(error)}.", examined.fix) from error


def _left_out(pipeline_class: Any) -> dict[str, Any]:
    """Arguments for what is not part of drawing a picture: none of it is loaded, and no watermark is added."""
    options = dict.fromkeys(LEFT_OUT) | {"requires_safety_checker": False, "add_watermarker": False}
    known = inspect.signature(pipeline_class).parameters
    return {option: value for option, value in options.items() if option in known}


def _check_complete(pipeline: Any, name: str, stored: Mapping[str, Collection[str]]) -> None:
    """Raise FileError for a component some of whose weights are in no file: the libraries would make them up."""
    for component, model in live_components(pipeline).items():
        known = {tensor.removeprefix("text_model.") for tensor in stored[component]}
        absent = [key for key in model.state_dict() if key.removeprefix("text_model.") not in known]
        if absent:
            message = f"{len(absent)} tensors of its {component} are missing: {listed(absent)}."
            raise unreadable(name, message, "The download is incomplete: fetch the model again.")
