"""The proof by numbers: relative errors from the factors are those of the dense matrices, and mistakes are seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import lora, read_all
from safetensors import safe_open

import lora_convert
from lora_convert.converters.adapters import Lora
from lora_convert.converters.fidelity import relative_error

BF16 = ml_dtypes.bfloat16
NOISE = {np.float16: 2e-7, BF16: 2e-7, np.float32: 1e-14, np.float64: 1e-14}
"""Errors below this are noise. What is stored in 16 bits is compared in float32 where that is enough."""


def dense_error(source: Lora, output: Lora) -> float:
    first, second = source.deltas()["weight"], output.deltas()["weight"]
    norm = np.linalg.norm(first)
    difference = np.linalg.norm(second - first)
    return float(difference / norm) if norm else (math.inf if difference else 0.0)


def pair(dtype: type, rank: int = 8, out: int = 96, width: int = 160, scale: float = 0.5, seed: int = 0) -> Lora:
    random = np.random.default_rng(seed)
    down, up = random.standard_normal((rank, width)) * 0.02, random.standard_normal((out, rank)) * 1e-3
    return Lora(down.astype(dtype), up.astype(dtype), None, scale)


def times(adapter: Lora, down: float, up: float, scale: float) -> Lora:
    """Factors multiplied and rounded to their dtype."""
    dtype = adapter.down.dtype
    wide = adapter.down.astype(np.float64), adapter.up.astype(np.float64)
    return Lora((wide[0] * down).astype(dtype), (wide[1] * up).astype(dtype), None, adapter.scale * scale)


def mixed(adapter: Lora, matrix: np.ndarray) -> Lora:
    """The same product with other factors."""
    down = matrix @ adapter.down.astype(np.float64)
    return Lora(down, adapter.up.astype(np.float64) @ np.linalg.inv(matrix), None, adapter.scale)


def changed(adapter: Lora, part: str, change: Callable[[np.ndarray], object]) -> Lora:
    matrices = {"down": adapter.down.copy(), "up": adapter.up.copy()}
    change(matrices[part])
    return Lora(matrices["down"], matrices["up"], None, adapter.scale)


ROTATION = np.linalg.qr(np.random.default_rng(5).standard_normal((8, 8)))[0]

CHANGES = {
    "equal": lambda lora: lora,
    "shifted": lambda lora: times(lora, 4.0, 0.25, 1.0),
    "folded": lambda lora: times(lora, 0.5, 1.0, 2.0),
    "both signs": lambda lora: times(lora, -1.0, -1.0, 1.0),
    "negative scale": lambda lora: times(lora, -1.0, 1.0, -1.0),
    "into subnormals": lambda lora: times(lora, 1.0, 2.0**-10, 2.0**10),
    "rounded up": lambda lora: times(lora, 1.0, 1 / 3, 3.0),
    "rounded down": lambda lora: times(lora, 1 / 3, 1.0, 3.0),
    "rounded twice": lambda lora: times(lora, 1 / 3, 0.7, 3.0 / 0.7),
    "tilted": lambda lora: times(lora, 1.0005, 1 / 1.0005, 1.0),
    "wrong scale": lambda lora: times(lora, 1.0, 1.0, 1.01),
    "wrong sign": lambda lora: times(lora, 1.0, 1.0, -1.0),
    "nothing": lambda lora: times(lora, 0.0, 1.0, 1.0),
    "scale of zero": lambda lora: times(lora, 1.0, 1.0, 0.0),
    "row lost": lambda lora: changed(lora, "up", lambda values: values[7].fill(0)),
    "column lost": lambda lora: changed(lora, "down", lambda values: values[:, 3].fill(0)),
    "one value": lambda lora: changed(lora, "up", lambda values: np.multiply.at(values, (2, 2), 1.25)),
    "rank lost": lambda lora: Lora(lora.down[:-1], lora.up[:, :-1], None, lora.scale),
    "rank added": lambda lora: Lora(
        np.pad(lora.down, ((0, 3), (0, 0))), np.pad(lora.up, ((0, 0), (0, 3)), constant_values=1), None, lora.scale
    ),
    "twice": lambda lora: Lora(
        np.concatenate([lora.down, lora.down]), np.concatenate([lora.up, lora.up], 1), None, lora.scale / 2
    ),
    "ranks reordered": lambda lora: Lora(lora.down[::-1], lora.up[:, ::-1], None, lora.scale),
    "ranks misordered": lambda lora: Lora(lora.down[::-1], lora.up, None, lora.scale),
    "rotated": lambda lora: mixed(lora, ROTATION),
    "rotated and rounded": lambda lora: times(
        Lora(
            (ROTATION @ lora.down.astype(np.float64)).astype(lora.down.dtype),
            (lora.up.astype(np.float64) @ ROTATION.T).astype(lora.up.dtype),
            None,
            lora.scale,
        ),
        1.0,
        1.0,
        1.0,
    ),
    "other": lambda lora: pair(lora.down.dtype.type, seed=1),
}


@pytest.mark.parametrize("dtype", NOISE, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_relative_error_is_the_dense_one(change, dtype):
    source = pair(dtype)
    output = change(source)
    assert relative_error(source, output) == pytest.approx(dense_error(source, output), rel=2e-3, abs=NOISE[dtype])


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_size_of_the_values_does_not_matter(scale):
    source = pair(np.float64)
    source = Lora((source.down * scale).astype(BF16), source.up.astype(BF16), None, source.scale)
    for change in ("rounded up", "wrong scale", "row lost", "rotated and rounded"):
        output = CHANGES[change](source)
        assert relative_error(source, output) == pytest.approx(dense_error(source, output), rel=2e-3)


def test_nothing_against_something():
    something, nothing = pair(np.float16), times(pair(np.float16), 1.0, 0.0, 1.0)
    assert relative_error(something, nothing) == pytest.approx(1.0)
    assert relative_error(nothing, something) == math.inf
    assert relative_error(nothing, times(nothing, 2.0, 1.0, 1.0)) == 0.0
    assert relative_error(nothing, Lora(something.down[:0], something.up[:, :0])) == 0.0
    assert relative_error(something, Lora(something.down[:0], something.up[:, :0])) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32], ids=lambda dtype: np.dtype(dtype).name)
def test_a_tucker_core_is_compared_by_its_product(dtype):
    random = np.random.default_rng(0)
    down, up, mid = (
        random.standard_normal(shape).astype(dtype) for shape in ((4, 24), (32, 5), (5, 4, 3, 3))
    )  # fmt: skip
    source = Lora(down, up, mid, -0.25, (3, 3))
    plain = source.to_lora()
    for factor in (1.0, 1.02):
        output = Lora((plain.down * factor).astype(dtype), plain.up, None, plain.scale, (3, 3))
        error = relative_error(source, output)
        assert error == pytest.approx(dense_error(source, output), rel=2e-3, abs=NOISE[dtype])
        assert (error < 1e-2) == (factor == 1.0)


ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
MODULES = [f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{letter}" for letter in "qkv"]
Q, K, V = MODULES


def swap_modules(tensors: dict[str, np.ndarray]) -> None:
    for half in ("lora_A", "lora_B"):
        first, second = f"{Q}.{half}.weight", f"{K}.{half}.weight"
        tensors[first], tensors[second] = tensors[second], tensors[first]


def transpose(tensors: dict[str, np.ndarray]) -> None:
    down, up = tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"]
    tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"] = up.T, down.T


def drop_row(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{K}.lora_B.weight"][17] = 0


def double(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{V}.lora_A.weight"] *= 2


def drift(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{V}.lora_A.weight"] *= np.float16(1.002)


@pytest.mark.parametrize(
    ("tamper", "wrong", "least", "most"),
    [
        (swap_modules, {Q, K}, 1.2, 1.7),
        (transpose, {Q}, 1.2, 1.7),
        (drop_row, {K}, 0.03, 0.1),  # one row of 320: the root of 1/320
        (double, {V}, 0.999, 1.001),
        (drift, {V}, 1.5e-3, 2.5e-3),
    ],
)
def test_validate_names_what_is_wrong_and_how_much(tamper, wrong, least, most, write, tmp_path):
    tensors = {}
    for seed, letter in enumerate("qkv"):
        tensors |= lora(f"{ATTENTION}{letter}", 320, 320, 4, 8.0, seed=seed)
    source = write(tensors)
    result = lora_convert.convert(source, tmp_path / "out.safetensors", family="sd15")
    assert result.ok, result.findings
    assert result.worst_delta_error == 0.0
    output = tampered(Path(result.outputs[0].path), tamper, write)
    proof = lora_convert.validate(output, against=source, family="sd15")
    assert proof.status == "fail"
    mismatches = [finding for finding in proof.findings if finding.name == "delta-mismatch"]
    assert {(finding.severity, finding.subject) for finding in mismatches} == {("error", module) for module in wrong}
    assert least < proof.worst_delta_error < most
    assert proof.rungs["delta"].figures["exact_modules"] == 3 - len(wrong)
    assert proof.rungs["delta"].figures["worst_modules"][0]["module"] in wrong


def tampered(path: Path, tamper: Callable[[dict[str, np.ndarray]], None], write: Callable[..., Path]) -> Path:
    tensors = {name: values.copy() for name, values in read_all(path).items()}
    tamper(tensors)
    with safe_open(path, "np") as file:
        return write(tensors, file.metadata(), "tampered")


def test_a_module_of_rank_0_can_be_compared_with_itself(write):
    tensors = lora(f"{ATTENTION}q", 320, 320) | {
        f"{ATTENTION}k.lora_down.weight": np.zeros((0, 320), np.float16),
        f"{ATTENTION}k.lora_up.weight": np.zeros((320, 0), np.float16),
    }
    source = write(tensors)
    proof = lora_convert.validate(source, against=source, family="sd15")
    assert proof.rungs["delta"].figures["worst"] == 0.0
