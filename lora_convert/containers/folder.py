"""A folder of embeddings, read as one file: Diffusers keeps the vectors of every text encoder in a file of its own.

The tensors of file k are called `k.<name>`, as those of a pickled list of dictionaries are, and so are its metadata
among the extras.
"""

from __future__ import annotations

import contextlib
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_convert.containers.header import Header, Span, TensorInfo

if TYPE_CHECKING:
    from lora_convert.containers.source import Reader

__all__ = ["Joined", "embedding_files", "joined"]

_NAMES = re.compile(r"learned_embeds(_\d)?(-.+)?\.(safetensors|bin)")
_INTERIM = re.compile(r"-steps-\d+")
"""What Diffusers' scripts put behind the names of files that they save while training (`--save_steps`)."""


def embedding_files(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The files of embeddings in a folder that Diffusers' scripts or `convert` wrote; none if that holds none.

    Of a file that is there twice it is the one in safetensors, and none that was saved before training ended.
    """
    paths = sorted(path for path in Path(folder).glob("learned_embeds*") if _NAMES.fullmatch(path.name))
    found = {path.stem: path for path in paths}  # .bin comes first
    final = {stem: _INTERIM.sub("", stem) for stem in found}
    return tuple(path for stem, path in found.items() if final[stem] == stem or final[stem] not in found)


class Joined:
    """The files of a folder, one after the other; behind their bytes lie the tensors of each, from `places` on."""

    def __init__(self, readers: Sequence[Reader], places: Sequence[int]) -> None:
        self._readers, self._places = readers, places
        self._starts = [sum(reader.size for reader in readers[:number]) for number in range(len(readers))]
        self.size = sum(reader.size for reader in readers)

    def read_at(self, offset: int, size: int) -> bytes:
        if offset >= self.size:
            number = bisect_right(self._places, offset) - 1
            return self._readers[number].read_at(offset - self._places[number], size)
        pieces = []
        while size and offset < self.size:
            number = bisect_right(self._starts, offset) - 1
            start, reader = self._starts[number], self._readers[number]
            piece = reader.read_at(offset - start, min(size, start + reader.size - offset))
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for reader in self._readers:
                stack.callback(reader.close)


def joined(parts: Sequence[tuple[Header, Reader]], path: str) -> tuple[Header, Reader]:
    """The headers and readers of several files as those of one."""
    place = sum(reader.size for _, reader in parts)
    places: list[int] = []
    tensors: dict[str, TensorInfo] = {}
    for number, (header, _) in enumerate(parts):
        places.append(place)
        for name, tensor in header.tensors.items():
            span = Span(place + tensor.where.start, place + tensor.where.end)
            tensors[f"{number}.{name}"] = replace(tensor, where=span)
        place += max((tensor.where.end for tensor in header.tensors.values()), default=0)
    metadata = {key: text for header, _ in reversed(parts) for key, text in header.metadata.items()}
    extras = {key: text for header, _ in reversed(parts) for key, text in header.extras.items()}
    extras |= {f"{k}.{key}": text for k, (header, _) in enumerate(parts) for key, text in header.metadata.items()}
    findings = tuple(finding for header, _ in parts for finding in header.findings)
    return Header(path, tensors, metadata, extras, findings), Joined([reader for _, reader in parts], places)
