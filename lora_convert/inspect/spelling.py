"""How trainers spell adapters, as tables: prefixes that name a component, suffixes that name a parameter.

A tensor name is a prefix, a module's name in some naming (with dots, or flattened with underscores), and a suffix. The
three vary independently, so each is its own table and a new trainer is a row. Nothing is taken apart by patterns: the
suffix is looked up, then the rest is looked up among the names that the family's modules have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["BARE", "PREFIXES", "SUFFIXES", "Naming", "Prefix", "Suffix", "split_suffix"]

Naming = Literal["diffusers", "original"]

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
ANY = ("unet", *TEXT_ENCODERS)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A row: names that start with `text` belong to one of `components`, the rest joined by `separator`.

    Where several components are listed, the first one that the family has and that the shapes fit is meant. `tables`
    restricts the row to components of those tables (`clip_l.` is always CLIP-L, whatever the pipeline calls it).
    `spellings` says what the use of each naming behind this prefix is called.
    """

    text: str
    components: tuple[str, ...]
    separator: Literal[".", "_"]
    spellings: Mapping[Naming, str]
    tables: tuple[str, ...] = ()


def _flat(text: str, components: tuple[str, ...], spelling: str = "kohya") -> Prefix:
    return Prefix(text, components, "_", {"diffusers": spelling, "original": spelling})


def _clip(key: str, table: str) -> tuple[Prefix, ...]:
    """One text encoder under the keys that ComfyUI and OneTrainer give it."""
    comfyui: Mapping[Naming, str] = {"diffusers": "comfyui", "original": "comfyui"}
    omi: Mapping[Naming, str] = {"diffusers": "omi", "original": "omi"}
    return (
        Prefix(f"text_encoders.{key}.transformer.", TEXT_ENCODERS, ".", comfyui, (table,)),
        Prefix(f"text_encoders.{key}.", TEXT_ENCODERS, ".", comfyui, (table,)),
        Prefix(f"{key}.transformer.", TEXT_ENCODERS, ".", comfyui, (table,)),
        Prefix(f"{key}.", TEXT_ENCODERS, ".", omi, (table,)),
    )


PREFIXES: tuple[Prefix, ...] = (
    _flat("lora_unet_", ("unet",)),
    _flat("lora_te_", TEXT_ENCODERS),
    _flat("lora_te1_", TEXT_ENCODERS),
    _flat("lora_te2_", ("text_encoder_2",)),
    _flat("oft_unet_", ("unet",)),
    _flat("oft_te_", TEXT_ENCODERS),
    _flat("oft_te1_", TEXT_ENCODERS),
    _flat("oft_te2_", ("text_encoder_2",)),
    _flat("lycoris_unet_", ("unet",), "lycoris"),
    _flat("lycoris_", ANY, "lycoris"),
    Prefix("base_model.model.", ANY, ".", {"diffusers": "peft", "original": "peft"}),
    Prefix("unet.base_model.model.", ("unet",), ".", {"diffusers": "peft"}),
    Prefix("unet.", ("unet",), ".", {"diffusers": "diffusers", "original": "omi"}),
    Prefix("text_encoder.", ("text_encoder",), ".", {"diffusers": "diffusers", "original": "omi"}),
    Prefix("text_encoder_2.", ("text_encoder_2",), ".", {"diffusers": "diffusers", "original": "omi"}),
    Prefix("diffusion_model.", ("unet",), ".", {"original": "comfyui", "diffusers": "comfyui"}),
    Prefix("model.diffusion_model.", ("unet",), ".", {"original": "comfyui"}),
    *_clip("clip_l", "clip_l"),
    *_clip("clip_g", "openclip_bigg"),
    *_clip("clip_h", "openclip_h"),
)
"""Every row is tried, and the lookup decides: `unet.` begins both canonical and OMI names."""

BARE = Prefix("", ANY, ".", {"diffusers": "diffusers", "original": "original"})
"""For names that start with none of them."""


@dataclass(frozen=True, slots=True)
class Suffix:
    """A row: the parameter `field` of `algorithm`; `tail` is what the module's own name ends with."""

    text: str
    algorithm: str
    field: str
    tail: str = ""


def _rows(algorithm: str, fields: Mapping[str, str]) -> tuple[Suffix, ...]:
    return tuple(Suffix(f".{text}", algorithm, field) for text, field in fields.items())


def _processor_rows() -> tuple[Suffix, ...]:
    """Diffusers before 0.18: LoRA layers live in the attention processor, or beside the text encoder's projections."""
    parts = {"to_q": ("to_q", "q_proj"), "to_k": ("to_k", "k_proj"), "to_v": ("to_v", "v_proj")}
    parts["to_out"] = ("to_out.0", "out_proj")
    rows = []
    for layer, (unet, text_encoder) in parts.items():
        for field in ("down", "up"):
            rows.append(Suffix(f".processor.{layer}_lora.{field}.weight", "lora", field, f".{unet}"))
            rows.append(Suffix(f".{layer}_lora.{field}.weight", "lora", field, f".{text_encoder}"))
    return tuple(rows)


SUFFIXES: tuple[Suffix, ...] = (
    *_rows(
        "lora",
        {
            "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha",
            "scalar": "scalar", "lora_A.weight": "down", "lora_B.weight": "up", "lora_A.default.weight": "down",
            "lora_B.default.weight": "up", "lora.down.weight": "down", "lora.up.weight": "up",
            "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
            "lora_B.bias": "up_bias", "lora_up.bias": "up_bias",
        },
    ),
    *_processor_rows(),
    *_rows(
        "dora",
        {
            "dora_scale": "dora_scale", "lora_magnitude_vector": "magnitude", "magnitude": "magnitude",
            "lora_magnitude_vector.weight": "magnitude", "lora_magnitude_vector.default.weight": "magnitude",
        },
    ),
    *_rows("loha", {f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}),
    *_rows("lokr", {f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}),
    *_rows("glora", {f"{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")}),
    *_rows("ia3", {"weight": "weight", "on_input": "on_input", "ia3_l": "factors"}),
    *_rows("oft", {"oft_blocks": "blocks", "oft_diag": "diagonal", "rescale": "rescale", "oft_R.weight": "rotation"}),
    *_rows("full", {"diff": "weight", "diff_b": "bias"}),
    *_rows("norm", {"w_norm": "weight", "b_norm": "bias"}),
    *_rows("tlora", {"q_layer.weight": "q", "p_layer.weight": "p", "lambda_layer": "lambda"}),
)  # fmt: skip
"""`.alpha` and `.scalar` belong to whatever algorithm the module's other tensors say."""

_BY_TEXT: Mapping[str, Suffix] = {suffix.text: suffix for suffix in SUFFIXES}
_MOST_PARTS = max(text.count(".") for text in _BY_TEXT)


def split_suffix(name: str) -> tuple[str, Suffix] | None:
    """A tensor name as (module part, suffix row), the longest suffix winning; None if no suffix is known."""
    position = len(name)
    found = None
    for _ in range(_MOST_PARTS):
        position = name.rfind(".", 0, position)
        if position < 0:
            break
        suffix = _BY_TEXT.get(name[position:])
        if suffix:
            found = name[:position] + suffix.tail, suffix
    return found
