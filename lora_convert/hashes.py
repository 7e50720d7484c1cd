"""The hashes by which sites and tools know a model file.

`sha256` is of the whole file (Civitai's AutoV2 is its first 10 digits), `tensors` of the bytes behind the header
(kohya's `sshs_model_hash`, AutoV3 is its first 12), AutoV1 and kohya's legacy hash are of 64 KiB at 1 MiB. Sources:
sd-scripts `library/train_util.py` (`addnet_hash_legacy`, `addnet_hash_safetensors`), AUTOMATIC1111 `modules/hashes.py`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

__all__ = ["file_hashes", "sha256_of"]

_LEGACY_START, _LEGACY_SIZE = 0x100000, 0x10000

ReadAt = Callable[[int, int], bytes]


def sha256_of(chunks: Iterable[bytes]) -> str:
    """SHA-256 of a stream, in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def legacy_hash(read_at: ReadAt, size: int) -> str:
    """SHA-256 of the 64 KiB that begin at 1 MiB, in full; what a shorter file lacks counts as empty."""
    start = min(_LEGACY_START, size)
    return hashlib.sha256(read_at(start, min(_LEGACY_SIZE, size - start))).hexdigest()


class _Digest(Protocol):
    def update(self, data: bytes, /) -> object: ...

    def hexdigest(self) -> str: ...


def _blake3() -> _Digest | None:
    try:
        from blake3 import blake3
    except ImportError:
        return None
    return blake3()


def file_hashes(chunks: Iterator[bytes], read_at: ReadAt, size: int, data_start: int) -> dict[str, str]:
    """All hashes of a file in one pass: sha256, autov1, autov2, autov3, tensors, crc32, and blake3 if it is installed.

    `data_start` is where tensor bytes begin.
    """
    whole, data = hashlib.sha256(), hashlib.sha256()
    tree = _blake3()
    crc = position = 0
    for chunk in chunks:
        whole.update(chunk)
        data.update(chunk[max(0, data_start - position) :])
        crc = zlib.crc32(chunk, crc)
        if tree is not None:
            tree.update(chunk)
        position += len(chunk)
    digest, tensors = whole.hexdigest(), data.hexdigest()
    hashes = {
        "sha256": digest,
        "autov1": legacy_hash(read_at, size)[:8],
        "autov2": digest[:10],
        "autov3": tensors[:12],
        "tensors": tensors,
        "crc32": f"{crc:08x}",
    }
    return hashes | ({"blake3": tree.hexdigest()} if tree is not None else {})
