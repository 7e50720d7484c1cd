"""Differences stored whole, and several adapters of one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from lora_convert.converters.algorithms.adapter import Adapter, Array, Base, Form, Shape, Shapes, Stored, single, wide
from lora_convert.converters.algorithms.lora import Lora
from lora_convert.errors import Unrepresentable

__all__ = ["Difference", "Sum", "difference_form", "read_difference", "sum_form"]


@dataclass(frozen=True)
class Difference:
    """ΔW and Δb as they are, either or both. `shape` is that of the module's weight.

    LyCORIS `modules/full.py` (diff, diff_b) and `modules/norms.py` (w_norm, b_norm); ComfyUI's extraction writes the
    former for norms too.
    """

    shape: Shape
    weight: Array | None = None
    bias: Array | None = None

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        found = {} if self.weight is None else {"weight": wide(self.weight).reshape(self.shape)}
        return found if self.bias is None else found | {"bias": wide(self.bias)}

    def rows(self, start: int, stop: int) -> Difference:
        weight, bias = (None if values is None else values[start:stop] for values in (self.weight, self.bias))
        return Difference((stop - start, *self.shape[1:]), weight, bias)

    def to_lora(self, base: Base | None = None) -> Lora:
        if self.weight is not None or len(self.shape) < 2:
            kind = "a norm's vector" if len(self.shape) < 2 else "a whole matrix"
            raise Unrepresentable(f"it is stored as {kind}, which is no product of two factors")
        empty = np.zeros((0, prod(self.shape[1:])), np.float32), np.zeros((self.shape[0], 0), np.float32)
        return Lora(*empty, kernel=self.shape[2:], bias=self.bias)


@dataclass(frozen=True)
class Sum:
    """Several adapters of one module, added: a LoRA with a difference of the bias, for one."""

    parts: tuple[Adapter, ...]

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        total: dict[str, Array] = {}
        for part in self.parts:
            for name, delta in part.deltas(base).items():
                total[name] = total[name] + delta if name in total else delta
        return total

    def rows(self, start: int, stop: int) -> Sum:
        return Sum(tuple(part.rows(start, stop) for part in self.parts))

    def to_lora(self, base: Base | None = None) -> Lora:
        plain = [part.to_lora(base) for part in self.parts]
        biases = [wide(lora.bias) for lora in plain if lora.bias is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        ranked = [lora for lora in plain if lora.up.shape[1]] or plain[:1]
        if len(ranked) == 1:
            only = ranked[0]
            return Lora(only.down, only.up, None, only.scale, only.kernel, bias)
        down = np.concatenate([single(lora.down) for lora in ranked])
        up = np.concatenate([lora.scale * single(lora.up) for lora in ranked], axis=1)
        return Lora(down, up, None, 1.0, ranked[0].kernel, bias)


def read_difference(stored: Stored) -> Difference:
    """From the fields `weight` and `bias`."""
    bias = stored.tensors.get("bias")
    return Difference(stored.shape, stored.tensors.get("weight"), None if bias is None else bias.reshape(-1))


def difference_form(shapes: Shapes, weight: Shape) -> Form:
    """A lone bias changes no weight, which is rank 0."""
    changes = "weight" in shapes
    return Form(None if changes or len(weight) < 2 else 0, changes, "bias" in shapes)


def sum_form(forms: tuple[Form, ...]) -> Form:
    """Ranks add; where one of the parts has none, the sum has none."""
    ranks = [form.rank for form in forms if form.rank is not None]
    return Form(
        sum(ranks) if len(ranks) == len(forms) else None,
        any(form.weight for form in forms),
        any(form.bias for form in forms),
        needs_base=any(form.needs_base for form in forms),
    )
