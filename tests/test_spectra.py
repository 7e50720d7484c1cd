"""Singular values by structure against dense SVDs, and errors against ΔW formed whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_convert.converters import spectra
from lora_convert.converters.adapters import ALGORITHMS, Adapter, Difference, Dora, Ia3, Lora, Stored, Sum
from lora_convert.converters.spectra import relative_difference, spectrum
from lora_convert.errors import BaseNeeded, Unrepresentable

SHAPES = [(24, 40), (40, 24), (16, 8, 3, 3), (4, 16, 3, 3), (24, 24, 1, 1)]
DTYPES = [np.float32, np.float16]
KINDS = {
    "lora": ("lora", lambda o, i, k: {"down": (5, i * k), "up": (o, 5)}),
    "lora of a rank above the sizes": ("lora", lambda o, i, k: {"down": (60, i * k), "up": (o, 60)}),
    "loha": ("loha", lambda o, i, k: {"w1_a": (o, 2), "w1_b": (2, i * k), "w2_a": (o, 2), "w2_b": (2, i * k)}),
    "lokr of one product": ("lokr", lambda o, i, k: {"w1": (4, 4), "w2_a": (o // 4, 2), "w2_b": (2, i * k // 4)}),
    "lokr of two products": (
        "lokr",
        lambda o, i, k: {"w1_a": (4, 2), "w1_b": (2, 4), "w2_a": (o // 4, 3), "w2_b": (3, i * k // 4)},
    ),
    "lokr of whole factors": ("lokr", lambda o, i, k: {"w1": (4, 4), "w2": (o // 4, i * k // 4)}),
    "difference": ("full", lambda o, i, k: {"weight": (o, i * k)}),
    "glora": ("glora", lambda o, i, k: {"a1": (i, 2), "a2": (2, i), "b1": (o, 2), "b2": (2, i * k)}),
    "tlora": ("tlora", lambda o, i, k: {"q": (3, i), "p": (o, 3), "lambda": (1, 3)}),
    "ia3": ("ia3", lambda o, i, k: {"weight": (o,), "on_input": ()}),
    "oft": ("oft", lambda o, i, k: {"blocks": (o // 4, 4, 4)}),
}


def made(kind: str, shape: tuple[int, ...], seed: int, dtype: type = np.float32, scale: float = 0.7) -> Adapter:
    algorithm, sizes = KINDS[kind]
    random = np.random.default_rng(seed)
    fields = sizes(shape[0], shape[1], math.prod(shape[2:]))
    tensors = {name: random.standard_normal(size).astype(dtype) for name, size in fields.items()}
    if "on_input" in tensors:
        tensors["on_input"] = np.zeros(())
    return ALGORITHMS[algorithm].read(Stored(tensors, shape, scale))


def base_of(shape: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    return {"weight": np.random.default_rng(seed + 1000).standard_normal(shape).astype(np.float32)}


def fits(kind: str, shape: tuple[int, ...]) -> bool:
    return kind != "tlora" or math.prod(shape[2:]) == 1


ALL = [(kind, shape) for kind in KINDS for shape in SHAPES if fits(kind, shape)]


def dense(adapter: Adapter, base: dict[str, np.ndarray]) -> np.ndarray:
    weight = adapter.deltas(base)["weight"]
    return weight.reshape(weight.shape[0], -1)


@pytest.mark.parametrize("scale", [0.7, -1.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape"), ALL, ids=str)
def test_values_and_approximations_are_those_of_the_dense_matrix(kind, shape, dtype, scale):
    adapter, base = made(kind, shape, 1, dtype, scale), base_of(shape)
    delta = dense(adapter, base)
    truth = np.linalg.svd(delta, compute_uv=False)
    found = spectrum(adapter, base)
    ours = np.zeros_like(truth)
    ours[: len(found.values)] = found.values[: len(truth)]
    np.testing.assert_allclose(ours, truth, atol=2e-7 * truth[0])
    assert (np.diff(found.values) <= 1e-12).all() and found.values.dtype == np.float64
    for rank in {0, 1, 2, min(len(found.values), len(truth)) - 1, len(found.values), 1000}:
        error = float(np.linalg.norm(truth[rank:]) / np.linalg.norm(truth))
        assert found.error(rank) == pytest.approx(error, abs=1e-6)
        plain = found.lora(rank)
        kept = min(rank, len(found.values))
        assert plain.down.shape == (kept, delta.shape[1]) and plain.up.shape == (shape[0], kept)
        assert plain.down.dtype == plain.up.dtype == np.float32 and plain.kernel == shape[2:]
        assert plain.deltas()["weight"].shape == shape
        rest = plain.deltas()["weight"].reshape(delta.shape) - delta
        assert np.linalg.norm(rest) / np.linalg.norm(delta) == pytest.approx(error, abs=1e-6)
        np.testing.assert_allclose(
            np.linalg.norm(plain.up, axis=0), np.linalg.norm(plain.down, axis=1), rtol=1e-3, atol=1e-3
        )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(ALL), st.integers(0, 99), st.sampled_from([0.0, 1e-9, 0.01, 0.3, 0.7, 0.999, 1.0, 2.0]))
def test_rank_for_is_the_smallest(case, seed, limit):
    kind, shape = case
    found = spectrum(made(kind, shape, seed), base_of(shape, seed))
    rank = found.rank_for(limit)
    assert 0 <= rank <= len(found.values)
    assert found.error(rank) <= limit * (1 + 1e-12) + 1e-15
    assert rank == 0 or found.error(rank - 1) > limit * (1 - 1e-12)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr of whole factors", "difference"])
def test_a_zero_change_has_rank_0(kind):
    algorithm, sizes = KINDS[kind]
    tensors = {name: np.zeros(size, np.float32) for name, size in sizes(24, 40, 1).items()}
    found = spectrum(adapter := ALGORITHMS[algorithm].read(Stored(tensors, (24, 40))))
    assert found.error(0) == 0.0 and found.rank_for(0.0) == 0
    assert not found.lora(3).deltas()["weight"].any()
    empty = found.lora(0)
    assert relative_difference(adapter, empty).worst == 0.0
    assert relative_difference(adapter, Lora(np.ones((1, 40)), np.ones((24, 1)))).worst == math.inf


def test_rank_0_has_no_values():
    found = spectrum(Lora(np.zeros((0, 40), np.float16), np.zeros((24, 0), np.float16)))
    assert len(found.values) == 0 and found.rank_for(0.1) == 0 and found.error(0) == 0.0
    assert found.lora(4).up.shape == (24, 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("kind", "shape"), ALL, ids=str)
def test_relative_difference_is_the_dense_one(kind, shape, dtype):
    adapter, base = made(kind, shape, 3), base_of(shape)
    found = spectrum(adapter, base)
    delta = dense(adapter, base)
    for rank in {1, len(found.values) // 2, len(found.values)}:
        plain = found.lora(rank)
        stored = Lora(plain.down.astype(dtype), plain.up.astype(dtype), None, 1.0, plain.kernel)
        rest = stored.deltas()["weight"].reshape(delta.shape) - delta
        expected = float(np.linalg.norm(rest) / np.linalg.norm(delta))
        assert relative_difference(adapter, stored, base).worst == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr of one product", "lokr of two products"])
def test_the_exact_form_is_no_distance_away(kind):
    adapter = made(kind, (24, 40), 3)
    plain = adapter.to_lora()
    assert relative_difference(adapter, plain).worst == 0.0
    half = Lora(plain.down.astype(np.float16), plain.up.astype(np.float16), None, plain.scale)
    assert 0.0 < relative_difference(adapter, half).worst <= 5e-4
    doubled = Lora(plain.down, plain.up, None, 2 * plain.scale)
    assert relative_difference(adapter, doubled).worst == pytest.approx(1.0)


def test_badly_conditioned_factors_keep_their_digits():
    random = np.random.default_rng(0)
    up, down = random.standard_normal((40, 6)), random.standard_normal((6, 30))
    up[:, 1] = up[:, 0] * (1 + 1e-9)  # nearly parallel columns, whose Gram matrix is singular in float64
    down[1] = -down[0] + 1e-6 * down[2]
    plain = Lora(down, up)
    truth = np.linalg.svd(up @ down, compute_uv=False)[:6]
    np.testing.assert_allclose(spectrum(plain).values, truth, atol=1e-9 * truth[0])


def test_biases_are_carried_and_compared():
    random = np.random.default_rng(0)
    bias = random.standard_normal(24)
    adapter = Sum((made("lora", (24, 40), 0), Difference((24, 40), bias=bias)))
    plain = spectrum(adapter).lora(5)
    assert plain.bias is not None
    np.testing.assert_array_equal(plain.bias, bias)
    assert relative_difference(adapter, plain).worst <= 1e-6
    assert relative_difference(adapter, Lora(plain.down, plain.up, bias=1.5 * bias)).worst == pytest.approx(0.5)
    assert relative_difference(adapter, Lora(plain.down, plain.up)).worst == pytest.approx(1.0)
    assert relative_difference(made("lora", (24, 40), 0), plain).worst == math.inf
    whole = Difference((24, 40), random.standard_normal((24, 40)), bias)
    np.testing.assert_array_equal(spectrum(whole).lora(2).bias, bias)


@pytest.mark.parametrize("kind", ["glora", "tlora", "ia3", "oft"])
def test_what_needs_the_base_says_so(kind):
    adapter = made(kind, (24, 40), 0)
    for ask in (
        lambda: spectrum(adapter),
        lambda: relative_difference(adapter, Lora(np.ones((1, 40)), np.ones((24, 1)))),
    ):
        with pytest.raises(BaseNeeded):
            ask()


def test_dora_with_the_base_is_a_matrix_like_any_other():
    base = base_of((24, 40))
    for axis, size in (("out", 24), ("in", 40)):
        adapter = Dora(made("lora", (24, 40), 0), np.linspace(0.5, 2.0, size), axis)
        found = spectrum(adapter, base)
        np.testing.assert_allclose(found.values, np.linalg.svd(dense(adapter, base), compute_uv=False), rtol=1e-6)


def test_a_norm_has_no_spectrum():
    with pytest.raises(Unrepresentable, match="vector"):
        spectrum(Difference((24,), np.ones(24)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_said(kind):
    adapter, base = made(kind, (24, 40), 0), base_of((24, 40))
    base["weight"][3, 3] = np.nan
    if kind in ("ia3", "oft", "glora", "tlora"):
        with pytest.raises(Unrepresentable, match="finite"):
            spectrum(adapter, base)
    else:
        tensors = {name: np.full(size, np.inf, np.float32) for name, size in KINDS[kind][1](24, 40, 1).items()}
        with pytest.raises(Unrepresentable, match="finite"):
            spectrum(ALGORITHMS[KINDS[kind][0]].read(Stored(tensors, (24, 40))))


def test_no_array_as_large_as_the_weight_is_made_for_kronecker_factors(monkeypatch):
    random = np.random.default_rng(0)
    values = {"w1": random.standard_normal((16, 16)), "w2": random.standard_normal((640, 80))}
    adapter = ALGORITHMS["lokr"].read(Stored(values, (10240, 1280)))
    monkeypatch.setattr(type(adapter), "deltas", None)
    found = spectrum(adapter)
    plain = found.lora(32)
    assert len(found.values) == 1280
    assert relative_difference(adapter, plain).worst == pytest.approx(found.error(32), rel=1e-6)
    norms = np.linalg.norm(values["w1"]) * np.linalg.norm(values["w2"])
    assert np.linalg.norm(found.values) == pytest.approx(norms)


def test_ia3_on_the_outputs_of_a_low_rank_weight_is_of_low_rank():
    weight = np.outer(np.arange(1.0, 25.0), np.ones(40)).astype(np.float32)
    found = spectrum(Ia3(np.ones(24), on_input=False), {"weight": weight})
    assert found.error(1) <= 1e-7


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_factor_as_large_as_the_weight_is_decomposed_like_one(shape, monkeypatch):
    adapter = made("lokr of whole factors", shape, 0)
    small = spectrum(adapter)
    monkeypatch.setattr(spectra, "_LARGE", 0)
    large = spectrum(adapter)
    np.testing.assert_allclose(large.values, small.values, rtol=1e-9)
    ours, theirs = (found.lora(5).deltas()["weight"] for found in (large, small))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
