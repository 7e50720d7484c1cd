"""The text encoders of each base model: what embedding files call them, where a pipeline has them, their widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from lora_convert.families import FAMILIES

__all__ = ["EMBEDDING_FAMILIES", "POOLED", "WITHOUT_LOADER", "TextEncoder", "title_of", "usual_norm"]


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """`key` is its name in embedding files, `component` that in a Diffusers pipeline, `width` that of its vectors."""

    key: str
    component: str
    width: int

    @property
    def suffix(self) -> str:
        """What follows the names of the pipeline's second and third parts: `_2`, `_3`, or nothing."""
        return self.component.removeprefix("text_encoder")

    @property
    def tokenizer(self) -> str:
        """The pipeline's part that makes its tokens."""
        return f"tokenizer{self.suffix}"


_KEYS: Mapping[str, tuple[str, ...]] = {
    "sd15": ("clip_l",),
    "sd21": ("clip_h",),
    "sdxl": ("clip_l", "clip_g"),
    "sdxl-refiner": ("clip_g",),
    "tiny-sd15": ("clip_l",),
    "tiny-sdxl": ("clip_l", "clip_g"),
}
"""Family -> the keys of its text encoders, in the order of its tables. A new family is a row."""

_WITHOUT_TABLES: Mapping[str, tuple[TextEncoder, ...]] = {
    "sd3": (
        TextEncoder("clip_l", "text_encoder", 768),
        TextEncoder("clip_g", "text_encoder_2", 1280),
        TextEncoder("t5xxl", "text_encoder_3", 4096),
    ),
    "flux": (TextEncoder("clip_l", "text_encoder", 768), TextEncoder("t5xxl", "text_encoder_2", 4096)),
}
"""Base models that have embeddings, but whose modules no table lists yet."""

_TABLE = "text_model.embeddings.token_embedding"


def _of(family: str) -> tuple[TextEncoder, ...]:
    widths = [
        (component.name, component.modules[_TABLE].shape[1])
        for component in FAMILIES[family].components
        if component.name.startswith("text_encoder")
    ]
    keys = zip(_KEYS[family], widths, strict=True)
    return tuple(TextEncoder(key, component, width) for key, (component, width) in keys)


EMBEDDING_FAMILIES: Mapping[str, tuple[TextEncoder, ...]] = {
    **{family: _of(family) for family in FAMILIES},
    **_WITHOUT_TABLES,
}
"""Every base model that an embedding may be for -> its text encoders, in the pipeline's order."""


WITHOUT_LOADER = ("sd3",)
"""Base models whose Diffusers pipeline has no `load_textual_inversion`."""

POOLED: Mapping[str, str] = {"flux": "text_encoder"}
"""Base models whose pipelines use the pooled output of a text encoder other than CLIP-G, and of which they do."""


def usual_norm(key: str, width: int) -> float:
    """About the L2 norm of a token's vector in the text encoder of that key.

    It is that of the encoder's initialisation, std · √width, with a std of 0.02 for CLIP (`initialize_parameters` of
    openai/CLIP and OpenCLIP) and of 1 for T5 (`_init_weights` in transformers).
    """
    return (1.0 if key.startswith("t5") else 0.02) * sqrt(width)


_TITLES = {"sd3": "Stable Diffusion 3", "flux": "Flux"}


def title_of(family: str) -> str:
    """A base model's name as people write it; also of those without tables. Raises KeyError for any other."""
    return _TITLES[family] if family in _TITLES else FAMILIES[family].title
