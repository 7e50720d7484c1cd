"""peft's native forms on a live pipeline: folders of `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from lora_convert.converters.native import CONFIG_NAME, WEIGHTS_NAME
from lora_convert.errors import FileError, UsageError
from lora_convert.report import MOST_FINDINGS, Finding, shown
from lora_convert.runtime.architectures import canonical_prefix
from lora_convert.runtime.loading import (
    LoadingError,
    adapted_layers,
    not_adapted,
    not_loaded,
)

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["load_native", "native_folders", "native_parameters"]

_PREFIX = "base_model.model."
_SUFFIXES = ("lora_", "hada_", "lokr_", "ia3_l", "oft_R")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_NAMING = ("target_modules", "feedforward_modules", "exclude_modules", *_PATTERNS)
_PLAIN = re.compile(r"\^?[\w.\-]+")


@dataclass(frozen=True)
class _Folder:
    """One folder: its component, its configuration, and its tensors by the live module's path and suffix."""

    component: str
    config: PeftConfig
    tensors: Mapping[str, Mapping[str, torch.Tensor]]


def native_folders(folder: Path) -> dict[str, Path]:
    """The adapter folders below a folder, by their names (`unet`, `unet-2`, `text_encoder`), in that order."""
    found = (path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    return {path.name: path for path in sorted(found) if (path / WEIGHTS_NAME).is_file()}


def load_native(components: Mapping[str, torch.nn.Module], folder: Path, name: str) -> dict[str, BaseTunerLayer]:
    """Load every adapter folder below `folder` onto live components, as one adapter of that name.

    Returns the live layers by canonical name (`unet.conv_in`). Different kinds may be on one model, on different
    modules. Raises UsageError if there is no adapter folder or if a module already has adapters of another kind;
    FileError for a folder that cannot be read, and with the findings `module-not-loaded` where a module or a value did
    not arrive, or `overflow` where values do not fit the model's dtype; LoadingError for what peft raises. What had
    arrived by then is still there, and what is active and trained is always as peft leaves it.
    """
    folders = native_folders(folder)
    if not folders:
        raise UsageError(f"{shown(str(folder))} has no folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
    with torch.random.fork_rng(devices=[]):  # peft first fills in noise
        read = [_read(components, path) for path in folders.values()]
        for part in read:
            _inject(components[part.component], part, name)
    layers = adapted_layers(components, name)
    expected = {
        f"{part.component}.{canonical_prefix(components[part.component])}{path}": (part.config, tensors)
        for part in read
        for path, tensors in part.tensors.items()
    }
    findings = [not_adapted(module) for module in sorted(expected.keys() - layers)]
    for module, layer in layers.items():
        if module not in expected:
            findings.append(not_loaded(module, "The loader adapted it, but it is not in the file."))
        else:
            findings += _compared(module, layer, name, *expected[module])
    if findings:
        raise FileError(findings[:MOST_FINDINGS])
    return layers


def _read(components: Mapping[str, torch.nn.Module], folder: Path) -> _Folder:
    """A folder's content, its tensors under the paths of the live model."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    component = folder.name.partition("-")[0]
    if component not in components:
        message = f"It is in the folder, but the pipeline has no {shown(component)}."
        raise FileError([not_loaded(folder.name, message)])
    try:
        config = PeftConfig.from_pretrained(str(folder))
        stored = load_file(folder / WEIGHTS_NAME)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        said = f"It cannot be read: {shown(' '.join(str(error).split()), 300).rstrip('.')}."
        raise FileError([Finding("unreadable", "error", folder.name, said)]) from error
    _refuse_expressions(folder.name, config)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for key, values in stored.items():
        path, suffix = _split(key, components[component])
        tensors.setdefault(path, {})[suffix] = values
    return _Folder(component, config, tensors)


def _refuse_expressions(folder: str, config: PeftConfig) -> None:
    """Raise FileError for patterns that are more than names: peft runs them, and a stranger's are never run here."""
    for part in _NAMING:
        value = getattr(config, part, None) or ()
        patterns = [value] if isinstance(value, str) else list(value)
        wrong = [pattern for pattern in patterns if isinstance(value, str) or not _PLAIN.fullmatch(pattern)]
        if wrong:
            said = f"Its {part} has {shown(wrong[0])!r}, which is more than a list of module names."
            raise FileError([Finding("unreadable-config", "error", folder, said)])


def _split(key: str, model: torch.nn.Module) -> tuple[str, str]:
    """A tensor's name as the path of the module in this model, and the rest.

    Text encoders have or have not `text_model.` in their paths, in the file and in the model, depending on the version
    of transformers.
    """
    parts = key.removeprefix(_PREFIX).split(".")
    start = next((place for place, part in enumerate(parts) if part.startswith(_SUFFIXES)), len(parts))
    path, suffix = ".".join(parts[:start]), ".".join(parts[start:])
    if canonical_prefix(model):
        return path.removeprefix(canonical_prefix(model)), suffix
    return (f"text_model.{path}" if path.startswith("encoder.layers.") else path), suffix


def _inject(model: torch.nn.Module, folder: _Folder, name: str) -> None:
    """Put peft's layers in place and fill them."""
    from peft import inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind = str(getattr(folder.config.peft_type, "value", folder.config.peft_type))
    modules = dict(model.named_modules())
    for path in folder.tensors:
        layer = modules.get(path)
        if isinstance(layer, BaseTunerLayer) and _package(layer) != kind.lower():
            module = f"{folder.component}.{canonical_prefix(model)}{path}"
            said = f"{shown(module)} has an adapter of peft's kind {_package(layer).upper()}"
            raise UsageError(f"{said}, beside which one of the kind {kind} cannot be; remove the former first")
    state = {
        f"{path}.{suffix}": values for path, tensors in folder.tensors.items() for suffix, values in tensors.items()
    }
    try:
        inject_adapter_in_model(folder.config, model, adapter_name=name)
        set_peft_model_state_dict(model, state, adapter_name=name)
    except Exception as error:
        raise LoadingError(f"{type(error).__name__}: {error}") from error
    if hasattr(model, "_hf_peft_config_loaded"):  # how diffusers and transformers know that there are adapters
        vars(model)["_hf_peft_config_loaded"] = True


def _package(layer: Any) -> str:
    """The kind of a live layer, as peft's package of it is called: `lora`, `loha`, `lokr`, `ia3`, `oft`."""
    return str(type(layer).__module__.split(".")[2])


def native_parameters(layer: BaseTunerLayer, name: str) -> dict[str, torch.nn.Parameter]:
    """What a live layer holds for one adapter, by the suffixes of peft's files (`hada_w1_a`, `lora_A.weight`)."""
    found: dict[str, torch.nn.Parameter] = {}
    for part in layer.adapter_layer_names:
        held = getattr(layer, part)
        if name not in held:
            continue
        if isinstance(held[name], torch.nn.Parameter):
            found[part] = held[name]
        else:
            named = {f"{part}.{rest}": values for rest, values in held[name].named_parameters()}
            found |= {suffix.replace("magnitude_vector.weight", "magnitude_vector"): v for suffix, v in named.items()}
    return found


def _compared(
    module: str, layer: BaseTunerLayer, name: str, config: PeftConfig, tensors: Mapping[str, torch.Tensor]
) -> Iterator[Finding]:
    """What is wrong with one module that arrived: its values rounded to its dtype, and its scale."""
    live = native_parameters(layer, name)
    tensors = {suffix.replace("magnitude_vector.weight", "magnitude_vector"): v for suffix, v in tensors.items()}
    for suffix in sorted(tensors.keys() ^ live.keys()):
        where = (
            "the file, but not in the loaded layer" if suffix in tensors else "the loaded layer, but not in the file"
        )
        yield not_loaded(module, f"Its {suffix} is in {where}.")
    for suffix in sorted(tensors.keys() & live.keys()):
        yield from _compare(module, suffix, tensors[suffix], live[suffix].detach().cpu())
    scale, asked = getattr(layer, "scaling", {}).get(name, 1.0), _asked_scale(module, config)
    if asked is not None and scale != asked:
        said = f"Its scale is {scale:g}, and the configuration says {asked:g}."
        yield not_loaded(module, said)


def _compare(module: str, suffix: str, stored: torch.Tensor, live: torch.Tensor) -> Iterator[Finding]:
    rounded = stored.to(live.dtype)
    if live.is_meta or live.shape != stored.shape:
        yield not_loaded(module, f"The loader gave its {suffix} no values.")
    elif bool(stored.isfinite().all()) and not bool(rounded.isfinite().all()):
        precision = str(live.dtype).removeprefix("torch.")
        fix = "Open the pipeline with dtype bfloat16 or float32."
        yield Finding(
            "overflow", "error", module, f"Values of its {suffix} do not fit the pipeline's {precision}.", fix
        )
    elif not torch.equal(rounded, live):
        yield not_loaded(module, f"Its {suffix} arrived changed.")


def _asked_scale(module: str, config: PeftConfig) -> float | None:
    """alpha/rank as the configuration has it for a module; None for a kind that has no such scale."""
    fields = config.to_dict()
    alpha = fields.get("lora_alpha", fields.get("alpha"))
    if alpha is None or fields.get("use_rslora"):
        return None
    rank, path = fields["r"], module.partition(".")[2]
    patterns = (fields.get(pattern) or {} for pattern in _PATTERNS)
    rank, alpha = (_named(pattern, path, value) for pattern, value in zip(patterns, (rank, alpha), strict=True))
    return float(alpha / rank)


def _named(pattern: Mapping[str, float], path: str, default: float) -> float:
    """A pattern's value for a module: patterns of this package are plain names, anchored or not."""
    for key, value in pattern.items():
        plain = key.removeprefix("^")
        if plain == path or (not key.startswith("^") and path.endswith(f".{plain}")):
            return value
    return default
