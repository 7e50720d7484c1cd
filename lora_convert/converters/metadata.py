"""The metadata of an output: what is kept, what would be stale and is made anew, and where the file came from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from lora_convert.converters.layout import LAYOUTS
from lora_convert.converters.plan import Options, OutputFile, OutputTensor, Plan
from lora_convert.converters.writer import header_bytes
from lora_convert.families import FAMILIES
from lora_convert.hashes import legacy_hash

__all__ = ["STALE", "UNKNOWN", "Hashes", "is_truncated", "output_metadata", "with_hashes", "write_final_header"]

PROVENANCE = "lora_convert."
_CHUNK = 1 << 20

STALE: Mapping[str, str] = {
    "sshs_model_hash": "tensors",
    "sshs_legacy_hash": "legacy",
    "modelspec.hash_sha256": "tensors",
}
"""Metadata entries that hash the file's content, and which hash they hold. Renewed where the source has them."""


@dataclass(frozen=True, slots=True)
class Hashes:
    """Hashes that are known last, in hexadecimal: of the output's tensors, kohya's legacy one, of the source file."""

    tensors: str
    legacy: str
    source: str


_LATE = {**STALE, f"{PROVENANCE}source_sha256": "source"}
UNKNOWN = Hashes("0" * 64, "0" * 8, "0" * 64)


def output_metadata(plan: Plan, output: OutputFile, version: str) -> dict[str, str]:
    """One output's metadata, sorted; hashes are zeros of the right length until `with_hashes` fills them in."""
    source = plan.detection.metadata or {}
    family = FAMILIES[plan.detection.family or ""]
    kept = {
        key: value for key, value in source.items() if key != "lora_adapter_metadata" and not key.startswith(PROVENANCE)
    }
    if "modelspec.implementation" in kept and plan.layout in LAYOUTS:
        kept["modelspec.implementation"] = LAYOUTS[plan.layout].implementation(family)
    kept["format"] = "pt"
    kept[f"{PROVENANCE}version"] = version
    kept[f"{PROVENANCE}source_sha256"] = ""
    kept[f"{PROVENANCE}family"] = family.name
    if plan.detection.trainer:
        kept[f"{PROVENANCE}trainer"] = plan.detection.trainer
    if any(step.truncated for step in plan.steps):
        kept |= {f"{PROVENANCE}{name}": f"{value:g}" for name, value in _truncation(plan.options).items()}
    if output.adapter_metadata:
        kept["lora_adapter_metadata"] = output.adapter_metadata
    return dict(sorted(with_hashes(kept, UNKNOWN).items()))


def _truncation(options: Options) -> dict[str, float]:
    asked = {"rank": options.rank, "max_error": options.max_error}
    return {name: value for name, value in asked.items() if value is not None}


def is_truncated(metadata: Mapping[str, str]) -> bool:
    """Whether an output says that ranks were cut, so that its changes are the closest of their ranks."""
    return f"{PROVENANCE}rank" in metadata or f"{PROVENANCE}max_error" in metadata


def with_hashes(metadata: Mapping[str, str], hashes: Hashes) -> dict[str, str]:
    """The metadata with its content hashes replaced; a `0x` before a hash stays."""
    renewed = dict(metadata)
    for key, kind in _LATE.items():
        if key in metadata:
            prefix = "0x" if metadata[key].startswith("0x") else ""
            renewed[key] = prefix + str(getattr(hashes, kind))
    return renewed


def write_final_header(
    file: BinaryIO, tensors: Sequence[OutputTensor], metadata: Mapping[str, str], source_sha256: Callable[[], str]
) -> None:
    """Write the header of a file whose tensors are written, with the hashes that its metadata asks for.

    The header has the size that it has with this metadata. `source_sha256` is asked last.
    """
    content, legacy = _content_hashes(tensors, file, len(header_bytes(tensors, metadata)), metadata)
    final = with_hashes(metadata, Hashes(content, legacy, source_sha256()))
    file.seek(0)
    file.write(header_bytes(tensors, final))


def _content_hashes(
    written: Sequence[OutputTensor], file: BinaryIO, start: int, metadata: Mapping[str, str]
) -> tuple[str, str]:
    """SHA-256 and kohya's legacy hash of the data just written, if the metadata asks for them.

    kohya's legacy hash is of the file as it would be with training metadata alone, so positions count from there.
    """
    if not STALE.keys() & metadata.keys():
        return "", ""
    size = file.seek(0, 2) - start
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    training_header = header_bytes(written, training)

    def read_at(offset: int, length: int) -> bytes:
        inside = training_header[offset : offset + length]
        if len(inside) < length:
            file.seek(start + max(0, offset - len(training_header)))
            inside += file.read(length - len(inside))
        return inside

    digest = hashlib.sha256()
    file.seek(start)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest(), legacy_hash(read_at, len(training_header) + size)[:8]
