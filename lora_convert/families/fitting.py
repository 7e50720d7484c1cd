"""Which family a base model is of, by the names and shapes of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_convert.families import FAMILIES, Component, Family, Module

__all__ = ["Shapes", "fits", "matching_family"]

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a component's weights, by canonical path of the module (`conv_in`)."""


def matching_family(components: Mapping[str, Shapes], among: Iterable[Family] = FAMILIES.values()) -> str | None:
    """The family that has these components, each with every module of the family's table in its shape.

    More modules than the table has do not matter, nor do components that are absent, except for the UNet.
    """
    if "unet" not in components:
        return None
    families = (family for family in among if _has(family, components))
    return next((family.name for family in families), None)


def _has(family: Family, components: Mapping[str, Shapes]) -> bool:
    names = {component.name: component for component in family.components}
    return all(name in names and fits(family, names[name], shapes) for name, shapes in components.items())


def fits(family: Family, component: Component, shapes: Shapes) -> bool:
    """Whether every module of the component is there in its shape."""
    return all(_fits_module(family, module, shapes.get(path)) for path, module in component.modules.items())


def _fits_module(family: Family, module: Module, shape: tuple[int, ...] | None) -> bool:
    """Whether the shape is the module's, or that of the first convolution of an inpainting model and the like."""
    if shape == module.shape or shape is None or module.name != "unet.conv_in":
        return shape == module.shape
    return shape in {(module.shape[0], channels, *module.shape[2:]) for _, channels in family.variants}
