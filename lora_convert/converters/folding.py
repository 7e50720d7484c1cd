"""Folding a scale into the two factors of a product with the least error.

A power of two costs nothing as long as no value leaves the dtype's normal range, so it is divided between the factors
where that loses least; what is not a power of two is multiplied into one of them in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_convert.converters.values import BITS, magnitudes, peak, to_half

__all__ = ["Split", "rescaled", "split_scale"]

Array = NDArray[Any]
DType = np.dtype[Any]

_TABLE_FROM = 1 << 13
_SAMPLE = 1 << 12
_ANYWHERE = 1 << 11
_STEPS = (2.0, 0.5, 4.0, 0.25, 8.0, 0.125)
_ROUNDED = 0.23  # of eps: what rounding a matrix of uniformly distributed mantissas costs, with some room
_GAIN = 0.98  # a more intrusive split has to be better than an estimate's noise


@dataclass(frozen=True, slots=True)
class Split:
    """Factors for the two matrices, and the relative error of their product that rounding will cause (estimated)."""

    down: float
    up: float
    error: float = 0.0


def _finfo(dtype: DType) -> Any:
    import ml_dtypes

    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def _named(name: str) -> DType:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


def _sample(values: Array) -> Array:
    """Evenly spaced elements, as float64."""
    flat = values.reshape(-1)
    return flat[:: max(1, flat.size // _SAMPLE)].astype(np.float64)


def _stored(values: Array, dtype: DType) -> Array:
    """The values, as float64, that remain when they are stored in a dtype."""
    with np.errstate(over="ignore"):
        return np.asarray(values.astype(dtype).astype(np.float64))


def _errors(values: Array, factor: float, dtype: DType) -> Array:
    return np.asarray(_stored(values * factor, dtype) / factor - values)


@lru_cache(maxsize=32)
def _squared_errors(source: str, target: str, factor: float) -> Array:
    """The squared errors of all magnitudes of a dtype of at most 16 bits, to be looked up by their bits."""
    dtype = _named(source)
    codes = np.arange(1 << (8 * dtype.itemsize - 1)).astype(BITS[dtype.itemsize])
    with np.errstate(invalid="ignore"):  # infinities and NaN are among them, but never looked up
        return np.asarray(np.square(_errors(codes.view(dtype).astype(np.float64), factor, _named(target))))


class _Factor:
    """One matrix and what multiplying it costs, relative to its norm (squared).

    `reach` is the largest power of two, as an exponent, that it may be divided by.
    """

    def __init__(self, values: Array, dtype: DType, reach: int) -> None:
        self.dtype = dtype
        self.same = values.dtype == dtype
        self._size = max(1, values.size)
        self._source = values.dtype
        self._peak = peak(values)
        self._sample = _sample(values)
        self._weight = values.size / max(1, self._sample.size)
        self._values, self._exponents = values, reach + 1
        self._norm = float(np.square(self._sample).sum()) * self._weight
        if not self._norm:
            self._norm = float(np.square(self._small.view(self._source).astype(np.float64)).sum())

    @cached_property
    def _small(self) -> Array:
        """The magnitudes that a power of two can round, as bits."""
        return self._population(magnitudes(self._values), self._exponents)

    def levels(self) -> tuple[float, float]:
        """The norm per element in smallest normal numbers of the dtype, and the peak in largest numbers."""
        limits = _finfo(self.dtype)
        return math.sqrt(self._norm / self._size) / float(limits.tiny), self._peak / float(limits.max)

    def _population(self, bits: Array, exponents: int) -> Array:
        """The magnitudes, as bits, that a power of two can round.

        Within one dtype these are the `exponents` smallest binades. Where the dtype changes, every value is rounded.
        """
        if self.same and self._source.itemsize > 1:
            return np.asarray(bits[bits < (exponents << _finfo(self._source).nmant)])
        return bits

    def _squared_error(self, factor: float) -> float:
        """By what the values differ after being multiplied and stored, seen before the multiplication."""
        if abs(math.frexp(factor)[0]) == 0.5:
            if self._source.itemsize <= 2:
                errors = _squared_errors(self._source.name, self.dtype.name, abs(factor))
                return float(errors.take(self._small).sum())
            if self.same:
                small = self._small.view(self._source).astype(np.float64)
                return float(np.square(_errors(small, factor, self.dtype)).sum())
        return float(np.square(_errors(self._sample, factor, self.dtype)).sum()) * self._weight

    def cost(self, factor: float) -> float:
        """Squared relative rounding error of the matrix times `factor`; infinite if a value overflows."""
        if factor == 1.0 and self.same:
            return 0.0
        if not np.isfinite(_stored(np.array(self._peak * factor), self.dtype)):
            return math.inf
        if not self._norm:
            return 0.0
        return self._squared_error(factor) / self._norm


def _inside(exponent: int) -> list[int]:
    """Exponents for the first matrix that shift no more than asked, the least intrusive first: one matrix untouched."""
    return list(dict.fromkeys([0, exponent, *range(0, exponent, 1 if exponent > 0 else -1)]))


def _level(first: _Factor, second: _Factor, exponent: int) -> list[int]:
    """Exponents for the first matrix that bring both to about the same level of their dtypes, by norm and by peak.

    Equal norms lose least where both have subnormal values, equal peaks overflow last.
    """
    pairs = zip(first.levels(), second.levels(), strict=True)
    centres = [round((exponent + math.log2(above / below)) / 2) for below, above in pairs if below and above]
    near = dict.fromkeys(shift for centre in centres for shift in (centre, centre - 1, centre + 1))
    return [shift for shift in near if abs(shift) < 1000 and abs(exponent - shift) < 1000]


def _ways(odd: float, exponent: int, shifts: Sequence[int]) -> Iterator[tuple[float, float]]:
    """Factors of odd · 2^exponent, where the first has one of the given exponents."""
    for shift in shifts:
        yield math.ldexp(1.0, shift), math.ldexp(odd, exponent - shift)
    if abs(odd) != 1.0:
        for shift in shifts:
            yield math.ldexp(odd, shift), math.ldexp(1.0, exponent - shift)


def split_scale(down: Array, up: Array, scale: float, down_dtype: DType, up_dtype: DType) -> Split:
    """How to divide `scale` between two matrices that will be stored in the given dtypes, with the least error.

    Returns factors whose product is `scale`. The error is infinite if every way overflows. A power of two needs no more
    than its own shifts within one dtype; where values are rounded anyway and some would be subnormal, one matrix may
    also be lifted and the other lowered.
    """
    if scale == 0.0:
        return Split(1.0, 0.0)
    mantissa, exponent = math.frexp(scale)
    odd, exponent = 2.0 * mantissa, exponent - 1
    pairs = ((down.dtype, down_dtype), (up.dtype, up_dtype))
    changes = any(source != target for source, target in pairs)
    narrowed = sum(_finfo(source).nmant > _finfo(target).nmant for source, target in pairs)
    first, second = _Factor(down, down_dtype, abs(exponent)), _Factor(up, up_dtype, abs(exponent))
    ways, worst = _ways(odd, exponent, _inside(exponent)), Split(1.0, scale, math.inf)
    eps = min(float(_finfo(dtype).eps) for dtype in (down_dtype, up_dtype))
    unavoidable = _ROUNDED * eps * math.sqrt(narrowed)
    best = _least(first, second, ways, worst, unavoidable)
    if best.error > (unavoidable if changes else eps / 2):
        first, second = _Factor(down, down_dtype, _ANYWHERE), _Factor(up, up_dtype, _ANYWHERE)
        best = _climb(first, second, _least(first, second, _ways(odd, exponent, _level(first, second, exponent)), best))
    return best


def _climb(first: _Factor, second: _Factor, best: Split) -> Split:
    """The split from which a further shift between the matrices gains nothing."""
    while True:
        better = _least(first, second, ((best.down * step, best.up / step) for step in _STEPS), best)
        if better is best:
            return best
        best = better


def _least(
    first: _Factor, second: _Factor, ways: Iterable[tuple[float, float]], best: Split, enough: float = 0.0
) -> Split:
    """The way of least error, or the first one with no more than `enough`."""
    for down, up in ways:
        error = math.sqrt(first.cost(down) + second.cost(up))
        if error < _GAIN * best.error:
            best = Split(down, up, error)
        if error <= enough:
            break
    return best


@lru_cache(maxsize=64)
def _table(source: str, target: str, factor: float) -> Array:
    """Every value of a 16-bit dtype times the factor, as bits of the target dtype."""
    values = np.arange(1 << 16, dtype=np.uint16).view(_named(source))
    return _multiplied(values, factor, _named(target)).view(BITS[_named(target).itemsize])


def _multiplied(values: Array, factor: float, dtype: DType) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        power = abs(math.frexp(factor)[0]) == 0.5 and 2.0**-60 <= abs(factor) <= 2.0**60
        if power and values.dtype == np.float32 and dtype == np.float16:  # what float32 loses is nothing in float16
            return to_half(values if factor == 1.0 else values * np.float32(factor))
        if factor == 1.0:
            return np.asarray(values.astype(dtype))
        return np.asarray((values.astype(np.float64) * factor).astype(dtype))


def rescaled(values: Array, factor: float, dtype: DType) -> Array:
    """The array times a factor in another or the same dtype: multiplied in float64, rounded once.

    Large 16-bit arrays go through a table of all 65,536 products, which costs a tenth of the conversions.
    """
    if factor == 1.0 and values.dtype == dtype:
        return values
    if values.dtype.itemsize != 2 or values.size < _TABLE_FROM:
        return _multiplied(values, factor, dtype)
    table = _table(values.dtype.name, dtype.name, factor)
    return np.asarray(table.take(values.view(np.uint16)).view(dtype))
