"""T-LoRA: a LoRA with learned singular values, less what it began as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
from lora_convert.errors import Unrepresentable

__all__ = ["Tlora", "read_tlora", "tlora_form"]


@dataclass(frozen=True)
class Tlora:
    """ΔW = scale · (p · diag(λ) · q − W_r), W_r the best approximation of rank r of the base weight W.

    Shapes: p (out, r), q (r, in), lambda (r,); linear layers and 1×1 convolutions. Every rank is active, as at
    timestep 0. LyCORIS `modules/tlora.py`: p, λ and q begin as the principal part of the base weight's SVD, which is
    subtracted and not saved. (Other beginnings, `sig_type` and `use_data_init`, leave no trace in the file.)
    T-LoRA: Soboleva et al. 2025, arXiv:2507.05964.
    """

    q: Array
    p: Array
    singular: Array
    scale: float = 1.0
    kernel: Shape = ()

    def to_lora(self, base: Base | None = None) -> Lora:
        weight = matrix(based(base, "what T-LoRA began as"))
        left, right = principal(weight, self.q.shape[0])
        up = np.concatenate([wide(self.p) * wide(self.singular), -left], axis=1)
        down = np.concatenate([wide(self.q), right])
        if up.shape[1] > min(weight.shape):
            return whole(up @ down, self.scale, self.kernel)
        return Lora(single(down), single(up), None, self.scale, self.kernel)

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        return self.to_lora(base).deltas()

    def rows(self, start: int, stop: int) -> Tlora:
        raise Unrepresentable("T-LoRA begins as a part of the whole weight, whose rows cannot be taken apart")


def principal(weight: Array, rank: int) -> tuple[Array, Array]:
    """Factors (out, r) and (r, in) of the best approximation of a matrix, from its smaller Gram matrix; float64."""
    if weight.shape[0] < weight.shape[1]:
        left, right = principal(weight.T, rank)
        return right.T, left.T
    _, vectors = np.linalg.eigh(weight.T @ weight)
    chosen = vectors[:, ::-1][:, :rank]
    return weight @ chosen, chosen.T


def read_tlora(stored: Stored) -> Tlora:
    """From the fields q, p and lambda."""
    q, p, singular = (stored.tensors[name] for name in ("q", "p", "lambda"))
    return Tlora(matrix(q), matrix(p), singular.reshape(-1), stored.scale, stored.kernel)


def tlora_form(shapes: Shapes, weight: Shape) -> Form:
    """Twice its rank: what it is, and what it began as."""
    return Form(min(2 * shapes["q"][0], *weight[:2]), needs_base=True)
