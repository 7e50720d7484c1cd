"""Two small but real text-to-image models, trained for this project by `training/`, one folder each."""

from __future__ import annotations

from pathlib import Path

NAMES = ("tiny-sd15", "tiny-sdxl")
"""Names that stand for an embedded base model wherever a base is asked for; each is a family's name too."""


def folder(name: str) -> Path:
    """The Diffusers folder of an embedded base model. Raises KeyError for any other name."""
    if name not in NAMES:
        raise KeyError(name)
    return Path(__file__).parent / name
