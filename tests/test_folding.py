"""Splitting a scale between two matrices: brute force over all splits finds none that is better."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_convert.converters.folding import rescaled, split_scale

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
BF16, E4M3, E5M2 = (
    np.dtype(kind) for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
)  # fmt: skip
SAME = [F16, BF16, F32]
CHANGES = [(F32, F16), (BF16, F16), (F16, BF16), (F32, BF16), (E4M3, F16), (E5M2, F16), (F64, F32), (F16, F32)]
POWERS = [math.ldexp(sign, exponent) for exponent in range(-14, 12) for sign in (1.0, -1.0)]
OTHERS = [20000 / 64, 1 / 3, -1 / 3, 0.7, 1.5, 2.0**-30 / 3, 2.0**40, 3.0 * 2**-60, 1e-100, 1e30]


@st.composite
def matrices(draw: st.DrawFn, dtype: np.dtype, rows: int, columns: int) -> np.ndarray:
    """Finite values of random signs, with magnitudes from a random part of the dtype's range, some zero."""
    limits = ml_dtypes.finfo(dtype)
    lowest, highest = max(-160, limits.minexp - limits.nmant), min(150, limits.maxexp - 1)
    low = draw(st.integers(lowest, highest))
    high = draw(st.integers(low, min(highest, low + draw(st.sampled_from([1, 8, 40])))))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    values = random.uniform(-2, 2, (rows, columns)) * 2.0 ** random.integers(low, high, (rows, columns), endpoint=True)
    values[random.random((rows, columns)) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0.0
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    stored[~np.isfinite(stored.astype(np.float64))] = 0.0
    return stored


@st.composite
def problems(draw: st.DrawFn, changes: list[tuple[np.dtype, np.dtype]], scales: list[float]) -> tuple:
    (before, after), (before_up, after_up) = draw(st.sampled_from(changes)), draw(st.sampled_from(changes))
    rank = draw(st.integers(1, 3))
    down, up = draw(matrices(before, rank, draw(st.integers(0, 30)))), draw(matrices(before_up, 20, rank))
    return down, up, draw(st.sampled_from(scales)), after, after_up


def true_error(values: np.ndarray, factor: float, dtype: np.dtype) -> float:
    """Relative rounding error of one matrix; infinite on overflow."""
    wide = values.astype(np.float64)
    stored = rescaled(values, factor, dtype).astype(np.float64)
    if not np.isfinite(stored).all():
        return math.inf
    norm = np.linalg.norm(wide)
    return float(np.linalg.norm(stored / factor - wide) / norm) if norm else 0.0


def all_splits(scale: float) -> list[tuple[float, float]]:
    mantissa, exponent = math.frexp(scale)
    ways = [(shift, exponent - shift) for shift in range(min(0, exponent) - 180, max(0, exponent) + 180)]
    return [(2.0**first, mantissa * 2.0**second) for first, second in ways] + [
        (mantissa * 2.0**first, 2.0**second) for first, second in ways
    ]


def least_error(down: np.ndarray, up: np.ndarray, scale: float, down_dtype: np.dtype, up_dtype: np.dtype) -> float:
    return min(
        math.hypot(true_error(down, first, down_dtype), true_error(up, second, up_dtype))
        for first, second in all_splits(scale)
    )


def assert_best(problem: tuple, slack: float) -> None:
    down, up, scale, down_dtype, up_dtype = problem
    split = split_scale(*problem)
    assert split.down * split.up == scale
    error = math.hypot(true_error(down, split.down, down_dtype), true_error(up, split.up, up_dtype))
    assert split.error == pytest.approx(error, rel=1e-6, abs=1e-9)
    best = least_error(*problem)
    assert math.isinf(error) == math.isinf(best)
    assert error <= slack * best
    assert (split.error == 0.0) == (best == 0.0)
    if best == 0.0:
        for values, factor, dtype in ((down, split.down, down_dtype), (up, split.up, up_dtype)):
            exact = values.astype(np.float64) * factor
            assert (rescaled(values, factor, dtype).astype(np.float64) == exact).all()


@settings(max_examples=300, deadline=None)
@given(problems([(dtype, dtype) for dtype in SAME], POWERS + OTHERS))
def test_no_split_is_better_within_a_dtype(problem):
    assert_best(problem, 1.03)


@settings(max_examples=300, deadline=None)
@given(problems(CHANGES + [(dtype, dtype) for dtype in SAME], POWERS + OTHERS))
def test_no_split_is_much_better_where_the_dtype_changes(problem):
    assert_best(problem, 1.5)
