"""OFT and BOFT: rotations of the base weight's rows, and OneTrainer's of its columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_convert.converters.algorithms.adapter import Array, Base, Form, Shape, Shapes, Stored, based, matrix, wide
from lora_convert.converters.algorithms.lora import Lora
from lora_convert.errors import Unrepresentable

__all__ = ["Boft", "InputOft", "Oft", "oft_form", "read_boft", "read_oft"]

_REASON = "it rotates the whole base weight, and such a change has no low rank"


def cayley(blocks: Array, constraint: float) -> Array:
    """R = (I + Q)(I − Q)⁻¹ with Q = blocks − blocksᵀ, made shorter if ‖Q‖ of all blocks exceeds the constraint.

    Shape: (…, n, n). A constraint of 0 is none. LyCORIS `functional/diag_oft.py` (get_r), Kohya `networks/oft.py`.
    """
    skew = wide(blocks) - wide(blocks).swapaxes(-1, -2)
    length = float(np.linalg.norm(skew)) + 1e-8
    if 0 < constraint < length:
        skew = skew * (constraint / length)
    identity = np.eye(skew.shape[-1])
    return np.asarray((identity + skew) @ np.linalg.inv(identity - skew))


def neumann(triangles: Array) -> Array:
    """R ≈ (I + Q)(I − Q)⁻¹ as I + 2Q + 2Q² + 2Q³ + Q⁴, from the upper triangles (blocks, n·(n−1)/2) of Q.

    peft `tuners/oft/layer.py` (use_cayley_neumann, five terms), which OneTrainer's OFT_2 follows.
    """
    size = block_size(triangles.shape[1])
    skew = np.zeros((triangles.shape[0], size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = wide(triangles)
    skew = skew - skew.swapaxes(1, 2)
    square = skew @ skew
    return np.asarray(np.eye(size) + 2 * skew + 2 * square + 2 * (square @ skew) + square @ square)


def block_size(elements: int) -> int:
    """N of a triangle with n·(n−1)/2 elements."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2


@dataclass(frozen=True)
class Oft:
    """W' = rescale · Rᵀ · W, R a diagonal of blocks.

    Shapes: rotation (blocks, n, n) with blocks · n = out; rescale (out,).
    OFT: Qiu et al. 2023, arXiv:2306.07280; LyCORIS `functional/diag_oft.py`, Kohya `networks/oft.py`. The bias stays.
    """

    rotation: Array
    rescale: Array | None = None

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        weight = based(base, "what OFT rotates")
        count, size, _ = self.rotation.shape
        rotated = self.rotation.swapaxes(1, 2) @ weight.reshape(count, size, -1)
        return {"weight": rescaled(rotated.reshape(weight.shape), self.rescale) - weight}

    def rows(self, start: int, stop: int) -> Oft:
        size = self.rotation.shape[1]
        if start % size or stop % size:
            raise Unrepresentable("its rotation mixes rows of several modules")
        rescale = None if self.rescale is None else self.rescale[start:stop]
        return Oft(self.rotation[start // size : stop // size], rescale)

    def to_lora(self, base: Base | None = None) -> Lora:
        raise Unrepresentable(_REASON)


@dataclass(frozen=True)
class Boft:
    """W' = rescale · Rₘ · … · R₁ · W, every Rᵢ a diagonal of blocks after a butterfly's reordering of the rows.

    Shapes: rotation (m, blocks, n, n) with blocks · n = out; rescale (out,).
    BOFT: Liu et al. 2023, arXiv:2311.06243; LyCORIS `functional/boft.py`. The bias stays.
    """

    rotation: Array
    rescale: Array | None = None

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        weight = based(base, "what BOFT rotates")
        stages, count, size, _ = self.rotation.shape
        rotated = matrix(weight)
        for stage in range(stages):
            wing = 2**stage * size // 2  # rows that are this far apart are mixed
            rows = np.arange(weight.shape[0]).reshape(-1, 2, wing).swapaxes(1, 2).reshape(-1)
            mixed = self.rotation[stage] @ rotated[rows].reshape(count, size, -1)
            rotated = np.empty_like(rotated)
            rotated[rows] = mixed.reshape(rotated.shape)
        return {"weight": rescaled(rotated.reshape(weight.shape), self.rescale) - weight}

    def rows(self, start: int, stop: int) -> Boft:
        raise Unrepresentable("its rotation mixes all rows")

    def to_lora(self, base: Base | None = None) -> Lora:
        raise Unrepresentable(_REASON)


@dataclass(frozen=True)
class InputOft:
    """W' = W · R, R a diagonal of blocks over the inputs and the kernel's positions.

    Shape: rotation (blocks, n, n) with blocks · n = in·kh·kw, or one block for all. The bias stays.
    """

    rotation: Array

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        weight = based(base, "what OFT rotates")
        blocks = weight.reshape(weight.shape[0], -1, self.rotation.shape[1]).swapaxes(0, 1)
        return {"weight": (blocks @ self.rotation).swapaxes(0, 1).reshape(weight.shape) - weight}

    def rows(self, start: int, stop: int) -> InputOft:
        return self

    def to_lora(self, base: Base | None = None) -> Lora:
        raise Unrepresentable(_REASON)


def rescaled(weight: Array, rescale: Array | None) -> Array:
    """Every row times its own factor, if there are factors."""
    return weight if rescale is None else weight * wide(rescale).reshape(-1, *(1,) * (weight.ndim - 1))


def read_oft(stored: Stored) -> Oft | InputOft:
    """From the fields `blocks`, `diagonal` or `rotation`, `rescale`, and the alpha, which is a constraint per output.

    `diagonal` (`oft_diag`) is R − I in LyCORIS 1.9 and R in its successor's beginnings: whichever it is nearer to.
    """
    tensors = stored.tensors
    if "rotation" in tensors:
        return _read_input(stored)
    rescale = tensors["rescale"].reshape(-1) if "rescale" in tensors else None
    if "blocks" in tensors:
        return Oft(cayley(tensors["blocks"], (stored.alpha or 0.0) * stored.shape[0]), rescale)
    diagonal = wide(tensors["diagonal"])
    is_rotation = float(np.trace(diagonal, axis1=1, axis2=2).mean()) > diagonal.shape[1] / 2
    return Oft(diagonal if is_rotation else diagonal + np.eye(diagonal.shape[1]), rescale)


def _read_input(stored: Stored) -> InputOft:
    """OneTrainer's OFT_2 and peft's OFT: a linear layer's inputs become x · R, which makes the weight W · Rᵀ.

    OneTrainer multiplies a convolution's weight by R itself. Raises Unrepresentable for a larger convolution of peft's.
    """
    rotation = neumann(stored.tensors["rotation"])
    if math.prod(stored.shape[1:]) % rotation.shape[1]:
        raise Unrepresentable(f"its blocks of {rotation.shape[1]} do not divide the module's inputs")
    if len(stored.shape) == 4 and stored.spelling != "peft":
        return InputOft(rotation)
    if len(stored.shape) == 4 and stored.shape[2:] != (1, 1):
        raise Unrepresentable("peft's OFT of a convolution sums overlapping patches, which is no change of its weight")
    return InputOft(rotation.swapaxes(1, 2))


def read_boft(stored: Stored) -> Boft:
    """From the fields `blocks` and `rescale`, and the alpha, which is a constraint per output."""
    rescale = stored.tensors["rescale"].reshape(-1) if "rescale" in stored.tensors else None
    return Boft(cayley(stored.tensors["blocks"], (stored.alpha or 0.0) * stored.shape[0]), rescale)


def oft_form(shapes: Shapes, weight: Shape) -> Form:
    """Nothing of low rank, for OFT and BOFT alike."""
    return Form(None, needs_base=True)
