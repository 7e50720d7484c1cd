"""Diffusers folders, on disk and in the hub's cache: what is in them, before anything is loaded.

Only safetensors files are read, and no code that lies beside them is run, whoever made the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import huggingface_hub
from huggingface_hub import constants

from lora_convert._version import __version__
from lora_convert.containers.hub import download
from lora_convert.converters.models import (
    KNOWN_FAMILIES,
    components_of,
    files_in,
    read_index,
    reason,
    unreadable,
    weight_files,
)
from lora_convert.errors import LoraConvertError, UsageError
from lora_convert.report import shown
from lora_convert.runtime.loading import collected_warnings

__all__ = ["pipeline_class_of", "snapshot"]

_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
_TEXTS = (".json", ".txt")
_CALLER: dict[str, Any] = {"library_name": "lora-convert", "library_version": __version__}


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
    texts = [file for file in files if file.partition("/")[0] in components_of(index) and file.endswith(_TEXTS)]
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
    return folder if all(_is_there(component, files) for component in components_of(index)) else None


def _is_there(component: str, files: Sequence[str]) -> bool:
    """Whether the small files of a component are there."""
    if component.startswith("tokenizer"):
        wanted: Sequence[set[str]] = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})
    else:
        wanted = ({"config.json"}, {"scheduler_config.json"})
    return any({f"{component}/{file}" for file in choice} <= set(files) for choice in wanted)
