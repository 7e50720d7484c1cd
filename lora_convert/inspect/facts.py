"""What a file's metadata tells about its training: trigger words and settings, under plain labels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["training_facts", "trigger_words"]

_MOST_WORDS = 20

_LABELS: Mapping[str, tuple[str, ...]] = {
    "title": ("modelspec.title", "ss_output_name", "name"),
    "author": ("modelspec.author",),
    "base model": ("ss_sd_model_name", "ss_base_model_version", "sd_checkpoint_name"),
    "resolution": ("modelspec.resolution", "ss_resolution"),
    "images": ("ss_num_train_images",),
    "steps": ("ss_steps", "ss_max_train_steps", "step"),
    "epochs": ("ss_num_epochs", "ss_epoch"),
    "learning rate": ("ss_unet_lr", "ss_learning_rate"),
    "optimizer": ("ss_optimizer",),
    "network": ("ss_network_module",),
    "network arguments": ("ss_network_args",),
    "network dim": ("ss_network_dim",),
    "network alpha": ("ss_network_alpha",),
    "clip skip": ("ss_clip_skip",),
    "trained": ("modelspec.date",),
    "prediction type": ("modelspec.prediction_type",),
    "usage hint": ("modelspec.usage_hint",),
    "comment": ("ss_training_comment",),
}
"""Label -> metadata keys, the first that says something counts."""


_NOTHING = ("", "None", "null")


def training_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Training settings by label; only those that the file states."""
    facts = {}
    for label, keys in _LABELS.items():
        value = next((metadata[key] for key in keys if metadata.get(key, "None") not in _NOTHING), None)
        if value is not None:
            facts[label] = value
    return facts


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _concepts(frequencies: object) -> list[str]:
    """Trigger words in kohya's tag counts: concepts of folders named `10_word`, and tags that stand on every image."""
    if not isinstance(frequencies, dict):
        return []
    words: list[str] = []
    for folder, tags in frequencies.items():
        concept = re.match(r"\d+_(.+)", folder)
        words += [concept[1]] if concept else []
        if isinstance(tags, dict):
            counts = {tag.strip(): n for tag, n in tags.items() if isinstance(n, int) and tag.strip()}
            most = max(counts.values(), default=0)
            words += [tag for tag, count in counts.items() if count == most and most > 1]
    return words


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Words that call the adapter: `modelspec.trigger_phrase` if stated, else what the training tags suggest."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return (phrase,)
    words = _concepts(_json(metadata.get("ss_tag_frequency", "")))
    return tuple(dict.fromkeys(words))[:_MOST_WORDS]
