"""How outputs are spelt: names of tensors, and what the header says about them. A layout is a class and a row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from lora_convert.families import Family, Module

__all__ = ["CANONICAL_NAME", "LAYOUTS", "Layout", "Written"]


@dataclass(frozen=True, slots=True)
class Written:
    """What the header has to know of one module: its rank, the alpha that a reader shall use, and what else it has."""

    module: Module
    rank: int
    alpha: float
    magnitude: bool = False
    bias: bool = False


class Layout(Protocol):
    """A way to write adapters down.

    `folds`: the scale may be folded into the matrices; `separates`: within a component either every module has a
    magnitude or none, and either every one has a bias or none.
    """

    folds: ClassVar[bool]
    separates: ClassVar[bool]

    def file_name(self, source: str) -> str:
        """The output's name in a folder, given the source's name without its ending."""
        ...

    def names(self, family: Family, modules: Sequence[Module]) -> Mapping[Module, Mapping[str, str]]:
        """For every module the tensor names by role: `down`, `up`, `magnitude`, `bias`, perhaps `alpha`."""
        ...

    def magnitude_shape(self, module: Module) -> tuple[int, ...]:
        """The shape in which a magnitude per output is stored."""
        ...

    def adapter_metadata(self, written: Sequence[Written]) -> str | None:
        """The header's `lora_adapter_metadata`, if this layout has one."""
        ...

    def implementation(self, family: Family) -> str:
        """The value of `modelspec.implementation` for files in this layout."""
        ...


_MAGNITUDE = {"magnitude": "lora_magnitude_vector.weight"}
_PEFT = {"down": "lora_A.weight", "up": "lora_B.weight", "bias": "lora_B.bias", **_MAGNITUDE}
_LINEAR_LAYER = {
    "down": "lora_linear_layer.down.weight",
    "up": "lora_linear_layer.up.weight",
    "bias": "lora_linear_layer.up.bias",
    **_MAGNITUDE,
}


def _common(values: Sequence[float]) -> float:
    """The most frequent value; of equals the smallest, so that the result does not depend on order."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


CANONICAL_NAME = "pytorch_lora_weights.safetensors"


class Diffusers:
    """The canonical layout: `<component>.<module>.lora_A.weight`, `pytorch_lora_weights.safetensors`.

    The header's `lora_adapter_metadata` has only fields that every peft since 0.15 knows; unknown ones make older
    versions fail. `use_dora` and `lora_bias` are there where they are true. Patterns are regular expressions to peft:
    anchored for the UNet, where one module's path can end another's; for text encoders without `text_model.` and
    unanchored, since transformers 5 dropped that part.
    """

    folds: ClassVar[bool] = True
    separates: ClassVar[bool] = True

    def file_name(self, source: str) -> str:
        return CANONICAL_NAME

    def names(self, family: Family, modules: Sequence[Module]) -> Mapping[Module, Mapping[str, str]]:
        by_component: dict[str, list[Module]] = {}
        for module in modules:
            by_component.setdefault(module.component, []).append(module)
        names = {}
        for component, members in by_component.items():
            suffixes = _LINEAR_LAYER if _needs_linear_layer(component, members) else _PEFT
            for module in members:
                names[module] = {role: f"{module.name}.{suffix}" for role, suffix in suffixes.items()}
        return names

    def magnitude_shape(self, module: Module) -> tuple[int, ...]:
        return (1, module.shape[0], 1, 1) if len(module.shape) == 4 else module.shape[:1]

    def adapter_metadata(self, written: Sequence[Written]) -> str | None:
        content: dict[str, Any] = {}
        for component in sorted({item.module.component for item in written}):
            members = [item for item in written if item.module.component == component]
            rank, alpha = _common([item.rank for item in members]), _common([item.alpha for item in members])
            keys = {item.module: _pattern(item.module) for item in members}
            fields = {
                "r": _plain(rank),
                "lora_alpha": _plain(alpha),
                "rank_pattern": {keys[item.module]: item.rank for item in members if item.rank != rank},
                "alpha_pattern": {keys[item.module]: _plain(item.alpha) for item in members if item.alpha != alpha},
                "target_modules": [keys[item.module].removeprefix("^") for item in members],
                **({"use_dora": True} if any(item.magnitude for item in members) else {}),
                **({"lora_bias": True} if any(item.bias for item in members) else {}),
            }
            content |= {f"{component}.{name}": value for name, value in fields.items()}
        return json.dumps(content, indent=2, sort_keys=True)

    def implementation(self, family: Family) -> str:
        return "diffusers"


def _pattern(module: Module) -> str:
    return f"^{module.path}" if module.component == "unet" else module.path.removeprefix("text_model.")


def _needs_linear_layer(component: str, modules: Sequence[Module]) -> bool:
    """Whether a text encoder's modules load only in the older spelling.

    diffusers' loader recognises PEFT's spelling of a text encoder by its attention keys; files that adapt only the
    feed-forward or only the projection are refused ("Could not automatically infer state dict type").
    """
    return component.startswith("text_encoder") and not any(".self_attn." in module.path for module in modules)


class Kohya:
    """Kohya's layout: `lora_unet_…lora_down.weight`, `lora_up.weight`, `alpha`; SGM names for SDXL's UNet.

    ComfyUI finds every one of these names; A1111 and Forge have none for the text projection, nor for the text encoder
    of the SDXL refiner.
    """

    folds: ClassVar[bool] = False
    separates: ClassVar[bool] = False

    def file_name(self, source: str) -> str:
        """The source's own name, by which users of ComfyUI and A1111 call a LoRA, unless it is the canonical one."""
        named = source and f"{source}.safetensors" != CANONICAL_NAME
        return f"{source}.safetensors" if named else "lora.safetensors"

    _SUFFIXES: ClassVar[Mapping[str, str]] = {
        "down": "lora_down.weight",
        "up": "lora_up.weight",
        "alpha": "alpha",
        "magnitude": "dora_scale",
        "bias": "diff_b",
    }

    def names(self, family: Family, modules: Sequence[Module]) -> Mapping[Module, Mapping[str, str]]:
        names = {}
        for module in modules:
            component = family.component(module.component)
            assert component is not None
            path = module.original if family.sgm_names and module.component == "unet" else module.path
            prefix = component.kohya_prefix if path != "text_projection" else "lora_te2_"  # the one ComfyUI knows
            stem = prefix + path.replace(".", "_")
            names[module] = {role: f"{stem}.{suffix}" for role, suffix in self._SUFFIXES.items()}
        return names

    def magnitude_shape(self, module: Module) -> tuple[int, ...]:
        return (module.shape[0], *(1 for _ in module.shape[1:]))

    def adapter_metadata(self, written: Sequence[Written]) -> str | None:
        return None

    def implementation(self, family: Family) -> str:
        return "https://github.com/Stability-AI/generative-models" if family.sgm_names else "diffusers"


LAYOUTS: Mapping[str, Layout] = {"diffusers": Diffusers(), "kohya": Kohya(), "comfy": Kohya(), "a1111": Kohya()}
"""`--to` -> layout. ComfyUI and A1111 read Kohya's names for every family so far."""
