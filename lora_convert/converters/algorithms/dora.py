"""DoRA: a learned length for every row or column of the changed weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_convert.converters.algorithms.adapter import Adapter, Array, Base, Form, Shapes, Stored, based, wide
from lora_convert.converters.algorithms.lora import Lora
from lora_convert.errors import Unrepresentable
from lora_convert.inspect.shapes import is_per_input

__all__ = ["Dora", "axis_of", "dora_form", "read_dora", "taken_apart"]

Axis = Literal["out", "in"]


@dataclass(frozen=True)
class Dora:
    """W' = magnitude · (W + ΔW) / ‖W + ΔW‖, the norm taken per output row or per input column.

    Shapes: magnitude (out,) or (in,). Axis `out`: the norm is over in, kh and kw; `in`: over out, kh and kw.
    A row or column of zeros stays one. DoRA: Liu et al. 2024, arXiv:2402.09353; LyCORIS `functional/general.py`
    (weight_decompose); peft `tuners/lora/dora.py`. LyCORIS 4 and OneTrainer add float32's epsilon to the norm, which
    changes less than what they round.
    """

    inner: Adapter
    magnitude: Array
    axis: Axis = "out"

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        weight = based(base, "DoRA's normalisation")
        inner = self.inner.deltas(base)
        changed = weight + inner["weight"]
        across = (0, *range(2, changed.ndim)) if self.axis == "in" else tuple(range(1, changed.ndim))
        norm = np.sqrt((changed * changed).sum(across, keepdims=True))
        length = np.where(norm == 0.0, 1.0, norm)
        return {**inner, "weight": changed * (wide(self.magnitude).reshape(norm.shape) / length) - weight}

    def rows(self, start: int, stop: int) -> Dora:
        if self.axis == "in":
            raise Unrepresentable("DoRA with a magnitude per input takes the norm over all rows")
        return Dora(self.inner.rows(start, stop), self.magnitude[start:stop], self.axis)

    def to_lora(self, base: Base | None = None) -> Lora:
        raise Unrepresentable("DoRA rescales the whole weight, and such a change has no low rank")


def taken_apart(adapter: Adapter) -> tuple[Adapter, Array | None]:
    """DoRA per output as the adapter inside it and its magnitudes; any other adapter as it is, and None."""
    if isinstance(adapter, Dora) and adapter.axis == "out":
        return adapter.inner, adapter.magnitude
    return adapter, None


def axis_of(shapes: Shapes) -> Axis:
    """What the magnitude is per.

    LyCORIS' and OneTrainer's `dora_scale` keeps its place: (out, 1, …) or (1, in, …). Under peft's name a
    convolution's is (1, out, 1, 1), and under ai-toolkit's it is (out,).
    """
    return "in" if is_per_input(shapes.get("dora_scale", ())) else "out"


def read_dora(stored: Stored, inner: Adapter) -> Dora:
    """DoRA around another adapter, from its field `dora_scale` or `magnitude`."""
    axis = axis_of({name: values.shape for name, values in stored.tensors.items()})
    values = stored.tensors["dora_scale"] if "dora_scale" in stored.tensors else stored.tensors["magnitude"]
    return Dora(inner, values.reshape(-1), axis)


def dora_form(shapes: Shapes, inner: Form) -> Form:
    """Per output the rank stays the inner adapter's; per input nothing of low rank is left."""
    if axis_of(shapes) == "out":
        return Form(inner.rank, True, inner.bias, magnitude=True, needs_base=inner.needs_base)
    return Form(None, True, inner.bias, needs_base=True)
