"""Questions about an array's values, answered on the bits of its floats, much faster than arithmetic on halves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BITS", "count_zeros", "is_finite", "is_zero", "magnitudes", "peak"]

Array = NDArray[Any]

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Bytes of a float -> the unsigned integer of that size."""


def magnitudes(values: Array) -> Array:
    """The bits without the sign, flat; as integers they are ordered as the magnitudes are, infinity and NaN last."""
    bits = values.reshape(-1).view(BITS[values.dtype.itemsize])
    return np.asarray(bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1))


def peak(values: Array) -> float:
    """The largest magnitude; infinite or NaN if a value is."""
    bits = values.reshape(-1).view(BITS[values.dtype.itemsize])
    sign = 1 << (8 * bits.itemsize - 1)
    # as signed integers the positive floats win, as unsigned ones the negative floats: two passes, nothing copied
    positive = int(bits.view(f"i{bits.itemsize}").max(initial=0))
    negative = int(bits.max(initial=0)) & (sign - 1)
    return float(np.array(max(positive, negative), bits.dtype).view(values.dtype)[()])


def is_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(np.isfinite(peak(values)))


def is_zero(values: Array) -> bool:
    """Whether every value is zero (also for an empty array)."""
    return peak(values) == 0.0


def count_zeros(values: Array) -> int:
    """Number of zeros of either sign."""
    return values.size - int(np.count_nonzero(magnitudes(values)))
