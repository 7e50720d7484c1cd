"""LoRA, and what is one by its algebra: LoCon, LoRA-FA, Kohya's DyLoRA, Tucker cores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_convert.converters.algorithms.adapter import Array, Base, Form, Shape, Shapes, Stored, matrix, wide

__all__ = ["Lora", "dense_product", "fold_core", "lora_form", "read_lora", "whole"]


_CACHED = 1 << 16
"""Numbers of float64 that a core keeps in its cache."""


def fold_core(core: Array, factor: Array) -> Array:
    """A Tucker core (r, r', kh, kw) times the factor (r', in) behind it: (r, in·kh·kw), float64."""
    core, factor = wide(core), wide(factor)
    folded = np.zeros((core.shape[0], factor.shape[1], *core.shape[2:]))
    for inner in range(factor.shape[0]):  # no BLAS: its sums differ between machines, and outputs must not
        folded += core[:, inner, None] * factor[inner].reshape(1, -1, *(1,) * (core.ndim - 2))
    return folded.reshape(core.shape[0], math.prod(folded.shape[1:]))


def dense_product(left: Array, right: Array) -> Array:
    """(out, r) times (r, n) in float64, the same on every machine; for sizes at which either is small."""
    left, right = wide(left), wide(right)
    product = np.zeros((left.shape[0], right.shape[1]))
    height = max(1, _CACHED // max(1, right.shape[1]))
    for start in range(0, left.shape[0], height):
        block, rows = product[start : start + height], left[start : start + height]
        for inner in range(right.shape[0]):  # no BLAS here either
            block += rows[:, inner, None] * right[inner]
    return product


@dataclass(frozen=True)
class Lora:
    """ΔW = scale · up · down, with a Tucker core `mid` between them if there is one.

    Shapes: down (r, in·kh·kw), or (r', in) with a core; up (out, r); mid (r, r', kh, kw); bias (out,), Δb at strength
    1, the scale already in it. r may be 0.
    LoRA: Hu et al. 2021, arXiv:2106.09685. Tucker core (LoCon `use_tucker`): LyCORIS `functional/locon.py`. A bias
    beside `lora_B`: peft `tuners/lora/layer.py` (lora_bias), scaled as the product is.
    """

    down: Array
    up: Array
    mid: Array | None = None
    scale: float = 1.0
    kernel: tuple[int, ...] = ()
    bias: Array | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array], scale: float, kernel: Sequence[int]) -> Lora:
        """From tensors as stored: matrices or 4-D, kernels flattened or not."""
        down, up, mid, bias = tensors["down"], tensors["up"], tensors.get("mid"), tensors.get("up_bias")
        return cls(
            matrix(down),
            up.reshape(up.shape[0], up.shape[1]),
            mid,
            scale,
            tuple(kernel),
            None if bias is None else scale * wide(bias),
        )

    def to_lora(self, base: Base | None = None) -> Lora:
        if self.mid is None:
            return self
        return Lora(fold_core(self.mid, self.down), self.up, None, self.scale, self.kernel, self.bias)

    def rows(self, start: int, stop: int) -> Lora:
        bias = None if self.bias is None else self.bias[start:stop]
        return Lora(self.down, self.up[start:stop], self.mid, self.scale, self.kernel, bias)

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        plain = self.to_lora()
        delta = self.scale * (wide(plain.up) @ wide(plain.down))
        found = {"weight": delta.reshape(delta.shape[0], -1, *self.kernel) if self.kernel else delta}
        return found if self.bias is None else found | {"bias": wide(self.bias)}


def whole(delta: Array, scale: float = 1.0, kernel: Shape = (), bias: Array | None = None) -> Lora:
    """A matrix (out, in·kh·kw) as the product of itself and an identity, of rank min(out, in·kh·kw); float32."""
    values = delta.astype(np.float32)
    if values.shape[0] <= values.shape[1]:
        return Lora(values, np.eye(values.shape[0], dtype=np.float32), None, scale, kernel, bias)
    return Lora(np.eye(values.shape[1], dtype=np.float32), values, None, scale, kernel, bias)


def read_lora(stored: Stored) -> Lora:
    """A LoRA from its fields `down`, `up`, `mid` and `up_bias`."""
    return Lora.from_tensors(stored.tensors, stored.scale, stored.kernel)


def lora_form(shapes: Shapes, weight: Shape) -> Form:
    """Rank of the factors as they are written: the core's outer one where there is a core."""
    return Form(shapes["up"][1], bias="up_bias" in shapes)
