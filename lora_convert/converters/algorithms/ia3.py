"""(IA)³: a learned factor for every row or column of the base weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_convert.converters.algorithms.adapter import Array, Base, Form, Shape, Shapes, Stored, based, wide
from lora_convert.converters.algorithms.lora import Lora
from lora_convert.errors import Unrepresentable

__all__ = ["Ia3", "ia3_form", "read_ia3"]


@dataclass(frozen=True)
class Ia3:
    """ΔW = W · weight along the inputs (`on_input`) or the outputs; `with_bias`: Δb = b · weight too.

    Shapes: weight (in,) or (out,). (IA)³: Liu et al. 2022, arXiv:2205.05638. LyCORIS `modules/ia3.py` stores the
    factor less 1 and leaves the bias alone (1.9 scaled it with the outputs; the file does not say which it was).
    peft `tuners/ia3/layer.py` stores the factor itself (`ia3_l`) and scales the bias with the outputs.
    """

    weight: Array
    on_input: bool
    with_bias: bool = False

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        values = based(base, "what (IA)³ scales")
        along = (1, -1) if self.on_input else (-1, 1)
        found = {"weight": values * wide(self.weight).reshape(*along, *(1,) * (values.ndim - 2))}
        if self.with_bias and not self.on_input and base is not None and "bias" in base:
            found["bias"] = wide(base["bias"]) * wide(self.weight)
        return found

    def rows(self, start: int, stop: int) -> Ia3:
        return self if self.on_input else Ia3(self.weight[start:stop], False, self.with_bias)

    def to_lora(self, base: Base | None = None) -> Lora:
        raise Unrepresentable("(IA)³ scales every row or column of the base weight, and such a change has no low rank")


def read_ia3(stored: Stored) -> Ia3:
    """From LyCORIS' fields `weight` and `on_input`, or peft's `factors`. Raises Unrepresentable for unclear ones."""
    if "factors" not in stored.tensors:
        weight, on_input = stored.tensors["weight"].reshape(-1), bool(stored.tensors["on_input"].reshape(-1)[0])
        if len(weight) != stored.shape[on_input]:
            raise Unrepresentable(f"its {len(weight)} factors are not those of the side that it names")
        return Ia3(weight, on_input)
    factors = stored.tensors["factors"]
    rows, columns = stored.shape[:2]
    if factors.ndim == 4 and rows == columns:
        raise Unrepresentable("peft's (IA)³ does not say whether it scales this convolution's inputs or outputs")
    on_input = factors.shape[0] == 1 and factors.shape[1] == columns
    return Ia3(wide(factors).reshape(-1) - np.float64(1), on_input, with_bias=True)


def ia3_form(shapes: Shapes, weight: Shape) -> Form:
    """Nothing of low rank; the bias changes too in what peft wrote."""
    return Form(None, bias="factors" in shapes, needs_base=True)
