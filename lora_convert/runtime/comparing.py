"""How far two pictures are apart, in figures that each see what the others miss.

No single figure over a whole picture separates a wrong picture from a right one. A tile's mean difference sees a change
of brightness that structure hides, a tile's structural similarity sees blur and small shifts, and FLIP sees what a
person would see when the two are shown in turn. Averages over the picture hide a change in one corner, so each figure
is the worst tile's (of FLIP, which is a figure per pixel, the 99th percentile).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lora_convert.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "AMPLIFICATION",
    "Difference",
    "Picture",
    "compare",
    "difference_map",
    "legible_factor",
    "picture_of",
    "tile_size",
]

Pixels = NDArray[np.uint8]

AMPLIFICATION = 10.0
"""How many times larger than it is `difference_map` shows a difference."""

_SMALLEST = 7  # pixels: the window of the structural similarity
_HEAT = np.array([(0, 0, 0), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float64)
"""Colours of the difference map from no difference to the largest that it can show, at equal steps."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Two pictures' difference: 0, 1 and 0 for equal ones."""

    tile_difference: float
    """Largest over the tiles of the mean |Δ| of all pixels and channels, 0 to 1 (1/255 is one level)."""
    tile_ssim: float
    """Smallest over the tiles of the mean structural similarity, -1 to 1."""
    flip: float
    """99th percentile of NVIDIA's FLIP map, 0 to 1."""

    def worst(self, other: Difference) -> Difference:
        """The worse of each figure."""
        return Difference(
            max(self.tile_difference, other.tile_difference),
            min(self.tile_ssim, other.tile_ssim),
            max(self.flip, other.flip),
        )

    def __str__(self) -> str:
        return f"tile difference {self.tile_difference:.4f}, tile SSIM {self.tile_ssim:.4f}, FLIP {self.flip:.4f}"


Picture: TypeAlias = "Image.Image | NDArray[np.uint8]"
"""A PIL image of 8 bits per channel, or an array (height, width), or with 1, 3 or 4 channels (height, width, c)."""


def tile_size(width: int) -> int:
    """Side of the tiles, in pixels, for pictures of this width: 16, and 32 from 256 pixels on."""
    return 16 if width < 256 else 32


def picture_of(picture: Picture) -> Image.Image:
    """The picture as RGB, or as RGBA if any of it is transparent.

    Raises UsageError for pictures of more than 8 bits per channel, and for arrays of other dtypes or shapes.
    """
    if isinstance(picture, np.ndarray):
        picture = _image(picture)
    if picture.mode.startswith(("I", "F")):
        raise UsageError(f"a picture of mode {picture.mode} cannot be compared; convert it to 8 bits per channel")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    seen = picture.convert("RGBA")
    return seen.convert("RGB") if seen.getchannel("A").getextrema() == (255, 255) else seen


def compare(first: Picture, second: Picture) -> Difference:
    """How far `second` is from `first`.

    SSIM is scikit-image's with its default window (7×7, uniform) over all channels. FLIP is LDR-FLIP at its default 67
    pixels per degree. Transparent pictures are laid on black and on white, and the worse of each figure counts. Raises
    UsageError for pictures of unequal or too small size, and those that `picture_of` refuses.
    """
    return reduce(Difference.worst, (_compare(*pair) for pair in _seen(first, second)))


def difference_map(first: Picture, second: Picture, factor: float = AMPLIFICATION) -> Image.Image:
    """A picture of where two pictures differ, for eyes: black where they are equal.

    Shown is the largest |Δ| of a pixel's channels, `factor` times as large; from 1/factor of the whole range on it is
    the brightest. Raises UsageError as `compare` does.
    """
    from PIL import Image

    heat = np.clip(_largest(first, second) * factor / 255, 0, 1)
    steps = np.linspace(0, 1, len(_HEAT))
    colours = [np.interp(heat, steps, channel) for channel in _HEAT.T]
    return Image.fromarray(np.stack(colours, axis=2).round().astype(np.uint8))


def legible_factor(first: Picture, second: Picture) -> float:
    """A whole factor for `difference_map` at which nine pixels of ten are not at its end: `AMPLIFICATION` or less."""
    usual = float(np.percentile(_largest(first, second), 90))
    return AMPLIFICATION if usual * AMPLIFICATION <= 255 else max(1.0, 255 // usual)


def _largest(first: Picture, second: Picture) -> NDArray[np.float64]:
    """The largest |Δ| of each pixel's channels, in levels, (height, width)."""
    deltas = [np.abs(one.astype(np.float64) - other).max(axis=2) for one, other in _seen(first, second)]
    largest: NDArray[np.float64] = np.maximum.reduce(deltas)
    return largest


def _image(array: NDArray[Any]) -> Image.Image:
    from PIL import Image

    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise UsageError(
            f"an array of shape {array.shape} and dtype {array.dtype} is no picture; "
            "give uint8 of shape (height, width) or (height, width, 1, 3 or 4)"
        )
    return Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _seen(first: Picture, second: Picture) -> list[tuple[Pixels, Pixels]]:
    """Both pictures as they look, (height, width, 3): once, or on black and on white if either is transparent."""
    one, other = picture_of(first), picture_of(second)
    if one.size != other.size:
        sizes = " and ".join(f"{image.width}×{image.height}" for image in (one, other))
        raise UsageError(f"pictures of {sizes} pixels cannot be compared")
    if min(one.size) < _SMALLEST:
        size = f"{one.width}×{one.height}"
        raise UsageError(f"a picture of {size} pixels cannot be compared; {_SMALLEST} each way are needed")
    grounds = (0,) if one.mode == other.mode == "RGB" else (0, 255)
    return [(_laid_on(one, ground), _laid_on(other, ground)) for ground in grounds]


def _laid_on(image: Image.Image, ground: int) -> Pixels:
    from PIL import Image

    if image.mode == "RGBA":
        base = Image.new("RGBA", image.size, (ground, ground, ground, 255))
        image = Image.alpha_composite(base, image).convert("RGB")
    return np.asarray(image, np.uint8)


def _compare(first: Pixels, second: Pixels) -> Difference:
    """Both of shape (height, width, 3)."""
    try:
        import flip_evaluator
        from skimage.metrics import structural_similarity
    except ModuleNotFoundError as error:
        said = f"comparing pictures needs {error.name}, which is not installed"
        raise UsageError(f'{said}; install it with: pip install "lora-convert[runtime]"') from None

    if np.array_equal(first, second):
        return Difference(0.0, 1.0, 0.0)
    size = tile_size(first.shape[1])
    delta = np.abs(first.astype(np.float64) - second).mean(axis=2) / 255
    _, similarity = structural_similarity(first, second, channel_axis=2, data_range=255, full=True)
    units = [picture.astype(np.float32) / np.float32(255) for picture in (first, second)]
    flip, _, _ = flip_evaluator.evaluate(*units, "LDR", inputsRGB=True, applyMagma=False, computeMeanError=False)
    return Difference(
        float(_tile_means(delta, size).max()),
        float(_tile_means(similarity.mean(axis=2), size).min()),
        float(np.percentile(flip, 99)),
    )


def _tile_means(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Means of (height, width) over tiles of about size × size, which cover all of it and are as equal as can be."""
    starts, counts = zip(*(_edges(length, size) for length in values.shape), strict=True)
    sums = np.add.reduceat(np.add.reduceat(values, starts[0], axis=0), starts[1], axis=1)
    return sums / np.outer(*counts)  # type: ignore[no-any-return]


def _edges(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the tiles of one axis begin, and how long they are."""
    edges = np.linspace(0, length, max(1, round(length / size)) + 1).astype(np.int64)
    return edges[:-1], np.diff(edges)
