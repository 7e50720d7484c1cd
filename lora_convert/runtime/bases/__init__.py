"""Two small but real text-to-image models, trained for this project by `training/`, one folder each."""

from __future__ import annotations

from lora_convert.families.embedded import NAMES, folder

__all__ = ["NAMES", "folder"]
