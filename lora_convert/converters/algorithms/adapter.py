"""What every algorithm offers and is given.

Sizes: out and in are the rows and columns of the adapted weight, r a rank, kh × kw a convolution's kernel (absent for
linear layers), n the size of a norm's or a bias's vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_convert.errors import BaseNeeded

if TYPE_CHECKING:
    from lora_convert.converters.algorithms.lora import Lora

__all__ = ["Adapter", "Array", "Base", "Form", "Shape", "Shapes", "Stored", "based", "matrix", "single", "wide"]

Array = NDArray[Any]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

Base = Mapping[str, Array]
"""A module's own parameters, float32: `weight` (out, in[, kh, kw]), or (n,) of a norm; `bias` (n,) if it has one."""


class Adapter(Protocol):
    """What every algorithm offers."""

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        """The definition at strength 1: ΔW under `weight`, in the weight's shape, and Δb under `bias`; float64, dense.

        Either may be missing. Raises BaseNeeded where they depend on the base model's parameters and none are given.
        """
        ...

    def rows(self, start: int, stop: int) -> Adapter:
        """The adapter of the rows `start` to `stop` (exclusive) of the weight. Raises Unrepresentable if they mix."""
        ...

    def to_lora(self, base: Base | None = None) -> Lora:
        """The same change as one product of two factors, exactly. Raises Unrepresentable or BaseNeeded, saying why."""
        ...


@dataclass(frozen=True, slots=True)
class Form:
    """What can be said of an adapter before its values are read.

    `rank` is that of `to_lora`'s factors; None if ΔW has no low-rank form, only truncated ones. `weight` and `bias`
    say what it changes; `magnitude` that it is a DoRA per output, which stays one (`rank` is then its inner adapter's);
    `needs_base` that its deltas depend on the base model's weight (False for DoRA per output, which stays as it is).
    """

    rank: int | None
    weight: bool = True
    bias: bool = False
    magnitude: bool = False
    needs_base: bool = False

    @property
    def changes_nothing(self) -> bool:
        """Whether the shapes alone say so: rank 0, with no bias or magnitude beside it."""
        return self.rank == 0 and not (self.bias or self.magnitude)


@dataclass(frozen=True)
class Stored:
    """A module's tensors as stored, by field, and what else their meaning depends on.

    `shape` is that of the whole weight that they change, (out, in[, kh, kw]) or (n,). `scale` is the factor of the
    product; `alpha` is as stored, for algorithms in which it means something else; `spelling` says whose names the
    tensors have, for parameters that two trainers call the same and use differently.
    """

    tensors: Mapping[str, Array]
    shape: Shape
    scale: float = 1.0
    alpha: float | None = None
    spelling: str = ""

    @property
    def kernel(self) -> Shape:
        """Its kernel's (kh, kw), empty for linear layers."""
        return self.shape[2:]


def single(values: Array) -> Array:
    """As float32, which holds every narrower dtype exactly; float32 and float64 as they are."""
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)


def wide(values: Array) -> Array:
    """As float64."""
    return values.astype(np.float64)


def matrix(values: Array) -> Array:
    """A convolution's weight as a matrix (out, in·kh·kw)."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


def based(base: Base | None, what: str) -> Array:
    """The base weight as float64. Raises BaseNeeded if there is none; `what` begins its sentence."""
    if base is None or "weight" not in base:
        raise BaseNeeded(f"{what} depends on the base model's weights, and none were given")
    return wide(base["weight"])
