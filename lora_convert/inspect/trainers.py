"""Who trained a file: told by its metadata, or by a spelling that one trainer alone writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_convert.inspect.detection import AdaptedModule

__all__ = ["family_hints", "trainer_of"]

Told = tuple[str, str]
"""A trainer and the sentence that says how the file tells it."""

_SPELLINGS: Mapping[str, str] = {
    "peft": "peft",
    "omi": "onetrainer",
    "original": "onetrainer",
    "cloneofsimo": "cloneofsimo",
    "lycoris": "lycoris",
    "diffusers": "diffusers",
}
"""Spellings that only one trainer (or its library) writes. Kohya's is written by many."""

_THELASTBEN_ALPHA = 20000.0


def _is_thelastben(payload: Sequence[AdaptedModule]) -> bool:
    return all(module.alpha == _THELASTBEN_ALPHA and module.spelling == "kohya" for module in payload)


def _by_metadata(metadata: Mapping[str, str]) -> Told | None:
    if trainer := metadata.get("lora_convert.trainer"):
        return trainer, "lora_convert.trainer records who trained the source"
    if "ot_revision" in metadata or "ot_branch" in metadata:
        return "onetrainer", "metadata has OneTrainer's ot_revision or ot_branch"
    if "ai-toolkit" in metadata.get("software", ""):
        return "ai-toolkit", "metadata software names ai-toolkit"
    module = metadata.get("ss_network_module", "")
    if module.startswith("lycoris"):
        return "lycoris", f"metadata ss_network_module is {module}"
    if module.startswith("networks.") or "ss_sd_scripts_commit_hash" in metadata:
        return "kohya", f"metadata ss_network_module is {module}" if module else "metadata names sd-scripts"
    return None


def _by_spelling(payload: Sequence[AdaptedModule], has_metadata: bool) -> Told | None:
    spellings = {module.spelling for module in payload}
    for spelling, trainer in _SPELLINGS.items():
        if spelling in spellings:
            return trainer, f"names are spelt as only {trainer} spells them"
    plain_pairs = all(module.alpha is None for module in payload)
    if "comfyui" in spellings and plain_pairs and not has_metadata:
        return "comfyui", "ComfyUI's names without alpha and without metadata, as its own extraction saves them"
    return None


def trainer_of(payload: Sequence[AdaptedModule], metadata: Mapping[str, str]) -> Told | None:
    """The trainer and how the file tells it, None if it does not."""
    if payload and _is_thelastben(payload):
        return "thelastben", f"every alpha is {_THELASTBEN_ALPHA:g}, a constant of TheLastBen's trainer"
    if "lora_convert.version" in metadata:
        return _by_metadata(metadata)  # the spelling is ours, and says nothing of the trainer
    return _by_metadata(metadata) or _by_spelling(payload, bool(metadata))


_FAMILY_HINTS: Sequence[tuple[str, str, str]] = (
    ("ss_base_model_version", "sdxl_refiner", "sdxl-refiner"),
    ("ss_base_model_version", "sdxl", "sdxl"),
    ("ss_base_model_version", "sd_v2", "sd21"),
    ("ss_base_model_version", "sd_v1", "sd15"),
    ("ss_base_model_version", "sd_1", "sd15"),
    ("modelspec.architecture", "stable-diffusion-xl-v1-refiner", "sdxl-refiner"),
    ("modelspec.architecture", "stable-diffusion-xl", "sdxl"),
    ("modelspec.architecture", "stable-diffusion-v2", "sd21"),
    ("modelspec.architecture", "stable-diffusion-v1", "sd15"),
    ("ss_v2", "True", "sd21"),
    *(
        ("lora_convert.family", family, family)
        for family in ("sdxl-refiner", "sdxl", "sd21", "sd15", "sd3", "flux", "tiny-sdxl", "tiny-sd15")
    ),
)
"""Rows of (metadata key, how its value begins, the family it speaks for); the first that matches a key counts."""


def family_hints(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """Families that the metadata names, each with the sentence that says where."""
    hints: dict[str, str] = {}
    decided: set[str] = set()
    for key, start, family in _FAMILY_HINTS:
        if key not in decided and metadata.get(key, "").startswith(start):
            decided.add(key)
            hints.setdefault(family, f"metadata {key} is {metadata[key]}")
    return hints
