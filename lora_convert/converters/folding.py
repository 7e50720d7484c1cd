"""Folding a scale into the two factors of a product with the least error.

A power of two costs nothing as long as no value leaves the dtype's normal range, so it is divided between the factors
where that loses least; what is not a power of two is multiplied into one of them in float32 and rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_convert.converters.values import BITS, magnitudes, peak

__all__ = ["Split", "rescaled", "split_scale"]

Array = NDArray[Any]
DType = np.dtype[Any]

_TABLE_FROM = 1 << 16
_SAMPLE = 1 << 12


@dataclass(frozen=True, slots=True)
class Split:
    """Factors for the two matrices, and the relative error of their product that rounding will cause (estimated)."""

    down: float
    up: float
    error: float = 0.0


def _finfo(dtype: DType) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def _sample(values: Array) -> Array:
    """Evenly spaced elements, as float64."""
    flat = values.reshape(-1)
    return flat[:: max(1, flat.size // _SAMPLE)].astype(np.float64)


def _rounding(values: Array, factor: float, dtype: DType) -> Array:
    """The error that each value suffers when it is multiplied and rounded to `dtype`."""
    exact = values * factor
    with np.errstate(over="ignore"):
        return np.asarray(exact.astype(dtype).astype(np.float64) - exact)


class _Factor:
    """One matrix and what multiplying it costs, relative to its norm (squared)."""

    def __init__(self, values: Array, dtype: DType, exponent: int) -> None:
        self.dtype = dtype
        self.same = values.dtype == dtype
        self._peak = peak(values)
        self._sample = _sample(values)
        self._weight = values.size / max(1, self._sample.size)
        self._values, self._counts = self._population(values, abs(exponent) + 1)

    def _population(self, values: Array, exponents: int) -> tuple[Array, Array]:
        """The values that a power of two can round, with how often they occur.

        Within one dtype these are the magnitudes below the `exponents` smallest binades. Where the dtype changes,
        every value is rounded: all codes of a short dtype, else a sample.
        """
        dtype = values.dtype
        if not self.same and dtype.itemsize > 2:
            return self._sample, np.full(self._sample.size, self._weight)
        bits = magnitudes(values)
        if self.same and dtype.itemsize > 1:
            bits = bits[bits < (exponents << _finfo(dtype).nmant)]
        if dtype.itemsize > 2:
            codes, counts = np.unique(bits, return_counts=True)
        else:
            histogram = np.bincount(bits, minlength=1)
            codes = np.flatnonzero(histogram)
            counts = histogram[codes]
        return codes.astype(bits.dtype).view(dtype).astype(np.float64), counts.astype(np.float64)

    def cost(self, factor: float) -> float:
        """Squared relative rounding error of the matrix times `factor`; infinite if a value overflows."""
        if factor == 1.0 and self.same:
            return 0.0
        if self._peak * abs(factor) > float(_finfo(self.dtype).max):
            return math.inf
        mantissa, _ = math.frexp(factor)
        norm = float(np.square(self._sample * factor).sum()) * self._weight
        if not norm:
            norm = float((np.square(self._values * factor) * self._counts).sum())
        if not norm:
            return 0.0
        if abs(mantissa) == 0.5:
            errors, counts = _rounding(self._values, factor, self.dtype), self._counts
            return float((np.square(errors) * counts).sum()) / norm
        return float(np.square(_rounding(self._sample, factor, self.dtype)).sum()) * self._weight / norm


def _splits(scale: float) -> list[tuple[float, float]]:
    """Ways to write the scale as a product, the least intrusive first: one matrix untouched, then both shifted."""
    mantissa, exponent = math.frexp(scale)
    odd, exponent = 2.0 * mantissa, exponent - 1
    shifts = range(0, exponent, 1 if exponent > 0 else -1)
    powers = [(0, exponent), (exponent, 0), *((shift, exponent - shift) for shift in shifts if shift)]
    ways = [(math.ldexp(1.0, down), math.ldexp(odd, up)) for down, up in powers]
    if abs(odd) != 1.0:
        ways += [(math.ldexp(odd, down), math.ldexp(1.0, up)) for down, up in powers]
    return list(dict.fromkeys(ways))


def split_scale(down: Array, up: Array, scale: float, down_dtype: DType, up_dtype: DType) -> Split:
    """How to divide `scale` between two matrices that will be stored in the given dtypes, with the least error.

    Returns factors whose product is `scale`. The error is infinite if every way overflows.
    """
    if scale == 0.0:
        return Split(1.0, 0.0)
    _, exponent = math.frexp(scale)
    first, second = _Factor(down, down_dtype, exponent - 1), _Factor(up, up_dtype, exponent - 1)
    best = Split(1.0, scale, math.inf)
    for down_factor, up_factor in _splits(scale):
        error = math.sqrt(first.cost(down_factor) + second.cost(up_factor))
        if error < best.error:
            best = Split(down_factor, up_factor, error)
        if not error:
            break
    return best


@lru_cache(maxsize=64)
def _table(source: str, target: str, factor: float) -> Array:
    """Every value of a 16-bit dtype times the factor, as bits of the target dtype."""
    values = np.arange(1 << 16, dtype=np.uint16).view(_named(source))
    return _multiplied(values, factor, _named(target)).view(BITS[_named(target).itemsize])


def _named(name: str) -> DType:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _multiplied(values: Array, factor: float, dtype: DType) -> Array:
    wide: DType = np.dtype(np.float64 if values.dtype.itemsize > 2 or dtype.itemsize > 2 else np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        product: Array = np.multiply(values.astype(wide), factor, dtype=wide)
        return product.astype(dtype)


def rescaled(values: Array, factor: float, dtype: DType) -> Array:
    """The array times a factor in another or the same dtype: multiplied in float32 or wider, rounded once.

    Large 16-bit arrays go through a table of all 65,536 products, which costs a tenth of the conversions.
    """
    if factor == 1.0 and values.dtype == dtype:
        return values
    if values.dtype.itemsize != 2 or values.size < _TABLE_FROM:
        return _multiplied(values, factor, dtype)
    table = _table(values.dtype.name, dtype.name, factor)
    return np.asarray(table[values.view(np.uint16)].view(dtype))
