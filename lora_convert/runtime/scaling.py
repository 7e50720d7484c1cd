"""How strongly an adapter applies: one number, or numbers by component and by block of the UNet."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_convert.errors import UsageError
from lora_convert.families import FAMILIES
from lora_convert.report import counted, shown

__all__ = ["Scale", "plain_scale", "scales_by_module"]

Scale = float | Mapping[str, Any]
"""A number, or numbers by component, and for the UNet by block and layer.

`{"unet": {"down": 0.9, "mid": 1.0, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1.0]}, "other": 1.0},
"text_encoder": 0.5}`. What is not named has 1.0. A block's number is that of every adapted module in it, attention,
resnets and samplers alike. A list has one number per layer of the block: number i is that of resnet i and attention i,
and the last is that of the block's sampler, which follows the last layer; the mid block counts as one layer. `other`
are the modules outside all blocks: `conv_in`, `conv_out`, `time_embedding`, `add_embedding`.
"""

_UNET = "unet"
_PARTS = ("down", "mid", "up", "other")
_SAMPLERS = ("downsamplers", "upsamplers")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module of the UNet is. `block` is empty outside down and up; the layer -1 is the last one."""

    part: str
    block: str = ""
    layer: int = 0


def _place(path: str) -> _Place:
    first, *rest = path.split(".")
    if first not in ("down_blocks", "up_blocks"):
        return _Place("mid" if first == "mid_block" else "other")
    number, kind, layer = rest[:3]
    return _Place(first.removesuffix("_blocks"), f"block_{number}", -1 if kind in _SAMPLERS else int(layer))


def scales_by_module(scale: Scale, family: str) -> Mapping[str, float]:
    """The factor of every module of the family, by pipeline name (`unet.conv_in`).

    Raises UsageError, naming the key, for one that does not exist, a list of the wrong length, or what is not a finite
    number.
    """
    described = FAMILIES[family]
    components = {component.name: component.modules for component in described.components}
    if not isinstance(scale, Mapping):
        return dict.fromkeys(described.modules, _number(scale, "scale"))
    _check_keys(scale, components, "scale")
    scales = dict.fromkeys(described.modules, 1.0)
    for component, value in scale.items():
        paths = list(components[component])
        if isinstance(value, Mapping) and component == _UNET:
            found = _by_place(value, [_place(path) for path in paths])
        else:
            found = [_number(value, component)] * len(paths)
        scales.update({f"{component}.{path}": factor for path, factor in zip(paths, found, strict=True)})
    return scales


def _by_place(scale: Mapping[str, Any], places: Sequence[_Place]) -> list[float]:
    """The factor at each place of the UNet."""
    _check_keys(scale, _PARTS, _UNET)
    layers: dict[str, dict[str, int]] = {part: {} for part in _PARTS}
    for place in places:
        blocks = layers[place.part]
        blocks[place.block] = max(blocks.get(place.block, 0), place.layer + 1)
    factors = {(part, block): [1.0] * layers[part][block] for part in _PARTS for block in layers[part]}
    for part, value in scale.items():
        found = _by_block(part, value, layers[part])
        factors |= {(part, block): numbers for block, numbers in found.items()}
    return [factors[place.part, place.block][place.layer] for place in places]


def _by_block(part: str, value: Any, layers: Mapping[str, int]) -> Mapping[str, list[float]]:
    """The factors of the layers of the blocks that a part's value names. `layers` are their numbers by block."""
    key = f"{_UNET}.{part}"
    if part == "mid":
        return {block: _by_layer(value, number, key) for block, number in layers.items()}
    if isinstance(value, Mapping) and part != "other":
        _check_keys(value, layers, key)
        return {block: _by_layer(entry, layers[block], f"{key}.{block}") for block, entry in value.items()}
    return {block: [_number(value, key)] * number for block, number in layers.items()}


def _by_layer(value: Any, layers: int, key: str) -> list[float]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return [_number(value, key)] * layers
    if len(value) != layers:
        raise UsageError(f"{shown(key)} has {counted(len(value), 'number')}; the block has {counted(layers, 'layer')}")
    return [_number(entry, f"{key}[{number}]") for number, entry in enumerate(value)]


def _check_keys(scale: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in scale:
        if key not in known:
            raise UsageError(f"{shown(where)} has no '{shown(str(key))}'; it has {', '.join(known)}")


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise UsageError(f"{shown(key)} must be a finite number; it is {shown(repr(value))}")
    return float(value)


def plain_scale(scale: Any) -> Any:
    """A copy of a checked scale in numbers, dictionaries and lists, as JSON can hold it."""
    if isinstance(scale, Mapping):
        return {str(key): plain_scale(value) for key, value in scale.items()}
    return [float(value) for value in scale] if isinstance(scale, Sequence) else float(scale)
