"""Facts about base models: the modules of each family, their shapes, and what other codebases call them.

The tables (`*.txt`) are generated from the diffusers and transformers classes by
`python -m lora_convert.runtime.tables` and checked against the installed classes by a test, so that reading them needs
no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType

from lora_convert.families.table import Module, parse_table

__all__ = ["FAMILIES", "Component", "Family", "Module"]


@dataclass(frozen=True)
class Component:
    """One model of a pipeline: its Diffusers name, the table of its modules, and rows of that table it does not have.

    `kohya_prefix` begins its modules' names in Kohya's layout.
    """

    name: str
    table: str
    kohya_prefix: str
    without: tuple[str, ...] = ()

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """Modules by Diffusers path, in the order of the live model's `named_modules()`."""
        return MappingProxyType(
            {module.path: module for module in _table(self.name, self.table) if module.path not in self.without}
        )


@dataclass(frozen=True)
class Family:
    """A base model architecture that adapters are made for.

    `sgm_names` says that trainers of Kohya's lineage name the UNet's modules by their original (SGM) names.
    `variants` are official models of this family whose first convolution takes more channels.
    """

    name: str
    title: str
    components: tuple[Component, ...]
    sgm_names: bool = False
    variants: tuple[tuple[str, int], ...] = ()

    def component(self, name: str) -> Component | None:
        """The component of that Diffusers name, or None."""
        return next((component for component in self.components if component.name == name), None)

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """All modules by pipeline name (`unet.conv_in`)."""
        return MappingProxyType(
            {module.name: module for component in self.components for module in component.modules.values()}
        )


@cache
def _table(component: str, table: str) -> tuple[Module, ...]:
    text = Path(__file__).with_name(f"{table}.txt").read_text(encoding="utf-8")
    return parse_table(component, text)


_NO_PROJECTION = ("text_projection",)
_INPAINTING = ("inpainting", 9)
_EDITING = ("InstructPix2Pix", 8)
_DEPTH = ("depth", 5)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family(
                "sd15",
                "Stable Diffusion 1.x",
                (
                    Component("unet", "unet_sd15", "lora_unet_"),
                    Component("text_encoder", "clip_l", "lora_te_", _NO_PROJECTION),
                ),
                variants=(_INPAINTING, _EDITING),
            ),
            Family(
                "sd21",
                "Stable Diffusion 2.x",
                (
                    Component("unet", "unet_sd21", "lora_unet_"),
                    Component("text_encoder", "openclip_h", "lora_te_", _NO_PROJECTION),
                ),
                variants=(_INPAINTING, _DEPTH),
            ),
            Family(
                "sdxl",
                "Stable Diffusion XL",
                (
                    Component("unet", "unet_sdxl", "lora_unet_"),
                    Component("text_encoder", "clip_l", "lora_te1_", _NO_PROJECTION),
                    Component("text_encoder_2", "openclip_bigg", "lora_te2_"),
                ),
                sgm_names=True,
                variants=(_INPAINTING, _EDITING),
            ),
            Family(
                "sdxl-refiner",
                "Stable Diffusion XL refiner",
                (
                    Component("unet", "unet_sdxl_refiner", "lora_unet_"),
                    Component("text_encoder_2", "openclip_bigg", "lora_te_"),
                ),
                sgm_names=True,
            ),
            Family(
                "tiny-sd15",
                "the embedded tiny Stable Diffusion 1.5",
                (
                    Component("unet", "unet_tiny_sd15", "lora_unet_"),
                    Component("text_encoder", "clip_tiny_sd15", "lora_te_", _NO_PROJECTION),
                ),
            ),
            Family(
                "tiny-sdxl",
                "the embedded tiny Stable Diffusion XL",
                (
                    Component("unet", "unet_tiny_sdxl", "lora_unet_"),
                    Component("text_encoder", "clip_tiny_sdxl", "lora_te1_", _NO_PROJECTION),
                    Component("text_encoder_2", "openclip_tiny_sdxl", "lora_te2_"),
                ),
                sgm_names=True,
            ),
        )
    }
)
