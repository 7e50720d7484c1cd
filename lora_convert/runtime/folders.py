"""Diffusers folders, on disk and in the hub's cache: what is in them, before anything is loaded.

Only safetensors files are read, and no code that lies beside them is run, whoever made the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import huggingface_hub
from huggingface_hub import constants

from lora_convert._version import __version__
from lora_convert.containers.hub import download
from lora_convert.errors import FileError, LoraConvertError, UsageError
from lora_convert.families import FAMILIES
from lora_convert.report import Finding, listed, shown
from lora_convert.runtime import bases
from lora_convert.runtime.loading import collected_warnings

__all__ = [
    "KINDS_OF_BASES",
    "KNOWN_FAMILIES",
    "LEFT_OUT",
    "PICKLES",
    "files_in",
    "pipeline_class_of",
    "read_index",
    "reason",
    "snapshot",
    "unreadable",
    "weight_files",
]

PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
"""Suffixes of files that can run code when they are loaded."""

KINDS_OF_BASES = (
    f"a base is an embedded model ({', '.join(bases.NAMES)}), a Diffusers folder, a .safetensors checkpoint, "
    "or a repository on the hub (owner/repo)"
)
KNOWN_FAMILIES = f"adapters are known for these families of base models: {', '.join(FAMILIES)}"

LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that drawing from a prompt has no use for."""

_MODELS = ("unet", "text_encoder", "text_encoder_2", "vae")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
_TEXTS = (".json", ".txt")
_CALLER: dict[str, Any] = {"library_name": "lora-convert", "library_version": __version__}
_WEIGHTS = re.compile(
    r"\w+/(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-(?P<of>\d+))?\.safetensors"
)


def unreadable(name: str, message: str, fix: str = "") -> FileError:
    """The error that a file or folder of that name cannot be used."""
    return FileError([Finding("unreadable", "error", name, message, fix)])


def reason(error: BaseException) -> str:
    """What an exception of the libraries says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return shown(text, 300).rstrip(".")


def read_index(folder: Path, name: str) -> Mapping[str, Any]:
    """The components of a Diffusers folder: name -> [library, class]."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        said = f"{shown(name)} has no model_index.json, so it is no Diffusers model; {KINDS_OF_BASES}"
        raise UsageError(said) from None
    except (OSError, ValueError) as error:
        raise unreadable(name, f"Its model_index.json cannot be read: {reason(error)}.") from None
    if not isinstance(index, dict):
        raise unreadable(name, "Its model_index.json is no JSON object.")
    return index


def pipeline_class_of(index: Mapping[str, Any], name: str) -> Any:
    """The class of a folder's pipeline. Raises UsageError if it is not one of Stable Diffusion's, or needs code."""
    import diffusers

    called = index.get("_class_name")
    found = getattr(diffusers, called, None) if isinstance(called, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline) or "unet" not in index:
        raise UsageError(f"{shown(name)} is a {shown(str(called))}; {KNOWN_FAMILIES}")
    for component, value in index.items():
        if isinstance(value, list) and (not value or value[0] not in _LIBRARIES):
            said = f"the {shown(component)} of {shown(name)} needs code of its own"
            raise UsageError(f"{said} ({shown(str(value))}), which is not run; {KNOWN_FAMILIES}")
    return found


def files_in(folder: Path) -> list[str]:
    """The files of a Diffusers folder's components, as `component/file`."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/*")) if path.is_file()]


def weight_files(files: Sequence[str], index: Mapping[str, Any], name: str) -> tuple[str | None, list[str]]:
    """The variant to load (None or `fp16`), and those of the files that are its weights.

    Raises UsageError if a component has none in safetensors, FileError if some are missing.
    """
    variants = {
        component: _by_variant([file for file in files if file.startswith(f"{component}/")])
        for component in _MODELS
        if component in _components(index)
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


def _components(index: Mapping[str, Any]) -> list[str]:
    """The components that are loaded, of those that the index names."""
    named = [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]
    return [name for name in named if name not in LEFT_OUT]


def _by_variant(files: Sequence[str]) -> dict[str | None, list[re.Match[str]]]:
    found: dict[str | None, list[re.Match[str]]] = {}
    for file in files:
        if match := _WEIGHTS.fullmatch(file):
            found.setdefault(match["variant"], []).append(match)
    return found


def _without_weights(component: str, files: Sequence[str], name: str) -> str:
    paths = [PurePosixPath(file) for file in files if file.startswith(f"{component}/")]
    pickles = [path.name for path in paths if path.suffix in PICKLES]
    if not pickles:
        return f"{shown(name)} has no weights in its folder {component}"
    said = f"the {component} of {shown(name)} is a pickle ({listed(pickles, 2)})"
    return f"{said}, which can run code when it is loaded, and is not opened; save it as safetensors first"


def snapshot(repo: str, revision: str | None) -> Path:
    """The folder of a repository in the hub's cache, downloaded if it is not there in full.

    Raises UsageError for one that holds no Stable Diffusion pipeline in safetensors, FileError for one that cannot be
    fetched.
    """
    cached = _cached(repo, revision)
    if cached is not None:
        return cached
    if constants.HF_HUB_OFFLINE:
        fix = "Download it once without HF_HUB_OFFLINE, or give the path of a Diffusers folder."
        raise unreadable(repo, "It is not in the cache in full, and the hub is not asked (HF_HUB_OFFLINE).", fix)
    at = f"@{quote(revision, safe='/')}" if revision else ""
    folder = download(f"hf://{repo}{at}/model_index.json", quiet=True).parent
    index = read_index(folder, repo)
    with collected_warnings():
        pipeline_class_of(index, repo)
    try:
        return _downloaded(repo, revision, index)
    except LoraConvertError:
        raise
    except Exception as error:  # huggingface_hub's own, the HTTP library's, the file system's
        fix = "Check the connection, and HF_ENDPOINT and HTTPS_PROXY if they are set."
        raise unreadable(repo, f"It could not be fetched: {reason(error)}.", fix) from error


def _downloaded(repo: str, revision: str | None, index: Mapping[str, Any]) -> Path:
    """Download what is needed to draw: no pickles, and of the weights one variant."""
    info = huggingface_hub.HfApi(**_CALLER).model_info(repo, revision=revision)
    files = [sibling.rfilename for sibling in info.siblings or ()]
    texts = [file for file in files if file.partition("/")[0] in _components(index) and file.endswith(_TEXTS)]
    for file in ("model_index.json", *texts, *weight_files(files, index, repo)[1]):
        path = huggingface_hub.hf_hub_download(repo, file, revision=revision, **_CALLER)
    return Path(path).parent.parent


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder of a repository in the cache, if all that is needed to draw is there."""
    found = huggingface_hub.try_to_load_from_cache(repo, "model_index.json", revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    files = files_in(folder)
    try:
        index = read_index(folder, repo)
        weight_files(files, index, repo)
    except LoraConvertError:
        return None
    return folder if all(_is_there(component, files) for component in _components(index)) else None


def _is_there(component: str, files: Sequence[str]) -> bool:
    """Whether the small files of a component are there."""
    if component.startswith("tokenizer"):
        wanted: Sequence[set[str]] = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})
    else:
        wanted = ({"config.json"}, {"scheduler_config.json"})
    return any({f"{component}/{file}" for file in choice} <= set(files) for choice in wanted)
