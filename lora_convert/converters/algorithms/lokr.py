"""LoKr: the Kronecker product of two matrices, either of which may be factorised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from lora_convert.converters.algorithms.adapter import (
    Adapter,
    Array,
    Base,
    Form,
    Shape,
    Shapes,
    Stored,
    matrix,
    single,
    wide,
)
from lora_convert.converters.algorithms.lora import Lora, dense_product, fold_core
from lora_convert.errors import Unrepresentable

__all__ = ["Lokr", "Side", "kronecker", "lokr_form", "read_lokr"]


def kronecker(first: Array, second: Array) -> Array:
    """Kronecker product of two matrices: (a, b) and (c, d) make (a·c, b·d)."""
    product = first[:, None, :, None] * second[None, :, None, :]
    return product.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])


@dataclass(frozen=True)
class Side:
    """One factor of the Kronecker product: a whole matrix, or left (rows, r) · right (r, columns)."""

    left: Array
    right: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, a kernel's positions among the columns."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def is_low_rank(self) -> bool:
        """Whether its factors are no larger than an identity beside the whole matrix would be."""
        return self.right is not None and self.right.shape[0] <= min(self.shape)

    def dense(self) -> Array:
        """The matrix, float64 where it had to be multiplied."""
        return self.left if self.right is None else dense_product(self.left, self.right)

    def factors(self) -> tuple[Array, Array]:
        """Two factors of the least rank that the shapes allow; one of them is an identity if the matrix is whole."""
        if self.right is not None and self.is_low_rank:
            return single(self.left), single(self.right)
        whole, (rows, columns) = single(self.dense()), self.shape
        if rows <= columns:
            return np.eye(rows, dtype=whole.dtype), whole
        return whole, np.eye(columns, dtype=whole.dtype)


@dataclass(frozen=True)
class Lokr:
    """ΔW = scale · w1 ⊗ w2, each of them whole or a product w_a · w_b.

    Shapes: w1 (a, b), w2 (c, d[, kh, kw]), out = a·c, in = b·d; w1_a (a, r), w1_b (r, b), w2_a (c, r),
    w2_b (r, d·kh·kw). With a Tucker core t2 (r, r, kh, kw): w2_a (r, c), w2_b (r, d).
    LyCORIS `functional/lokr.py` and `modules/lokr.py`; peft `tuners/lokr/layer.py`.
    """

    first: Side
    second: Side
    scale: float = 1.0
    kernel: Shape = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of ΔW as a matrix (out, in·kh·kw)."""
        (rows_1, columns_1), (rows_2, columns_2) = self.first.shape, self.second.shape
        return rows_1 * rows_2, columns_1 * columns_2

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        delta = self.scale * kronecker(wide(self.first.dense()), wide(self.second.dense()))
        return {"weight": delta.reshape(delta.shape[0], -1, *self.kernel) if self.kernel else delta}

    def rows(self, start: int, stop: int) -> Adapter:
        height = self.second.shape[0]
        if start % height or stop % height:
            return self.to_lora().rows(start, stop)
        part = Side(self.first.left[start // height : stop // height], self.first.right)
        return Lokr(part, self.second, self.scale, self.kernel)

    def to_lora(self, base: Base | None = None) -> Lora:
        """(A₁ · B₁) ⊗ (A₂ · B₂) = (A₁ ⊗ A₂) · (B₁ ⊗ B₂), a whole matrix being the product with an identity."""
        if self.first.right is None and self.second.right is None:
            raise Unrepresentable("both factors of its Kronecker product are whole matrices, which have no low rank")
        (left_1, right_1), (left_2, right_2) = self.first.factors(), self.second.factors()
        return Lora(kronecker(right_1, right_2), kronecker(left_1, left_2), None, self.scale, self.kernel)


def read_lokr(stored: Stored) -> Lokr:
    """From the fields w1 or w1_a and w1_b, w2 or w2_a and w2_b, and t2 if it is a Tucker one."""
    first, second = (_side(stored.tensors, name) for name in ("w1", "w2"))
    return Lokr(first, second, stored.scale, stored.kernel)


def _side(tensors: Mapping[str, Array], name: str) -> Side:
    if name in tensors:
        return Side(matrix(tensors[name]))
    left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
    core = tensors.get("t2") if name == "w2" else None
    return Side(matrix(left), matrix(right)) if core is None else Side(left.T, fold_core(core, right))


def lokr_form(shapes: Shapes, weight: Shape) -> Form:
    """The product of both sides' ranks; none if both are whole."""
    if "w1" in shapes and "w2" in shapes:
        return Form(None)
    return Form(_side_rank(shapes, "w1") * _side_rank(shapes, "w2"))


def _side_rank(shapes: Shapes, name: str) -> int:
    if name in shapes:
        return min(shapes[name][0], prod(shapes[name][1:]))
    left, right = shapes[f"{name}_a"], shapes[f"{name}_b"]
    core = shapes.get("t2") if name == "w2" else None
    if core:
        return min(left[1], left[0], right[1] * prod(core[2:]))
    return min(left[0], right[0], prod(right[1:]))
