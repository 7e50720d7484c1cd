"""The tolerance policy: which level two machines' pictures are compared at, and that docs/golden.md says the same."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
from conftest import ROOT

from lora_convert.runtime.comparing import Difference
from lora_convert.runtime.policy import POLICY, Conditions, Tolerance, level_between

THEN = Conditions("cpu", "x86_64 AVX512", "fp32", "2.13.0+cpu")
SAME = Difference(0.0, 1.0, 0.0)

LEVELS: dict[str, tuple[dict[str, str], str | None]] = {
    "same": ({}, "strict"),
    "another patch": ({"torch": "2.13.1+cpu"}, "strict"),
    "another build": ({"torch": "2.13.0+cu130"}, "strict"),
    "another minor": ({"torch": "2.14.0"}, "loose"),
    "another major": ({"torch": "3.13.0"}, "loose"),
    "another processor": ({"chip": "x86_64 AVX2"}, "loose"),
    "both": ({"chip": "aarch64 DEFAULT", "torch": "2.5.1"}, "loose"),
    "another device": ({"device": "cuda", "chip": "NVIDIA L4", "torch": "2.5.1"}, "wide"),
    "another dtype": ({"dtype": "bf16"}, None),
    "another device and dtype": ({"device": "cuda", "chip": "NVIDIA L4", "dtype": "fp16"}, None),
}


@pytest.mark.parametrize("case", LEVELS)
def test_the_level_follows_from_what_differs(case: str) -> None:
    changed, expected = LEVELS[case]
    now = dataclasses.replace(THEN, **changed)
    level, reasons = level_between(THEN, now)
    assert (level.name if level else None) == expected
    assert level_between(now, THEN)[0] == level
    assert all(
        f"{name} {getattr(THEN, name)}, now {changed[name]}" in reasons for name in changed if expected != "strict"
    )
    assert bool(reasons) == (expected != "strict")


def test_each_level_allows_more_than_the_one_before() -> None:
    limits = [level.tolerance for level in POLICY.values()]
    assert list(POLICY) == ["strict", "loose", "wide"]
    for tight, wide in itertools.pairwise(limits):
        assert tight.tile_difference < wide.tile_difference
        assert tight.tile_ssim > wide.tile_ssim
        assert tight.flip < wide.flip


@pytest.mark.parametrize("figure", ["tile_difference", "tile_ssim", "flip"])
def test_every_figure_must_pass_and_a_failing_one_is_told(figure: str) -> None:
    limits = Tolerance(0.1, 0.9, 0.2)
    assert limits.admits(Difference(0.1, 0.9, 0.2))
    worse = {"tile_difference": 0.11, "tile_ssim": 0.89, "flip": 0.21}[figure]
    for value in (worse, float("nan")):
        (said,) = limits.excesses(dataclasses.replace(Difference(0.1, 0.9, 0.2), **{figure: value}))
        assert said.startswith(
            figure.replace("tile_d", "tile d").replace("tile_ssim", "tile SSIM").replace("flip", "FLIP")
        )


def test_noise_widens_a_tolerance_that_is_below_it() -> None:
    noise = Difference(0.01, 0.99, 0.001)
    strict, loose = POLICY["strict"], POLICY["loose"]
    assert strict.above_noise(SAME, noise) == strict.tolerance  # what other conditions do does not count there
    assert strict.above_noise(noise, SAME).tile_difference == strict.noise * 0.01
    widened = loose.above_noise(SAME, noise)
    assert widened.tile_difference == loose.noise * 0.01
    assert widened.tile_ssim == pytest.approx(1 - loose.noise * 0.01)
    assert widened.flip == loose.tolerance.flip


def test_the_documentation_has_the_figures() -> None:
    text = (ROOT / "docs" / "golden.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) ×.*\|$", text, re.MULTILINE)
    documented = {name: (Tolerance(*map(float, figures)), float(noise)) for name, *figures, noise in rows}
    assert documented == {level.name: (level.tolerance, level.noise) for level in POLICY.values()}
