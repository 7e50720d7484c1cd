"""Splitting a scale between two matrices: brute force over all splits finds none that is better."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_convert.converters.folding import rescaled, split_scale
from lora_convert.converters.values import to_half

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
BF16, E4M3, E5M2 = (
    np.dtype(kind) for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
)  # fmt: skip
SAME = [F16, BF16, F32]
CHANGES = [
    *((down, up, F16, F16) for down in (F32, BF16, E4M3, E5M2, F16) for up in (F32, BF16)),
    *((F32, F32, BF16, BF16), (F64, F64, F32, F32), (F16, F16, F32, F32), (F16, F16, BF16, BF16)),
]  # fmt: skip
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


def pairs(
    scales: list[float], *dtypes: tuple[np.dtype, np.dtype, np.dtype, np.dtype]
) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray, float, np.dtype, np.dtype]]:
    """Arguments of `split_scale`; `dtypes` are those of down and up before and after."""

    @st.composite
    def problem(draw: st.DrawFn) -> tuple:
        before, before_up, after, after_up = draw(st.sampled_from(dtypes))
        rank = draw(st.integers(1, 4))
        down, up = draw(matrices(before, rank, draw(st.integers(8, 32)))), draw(matrices(before_up, 24, rank))
        assume(down.astype(bool).any() and up.astype(bool).any())
        return down, up, draw(st.sampled_from(scales)), after, after_up

    return problem()


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


def judged(problem: tuple) -> tuple[float, float]:
    """The error of the split that is chosen, and that of the best there is; with what holds of every split."""
    down, up, scale, down_dtype, up_dtype = problem
    split = split_scale(*problem)
    assert split.down * split.up == scale
    error = math.hypot(true_error(down, split.down, down_dtype), true_error(up, split.up, up_dtype))
    assert split.error == pytest.approx(error, rel=1e-6, abs=1e-9)
    best = least_error(*problem)
    assert math.isinf(error) == math.isinf(best)
    if split.error == 0.0:
        for values, factor, dtype in ((down, split.down, down_dtype), (up, split.up, up_dtype)):
            assert (rescaled(values, factor, dtype).astype(np.float64) == values.astype(np.float64) * factor).all()
    return error, best


@settings(max_examples=200, deadline=None)
@given(pairs(POWERS, *((down, up, down, up) for down in SAME for up in SAME)))
def test_powers_of_two_are_folded_as_well_as_can_be(problem):
    error, best = judged(problem)
    assert error <= 1.03 * best
    assert (error == 0.0) == (best == 0.0)


@settings(max_examples=200, deadline=None)
@given(pairs(OTHERS, *((dtype, dtype, dtype, dtype) for dtype in SAME)))
def test_other_scales_cost_no_more_than_one_rounding_where_possible(problem):
    error, best = judged(problem)
    assert error <= max(1.5 * best, float(ml_dtypes.finfo(problem[3]).eps) / 2)


@settings(max_examples=200, deadline=None)
@given(pairs(POWERS + OTHERS, *CHANGES))
def test_where_the_dtype_changes_no_split_is_noticeably_better(problem):
    error, best = judged(problem)
    assert error <= 3 * best + float(ml_dtypes.finfo(problem[3]).eps) / 4  # the error of one rounding


def normal(shape: tuple[int, ...], dtype: np.dtype, spread: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(dtype)


@pytest.mark.parametrize(
    ("before", "after", "spread"), [(F16, F16, 1e-6), (BF16, F16, 1e-5), (F32, F16, 1e-5), (F32, BF16, 1.0)], ids=str
)
@pytest.mark.parametrize("scale", [0.5, 2.0**-5, 1 / 3, 20000 / 64])
def test_the_error_of_large_matrices_is_estimated_from_a_sample(before, after, spread, scale):
    down, up = normal((16, 5120), before, 0.02), normal((1280, 16), before, spread, 1)
    error, best = judged_large(down, up, scale, after)
    assert error == pytest.approx(best, rel=0.1, abs=1e-9)


def judged_large(down: np.ndarray, up: np.ndarray, scale: float, dtype: np.dtype) -> tuple[float, float]:
    split = split_scale(down, up, scale, dtype, dtype)
    return split.error, math.hypot(true_error(down, split.down, dtype), true_error(up, split.up, dtype))


@pytest.mark.parametrize(
    ("scale", "down", "up", "error"),
    [
        (1.0, 1.0, 1.0, 0.0),
        (0.5, 1.0, 0.5, 0.0),
        (-4.0, 1.0, -4.0, 0.0),
        (0.0, 1.0, 0.0, 0.0),
        (2.0**20, 2.0**6, 2.0**14, 0.0),  # neither holds it alone
        (2.0**40, 1.0, 2.0**40, math.inf),
    ],
)
def test_the_least_intrusive_split_is_taken(scale, down, up, error):
    ones = np.ones((2, 2), np.float16)
    split = split_scale(ones, ones, scale, F16, F16)
    assert split.error == error
    assert split.down * split.up == scale
    if error or scale != 2.0**20:
        assert (split.down, split.up) == (down, up)


@pytest.mark.parametrize("before", [F32, BF16, E4M3, E5M2], ids=str)
def test_a_narrower_dtype_alone_moves_nothing_between_the_matrices(before):
    split = split_scale(normal((8, 320), before, 0.1), normal((320, 8), before, 0.1, 1), 1.0, F16, F16)
    assert (split.down, split.up) == (1.0, 1.0)


def test_values_too_small_or_large_for_the_narrower_dtype_are_moved_into_its_range():
    for down_spread, up_spread in ((0.02, 1e-7), (1e6, 1e-4)):
        down, up = normal((8, 320), BF16, down_spread), normal((320, 8), BF16, up_spread, 1)
        split = split_scale(down, up, 1.0, F16, F16)
        assert split.error < 3e-4  # of one rounding
        assert split.down < 1.0 < split.up


@pytest.mark.parametrize("scale", [0.0, 1.0, 0.25, 1 / 3, -2.0])
@pytest.mark.parametrize(("before", "after"), [(F16, F16), (F32, F16), (E4M3, F16)], ids=str)
def test_empty_and_zero_matrices(scale, before, after):
    for shapes in (((0, 7), (5, 0)), ((2, 0), (5, 2)), ((2, 7), (5, 2))):
        down, up = (np.zeros(shape, before) for shape in shapes)
        split = split_scale(down, up, scale, after, after)
        assert split.error == 0.0
        assert split.down * split.up == scale
        for values, factor in ((down, split.down), (up, split.up)):
            stored = rescaled(values, factor, after)
            assert (stored.shape, stored.dtype) == (values.shape, after)
            assert not stored.any()


CODES = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("factor", [1.0, 0.5, -(2.0**-20), 2.0**9, 1 / 3, 20000 / 64, 1e30, 0.0])
@pytest.mark.parametrize("after", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("before", [F16, BF16], ids=str)
def test_large_and_small_arrays_are_multiplied_alike(before, after, factor):
    every = CODES.view(before)
    halves = np.concatenate([rescaled(half, factor, after) for half in np.split(every, 2)])
    whole = rescaled(every.reshape(256, 256), factor, after)
    assert (whole.shape, whole.dtype) == ((256, 256), after)
    assert whole.tobytes() == halves.tobytes()


@pytest.mark.parametrize("factor", [1.0, 0.5, -(2.0**-20), 2.0**9, 1 / 3, 20000 / 64, 1e30, 1e-30])
@pytest.mark.parametrize("after", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("before", [F16, BF16, E4M3, E5M2], ids=str)
def test_products_are_rounded_to_the_nearest(before, after, factor):
    codes = CODES if before.itemsize == 2 else np.arange(256, dtype=np.uint8)
    values = codes.view(before)
    with np.errstate(invalid="ignore"):
        values = values[np.isfinite(values.astype(np.float64))]
    stored = rescaled(values, factor, after)
    assert not np.isnan(stored.astype(np.float64)).any()
    exact = values.astype(np.float64) * factor
    limits = ml_dtypes.finfo(after)
    fits = np.abs(exact) <= float(limits.max)
    unit = np.maximum(2.0 ** np.floor(np.log2(np.maximum(np.abs(exact), 1e-300))), float(limits.tiny)) * float(
        limits.eps
    )
    assert (np.abs(stored.astype(np.float64) - exact)[fits] <= 0.5000001 * unit[fits]).all()
    assert np.isinf(stored.astype(np.float64)[np.abs(exact) > float(limits.max) * (1 + float(limits.eps))]).all()


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_what_needs_no_change_is_not_touched(dtype):
    values = np.frombuffer(np.random.default_rng(0).bytes(1 << 16), dtype)
    assert rescaled(values, 1.0, dtype) is values


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5, 1e-8, 2e4, 1e6])
def test_halves_are_numpys(scale):
    values = (np.random.default_rng(0).standard_normal((64, 129)) * scale).astype(np.float32)
    with np.errstate(over="ignore"):
        assert to_half(values).tobytes() == values.astype(np.float16).tobytes()


def test_halves_round_ties_to_even():
    halves = np.arange(0x0400, 0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    for values in (halves, ties, -ties, np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, np.float32(0))):
        assert to_half(values).tobytes() == values.astype(np.float16).tobytes()
