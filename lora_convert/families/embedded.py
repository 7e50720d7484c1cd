"""The base models that come with the package: two small but real ones, each a family of its own."""

from __future__ import annotations

from pathlib import Path

__all__ = ["NAMES", "folder"]

NAMES = ("tiny-sd15", "tiny-sdxl")
"""Names that stand for an embedded base model wherever a base is asked for; each is a family's name too."""

_BASES = Path(__file__).parent.parent / "runtime" / "bases"


def folder(name: str) -> Path:
    """The Diffusers folder of an embedded base model. Raises KeyError for any other name."""
    if name not in NAMES:
        raise KeyError(name)
    return _BASES / name
