"""What the name of a base model stands for, and the files of a Diffusers folder, before any of them is opened.

Only safetensors files are read, and no code that lies beside them is run, whoever made the model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote

from lora_convert.errors import FileError, UsageError
from lora_convert.families import FAMILIES
from lora_convert.families.embedded import NAMES, folder
from lora_convert.report import Finding, listed, shown

__all__ = [
    "INDEX",
    "KINDS_OF_BASES",
    "KNOWN_FAMILIES",
    "LEFT_OUT",
    "PICKLES",
    "BasePlace",
    "adaptable_weights",
    "by_variant",
    "components_of",
    "files_in",
    "located",
    "model_files",
    "read_index",
    "read_object",
    "reason",
    "unreadable",
    "weight_files",
    "weights_of",
    "without_variant",
]

PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
"""Suffixes of files that can run code when they are loaded."""

KINDS_OF_BASES = (
    f"a base is an embedded model ({', '.join(NAMES)}), a Diffusers folder, a .safetensors checkpoint, "
    "or a repository on the hub (owner/repo)"
)
KNOWN_FAMILIES = f"adapters are known for these families of base models: {', '.join(FAMILIES)}"

LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that drawing from a prompt has no use for."""

_MODELS = ("unet", "text_encoder", "text_encoder_2", "vae")
_ADAPTABLE = _MODELS[:3]

INDEX = "model_index.json"
"""The file that makes a folder a Diffusers model."""
_REPOSITORY = re.compile(r"(?:hf://(?:models/)?)?(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?/?", re.ASCII)
_WEIGHTS = re.compile(
    r"\w+/(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-(?P<of>\d+))?\.safetensors"
)


@dataclass(frozen=True, slots=True)
class BasePlace:
    """Where a base model is. `name` is what the user called it, without folders of this machine."""

    name: str
    location: Literal["embedded", "folder", "file", "hub"]
    path: Path = Path()
    revision: str | None = None


def located(base: str | Path) -> BasePlace:
    """Where the base model of that name is. Raises UsageError for one that does not exist or is a pickle."""
    text = str(base)
    if base in NAMES:
        return BasePlace(text, "embedded", folder(text))
    if text.startswith("hf://") and text.endswith(".safetensors"):
        return BasePlace(text, "file")
    path = Path(text)
    try:
        is_folder, exists = path.is_dir() and bool(text), path.exists() and bool(text)
    except OSError:  # a name too long
        is_folder = exists = False
    if is_folder:
        return BasePlace(path.resolve().name, "folder", path)
    if path.suffix in PICKLES or (exists and path.suffix != ".safetensors"):
        raise UsageError(_refusal(path))
    if exists:
        return BasePlace(path.name, "file", path)
    repository = _REPOSITORY.fullmatch(text)
    if repository is None or isinstance(base, Path) or path.suffix == ".safetensors":
        raise UsageError(f"there is no {shown(text)}; {KINDS_OF_BASES}")
    revision = repository["revision"] and unquote(repository["revision"])
    return BasePlace(repository["repo"], "hub", revision=revision)


def _refusal(path: Path) -> str:
    if path.suffix in PICKLES:
        said = f"{shown(path.name)} is a pickle, which can run code when it is loaded, and is not opened"
        return f"{said}; save the model as .safetensors first"
    return f"{shown(path.name)} is no .safetensors checkpoint; {KINDS_OF_BASES}"


def unreadable(name: str, message: str, fix: str = "") -> FileError:
    """The error that a file or folder of that name cannot be used."""
    return FileError([Finding("unreadable", "error", name, message, fix)])


def reason(error: BaseException) -> str:
    """What an exception of the libraries says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return shown(text, 300).rstrip(".")


def read_index(model: Path, name: str) -> Mapping[str, Any]:
    """The components of a Diffusers folder: name -> [library, class]."""
    if not os.path.lexists(model / INDEX):
        raise UsageError(f"{shown(name)} has no {INDEX}, so it is no Diffusers model; {KINDS_OF_BASES}")
    return read_object(model, INDEX, name)


def read_object(model: Path, file: str, name: str) -> dict[str, Any]:
    """The content of a JSON file of a Diffusers folder. Raises FileError if it is no object."""
    try:
        content = json.loads((model / file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(name, f"Its {file} cannot be read: {reason(error)}.") from None
    if not isinstance(content, dict):
        raise unreadable(name, f"Its {file} is no JSON object.")
    return content


def files_in(model: Path) -> list[str]:
    """The files of a Diffusers folder's components, as `component/file`."""
    return [path.relative_to(model).as_posix() for path in sorted(model.glob("*/*")) if path.is_file()]


def weight_files(files: Sequence[str], index: Mapping[str, Any], name: str) -> tuple[str | None, list[str]]:
    """The variant to load (None or `fp16`), and those of the files that are its weights.

    Raises UsageError if a component has none in safetensors, FileError if some are missing.
    """
    variants = {
        component: by_variant([file for file in files if file.startswith(f"{component}/")])
        for component in _MODELS
        if component in components_of(index)
    }
    for component, found in variants.items():
        if not found.keys() & {None, "fp16"}:
            raise UsageError(_without_weights(component, files, name))
    variant = None if all(None in found for found in variants.values()) else "fp16"
    chosen = [found.get(variant) or found[None] for found in variants.values()]
    for parts in chosen:
        if len(parts) < (wanted := int(parts[0]["of"] or 1)):
            said = f"Of the {wanted} files like {parts[0].string} only {len(parts)} are there."
            raise unreadable(name, said, "The download is incomplete: fetch the model again.")
    return variant, [part.string for parts in chosen for part in parts]


def components_of(index: Mapping[str, Any]) -> list[str]:
    """The components that are loaded, of those that the index names."""
    return [name for name in _named(index) if name not in LEFT_OUT]


def _named(index: Mapping[str, Any]) -> list[str]:
    """All components that the index names."""
    return [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]


def _is_pickle(file: str) -> bool:
    return PurePosixPath(file).suffix in PICKLES


def by_variant(files: Sequence[str]) -> dict[str | None, list[re.Match[str]]]:
    """Weight files of one component (`component/file`) by variant: None, `fp16`, …."""
    found: dict[str | None, list[re.Match[str]]] = {}
    for file in files:
        if match := _WEIGHTS.fullmatch(file):
            found.setdefault(match["variant"], []).append(match)
    return found


def _without_weights(component: str, files: Sequence[str], name: str) -> str:
    paths = [PurePosixPath(file) for file in files if file.startswith(f"{component}/")]
    pickles = [path.name for path in paths if _is_pickle(path.name)]
    if not pickles:
        return f"{shown(name)} has no weights in its folder {component}"
    said = f"the {component} of {shown(name)} is a pickle ({listed(pickles, 2)})"
    return f"{said}, which can run code when it is loaded, and is not opened; save it as safetensors first"


def adaptable_weights(files: Sequence[str], index: Mapping[str, Any], name: str) -> list[str]:
    """The weight files of the UNet and the text encoders; raises as `weight_files` does."""
    if "unet" not in _named(index):
        raise UsageError(f"{shown(name)} is a {shown(str(index.get('_class_name')))}; {KNOWN_FAMILIES}")
    _, chosen = weight_files(files, {part: index[part] for part in _ADAPTABLE if part in index}, name)
    return chosen


def model_files(files: Sequence[str], index: Mapping[str, Any], name: str) -> list[str]:
    """Of a Diffusers folder's files (relative, with `/`) those that make the model: no weights in a second form.

    Raises UsageError if a component's weights are in no safetensors file, FileError if a component is missing.
    """
    chosen = set(adaptable_weights(files, index, name))
    kept = []
    for component in _named(index):
        mine = [file for file in files if file.startswith(f"{component}/")]
        if not mine:
            raise unreadable(name, f"Its {component} is missing.", "The download is incomplete: fetch the model again.")
        if component not in _ADAPTABLE:
            weights = weights_of(mine)
            if not weights and (component == "vae" or any(map(_is_pickle, mine))):
                raise UsageError(_without_weights(component, files, name))
            chosen |= set(weights)
    for file in files:
        path = Path(file)
        if any(part.startswith(".") for part in path.parts) or ".index." in path.name:
            continue  # version control and caches; indices of shards are written anew
        if path.suffix not in _WEIGHT_SUFFIXES or file in chosen:
            kept.append(file)
    return kept


_WEIGHT_SUFFIXES = frozenset(
    {
        ".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".msgpack", ".h5", ".onnx", ".onnx_data",
        ".pb", ".tflite", ".gguf", ".xml", ".part",
    }
)  # fmt: skip
"""Suffixes of weights, in safetensors and in forms that are left behind."""


def weights_of(files: Sequence[str]) -> Sequence[str]:
    """The weights of a component that is copied: without a variant if there are such, else those of the first."""
    variants = by_variant(files)
    if not variants:
        return ()
    first = None if None in variants else min(variant for variant in variants if variant)
    return [match.string for match in variants[first]]


def without_variant(file: str) -> str:
    """The name of a weight file (`component/file`) that loads without asking for a variant; others as they are."""
    match = _WEIGHTS.fullmatch(file)
    return file.replace(f".{match['variant']}", "", 1) if match and match["variant"] else file
