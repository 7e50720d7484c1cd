"""GLoRA: a low-rank matrix added, and the base weight multiplied by another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from lora_convert.converters.algorithms.adapter import (
    Array,
    Base,
    Form,
    Shape,
    Shapes,
    Stored,
    based,
    matrix,
    single,
    wide,
)
from lora_convert.converters.algorithms.lora import Lora, whole

__all__ = ["Glora", "glora_form", "read_glora"]


@dataclass(frozen=True)
class Glora:
    """ΔW = scale · (b1 · b2 + W · a1 · a2), the second product at every position of the kernel.

    Shapes: a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in·kh·kw); with a Tucker core bm (r, r, kh, kw): b2 (r, in).
    a1 and a2 may be missing. GLoRA: Chavan et al. 2023, arXiv:2306.07967; LyCORIS `modules/glora.py`, which before
    2.0 had both pairs the other way round.
    """

    added: Lora
    a1: Array | None = None
    a2: Array | None = None

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        added = self.added.deltas()["weight"]
        if self.a1 is None or self.a2 is None:
            return {"weight": added}
        weight = based(base, "the part of GLoRA that multiplies")
        mixed = np.einsum("oi...,ij->oj...", weight, wide(self.a1) @ wide(self.a2), optimize=True)
        return {"weight": added + self.added.scale * mixed}

    def rows(self, start: int, stop: int) -> Glora:
        return Glora(self.added.rows(start, stop), self.a1, self.a2)

    def to_lora(self, base: Base | None = None) -> Lora:
        """Rank r + r·kh·kw: W · a1 has a column for every position of the kernel, and a2 repeats on a diagonal."""
        plain = self.added.to_lora()
        if self.a1 is None or self.a2 is None:
            return plain
        weight = based(base, "the part of GLoRA that multiplies")
        positions = prod(weight.shape[2:])
        flat = weight.reshape(*weight.shape[:2], positions)
        columns = np.einsum("oik,ir->ork", flat, wide(self.a1))
        up = np.concatenate([single(plain.up), columns.reshape(flat.shape[0], -1).astype(np.float32)], axis=1)
        repeated = single(self.a2)[:, None, :, None] * np.eye(positions, dtype=np.float32)[None, :, None, :]
        down = np.concatenate([single(plain.down), repeated.reshape(up.shape[1] - plain.up.shape[1], -1)])
        if up.shape[1] > min(up.shape[0], down.shape[1]):
            return whole(np.einsum("or,rn->on", wide(up), wide(down)), plain.scale, plain.kernel)
        return Lora(down, up, None, plain.scale, plain.kernel)


def read_glora(stored: Stored) -> Glora:
    """From the fields b1, b2, bm, a1 and a2, in either order of the pairs."""
    pairs = [(stored.tensors.get(f"{name}1"), stored.tensors.get(f"{name}2")) for name in ("a", "b")]
    shapes = {name: values.shape for name, values in stored.tensors.items()}
    if is_reversed(shapes):
        pairs = [(second, first) for first, second in pairs]
    (a1, a2), (b1, b2) = pairs
    assert b1 is not None and b2 is not None
    added = Lora(matrix(b2), matrix(b1), stored.tensors.get("bm"), stored.scale, stored.kernel)
    return Glora(added, None if a1 is None else matrix(a1), None if a2 is None else matrix(a2))


def is_reversed(shapes: Shapes) -> bool:
    """Whether the pairs are in the order of LyCORIS 1.9: of the sizes at which they join, the rank is the smaller."""
    b1, b2 = shapes["b1"], shapes["b2"]
    now, before = b1[1] == b2[0], b2[1] == b1[0]
    return before and (not now or b2[1] < b1[1])


def glora_form(shapes: Shapes, weight: Shape) -> Form:
    """The additive part alone is a LoRA; the other adds its rank at every position of the kernel."""
    first, second = ("2", "1") if is_reversed(shapes) else ("1", "2")
    added = shapes[f"b{first}"][1]
    if f"a{second}" not in shapes or f"a{first}" not in shapes:
        return Form(added)
    rank = added + shapes[f"a{second}"][0] * prod(weight[2:])
    return Form(min(rank, weight[0], prod(weight[1:])), needs_base=True)
