"""The metadata of an output: what is kept, what would be stale and is made anew, and where the file came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_convert.converters.layout import LAYOUTS
from lora_convert.converters.plan import Plan
from lora_convert.families import FAMILIES

__all__ = ["STALE", "Hashes", "output_metadata", "with_hashes"]

PROVENANCE = "lora_convert."

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
_UNKNOWN = Hashes("0" * 64, "0" * 8, "0" * 64)


def output_metadata(plan: Plan, version: str) -> dict[str, str]:
    """The output's metadata, sorted; hashes are zeros of the right length until `with_hashes` fills them in."""
    source = plan.detection.metadata or {}
    family = FAMILIES[plan.detection.family or ""]
    kept = {
        key: value for key, value in source.items() if key != "lora_adapter_metadata" and not key.startswith(PROVENANCE)
    }
    if "modelspec.implementation" in kept:
        kept["modelspec.implementation"] = LAYOUTS[plan.layout].implementation(family)
    kept["format"] = "pt"
    kept[f"{PROVENANCE}version"] = version
    kept[f"{PROVENANCE}source_sha256"] = ""
    kept[f"{PROVENANCE}family"] = family.name
    if plan.detection.trainer:
        kept[f"{PROVENANCE}trainer"] = plan.detection.trainer
    if plan.adapter_metadata:
        kept["lora_adapter_metadata"] = plan.adapter_metadata
    return dict(sorted(with_hashes(kept, _UNKNOWN).items()))


def with_hashes(metadata: Mapping[str, str], hashes: Hashes) -> dict[str, str]:
    """The metadata with its content hashes replaced; a `0x` before a hash stays."""
    renewed = dict(metadata)
    for key, kind in _LATE.items():
        if key in metadata:
            prefix = "0x" if metadata[key].startswith("0x") else ""
            renewed[key] = prefix + str(getattr(hashes, kind))
    return renewed
