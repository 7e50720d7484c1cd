"""Comparing pictures: each figure sees what it is there for, and together they tell every change from noise."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, shift

from lora_convert.errors import UsageError
from lora_convert.runtime.comparing import Difference, compare, difference_map, legible_factor, tile_size

Pixels = NDArray[np.uint8]
SAME = Difference(0.0, 1.0, 0.0)


def photo(size: int = 128, seed: int = 0) -> Pixels:
    """Something like a photograph: structure at all scales, falling with frequency, and some edges."""
    random = np.random.default_rng(seed)
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    spectrum = 1 / np.maximum(frequencies, 1 / size) ** 1.2
    layers = [np.fft.ifft2(np.fft.fft2(random.standard_normal((size, size))) * spectrum).real for _ in range(3)]
    picture = np.stack([60 * layer / layer.std() for layer in layers], axis=2) * 0.7 + 128
    rows, columns = np.ogrid[:size, :size]
    picture[np.hypot(rows - size * 0.4, columns - size * 0.6) < size / 5] += (60, -40, 20)
    return picture.clip(0, 255).round().astype(np.uint8)


def noisy(picture: Pixels) -> Pixels:
    return levels(picture.astype(int) + np.random.default_rng(1).integers(-1, 2, picture.shape))


def levels(values: NDArray[np.generic]) -> Pixels:
    return np.clip(np.round(values.astype(float)), 0, 255).astype(np.uint8)


def patched(picture: Pixels) -> Pixels:
    """An eighth of the side replaced by another place of the picture."""
    side, changed = len(picture) // 8, picture.copy()
    changed[side : 2 * side, side : 2 * side] = picture[-2 * side : -side, -2 * side : -side][::-1]
    return changed


CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "quarter of a pixel": lambda picture: levels(shift(picture.astype(float), (0, 0.25, 0), order=1, mode="nearest")),
    "brightness": lambda picture: levels(picture * 0.9),
    "patch": patched,
    "blur": lambda picture: levels(gaussian_filter(picture.astype(float), (2, 2, 0))),
    "other picture": lambda picture: photo(len(picture), seed=9),
}
SEEN_BY = {
    "quarter of a pixel": {"tile_difference", "flip"},
    "brightness": {"tile_difference", "flip"},
    "patch": {"tile_difference", "tile_ssim", "flip"},
    "blur": {"tile_difference", "tile_ssim", "flip"},
    "other picture": {"tile_difference", "tile_ssim", "flip"},
}


def seen(difference: Difference, noise: Difference) -> set[str]:
    """The figures that are far (three times) worse than the noise's."""
    worse = {
        "tile_difference": difference.tile_difference > 3 * noise.tile_difference,
        "tile_ssim": 1 - difference.tile_ssim > 3 * (1 - noise.tile_ssim),
        "flip": difference.flip > 3 * noise.flip,
    }
    return {figure for figure, is_seen in worse.items() if is_seen}


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_seen_and_told_from_noise(change: str, size: int) -> None:
    picture = photo(size)
    noise = compare(picture, noisy(picture))
    assert noise.tile_difference < 1 / 255
    assert seen(compare(picture, CHANGES[change](picture)), noise) >= SEEN_BY[change]


def test_averages_over_the_picture_do_not_see_a_patch() -> None:
    """Why the figures are the worst tile's: the patch is far from noise there, and near it on average."""
    picture = photo(256)
    whole = [np.abs(picture.astype(int) - changed).mean() / 255 for changed in (noisy(picture), patched(picture))]
    tiles = [compare(picture, changed).tile_difference for changed in (noisy(picture), patched(picture))]
    assert whole[1] < 2 * whole[0]
    assert tiles[1] > 50 * tiles[0]


def test_equal_pictures_differ_in_nothing() -> None:
    picture = photo(64)
    assert compare(picture, picture.copy()) == SAME
    assert compare(Image.fromarray(picture), picture) == SAME


@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (7, 300), (130, 33)])
def test_every_pixel_counts(shape: tuple[int, int]) -> None:
    """Also where the tiles do not divide the picture."""
    black = np.zeros((*shape, 3), np.uint8)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        dotted = black.copy()
        dotted[corner] = 255
        assert compare(black, dotted).tile_difference > 0.001


def test_a_tile_difference_is_the_mean_of_the_worst_tile() -> None:
    black, changed = np.zeros((2, 64, 64, 3), np.uint8)
    changed[16:32, 32:48] = 51
    assert compare(black, changed).tile_difference == pytest.approx(0.2)


@pytest.mark.parametrize(("width", "expected"), [(64, 16), (128, 16), (255, 16), (256, 32), (1024, 32)])
def test_tile_size(width: int, expected: int) -> None:
    assert tile_size(width) == expected


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_modes_are_compared_as_they_look(mode: str) -> None:
    grey = Image.fromarray(np.where(photo(64)[..., 0] > 128, 255, 0).astype(np.uint8))
    assert compare(grey, grey.convert(mode)) == SAME
    assert compare(grey, np.asarray(grey.convert("RGB").convert("RGBA"))) == SAME


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 90)])
def test_transparency_is_seen_whatever_lies_below(colour: tuple[int, int, int]) -> None:
    opaque = Image.new("RGBA", (64, 64), (*colour, 255))
    holed = opaque.copy()
    holed.paste((*colour, 0), (16, 16, 32, 32))
    assert compare(opaque, holed).tile_difference > 0.2
    assert difference_map(opaque, holed).getpixel((20, 20)) != (0, 0, 0)
    recoloured = holed.copy()
    recoloured.paste((1, 2, 3, 0), (16, 16, 32, 32))
    assert compare(holed, recoloured) == SAME  # nobody can see what colour nothing has


WRONG = {
    "sizes": (np.zeros((64, 64, 3), np.uint8), np.zeros((64, 128, 3), np.uint8), "pictures of 64×64 and 128×64 pixels"),
    "small": (np.zeros((6, 64, 3), np.uint8), np.zeros((6, 64, 3), np.uint8), "64×6 pixels"),
    "float": (np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3)), "dtype float64"),
    "shape": (np.zeros((64, 64, 3), np.uint8), np.zeros((3, 64, 64), np.uint8), r"shape \(3, 64, 64\)"),
    "depth": (Image.new("I;16", (64, 64)), Image.new("I;16", (64, 64)), "mode I;16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_compared_is_one_sentence(case: str) -> None:
    first, second, sentence = WRONG[case]
    for act in (compare, difference_map):
        with pytest.raises(UsageError, match=sentence):
            act(first, second)


def test_a_difference_map_is_black_where_nothing_differs_and_amplified_elsewhere() -> None:
    black, changed = np.zeros((2, 64, 64, 3), np.uint8)
    changed[:, 32:] = (0, 2, 1)
    changed[:, 48:] = (0, 26, 1)
    seen = np.asarray(difference_map(black, changed)).astype(int)
    assert seen.shape == (64, 64, 3)
    assert not seen[:, :32].any()
    assert 0 < seen[0, 40].sum() < seen[0, 60].sum()
    assert seen[0, 60].tolist() == [252, 255, 164]
    doubled = np.asarray(difference_map(black, changed, factor=20)).astype(int)
    assert doubled[0, 40].sum() > seen[0, 40].sum()


@pytest.mark.parametrize(("delta", "factor"), [(0, 10), (1, 10), (25, 10), (26, 9), (60, 4), (200, 1), (255, 1)])
def test_a_legible_factor_is_as_large_as_it_can_be(delta: int, factor: int) -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    changed = np.full_like(black, delta)
    changed[:4] = 255  # few pixels may be at the end of the map
    assert legible_factor(black, changed) == factor


def test_the_worse_of_two_differences() -> None:
    assert Difference(0.1, 0.9, 0.3).worst(Difference(0.2, 0.8, 0.1)) == Difference(0.2, 0.8, 0.3)


def test_comparing_needs_no_torch() -> None:
    code = (
        "import sys, numpy; from lora_convert.runtime.comparing import compare, difference_map\n"
        "a, b = numpy.zeros((2, 64, 64, 3), 'uint8'); b[0] = 9; compare(a, b); difference_map(a, b)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
