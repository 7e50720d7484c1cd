"""What a base model's weight files tell without being loaded: its family, and a hash that knows it from others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_convert.containers import Header, Source, open_source
from lora_convert.containers.header import MAX_HEADER_LIMIT
from lora_convert.errors import FileError
from lora_convert.families import FAMILIES
from lora_convert.families.fitting import Shapes, fits, matching_family
from lora_convert.hashes import sha256_of

__all__ = ["Shapes", "checkpoint_family", "matching_family", "read_weights", "stored_shapes"]

_CHECKPOINT_UNET = "model.diffusion_model."
_WHOLE = 1 << 26
"""Bytes of weights up to which all of them are hashed."""

_SAMPLES, _SAMPLE = 256, 4096
"""Pieces of each larger file that are hashed, and the bytes of a piece."""


def stored_shapes(tensors: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The shapes of one component out of those of its files' tensors, in the Diffusers layout.

    transformers 5.6 and later save a `CLIPTextModel` without `text_model.`, which the canonical paths have.
    """
    shapes = {name.removesuffix(".weight"): shape for name, shape in tensors.items() if name.endswith(".weight")}
    if "embeddings.token_embedding" in shapes:
        return {f"text_model.{path}": shape for path, shape in shapes.items()}
    return shapes


def checkpoint_family(header: Header) -> str | None:
    """The family of a single-file checkpoint, by the UNet in it, which has its original names."""
    for family in FAMILIES.values():
        unet = family.component("unet")
        assert unet is not None
        stored = {
            path: header.tensors[name].shape
            for path, module in unet.modules.items()
            if (name := f"{_CHECKPOINT_UNET}{module.original}.weight") in header.tensors
        }
        if fits(family, unet, stored):
            return family.name
    return None


def read_weights(files: Sequence[tuple[str, Path]]) -> tuple[list[Header], dict[str, str]]:
    """The headers of weight files, given with the names to call them by, and the hash of them all.

    Raises FileError, with the file's name as the subject, for one that is damaged or is no safetensors file.
    """
    headers = []
    digest = hashlib.sha256()
    whole = sum(path.stat().st_size for _, path in files if path.exists()) <= _WHOLE
    for name, path in files:
        try:
            with open_source(path, MAX_HEADER_LIMIT, pickles=False) as source:
                headers.append(source.header)
                content = sha256_of(source.chunks() if whole else _sampled(source))
        except FileError as error:
            raise FileError([replace(finding, subject=name) for finding in error.findings]) from None
        digest.update(f"{content}  {name}\n".encode())
    key = "sha256" if whole else "sampled_sha256"
    return headers, {key: content if len(files) == 1 else digest.hexdigest()}


def _sampled(source: Source) -> Iterable[bytes]:
    """The size of a file, its header, and evenly spaced pieces of its data: fine-tuning moves nearly all values."""
    reader, start = source.reader, source.header.data_start
    yield f"{reader.size}\n".encode()
    yield reader.read_at(0, start)
    room = max(reader.size - start - _SAMPLE, 0)
    for number in range(_SAMPLES):
        offset = start + room * number // (_SAMPLES - 1)
        yield reader.read_at(offset, min(_SAMPLE, reader.size - offset))
