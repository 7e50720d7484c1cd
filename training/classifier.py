"""What a picture of the tiny world shows: shape, colour and background, by medians and by overlap with the shapes."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.color import rgb2lab
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops

from training.pictures import COLOURS, SHAPES, Scene, draw

_CANVAS = 48


class Seen(NamedTuple):
    """The words for what is seen."""

    shape: str
    colour: str
    background: str

    @classmethod
    def of(cls, scene: Scene) -> Seen:
        """What there is to see in a scene."""
        return cls(scene.shape, scene.colour, scene.background)


def classify(picture: NDArray[np.uint8]) -> Seen:
    """Name the shape, its colour and the background of a picture (height, width, 3)."""
    lab = rgb2lab(picture)
    edge = max(2, picture.shape[0] // 24)
    border = np.concatenate([lab[:edge].reshape(-1, 3), lab[-edge:].reshape(-1, 3), lab[:, :edge].reshape(-1, 3)])
    ground = np.median(border, 0)
    mask = _foreground(np.linalg.norm(lab - ground, axis=2))
    if not mask.any():
        return Seen("", "", _nearest(ground))
    return Seen(_shape(mask), _nearest(np.median(lab[mask], 0)), _nearest(ground))


def _foreground(distance: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The largest connected region that differs from the ground."""
    mask = distance > max(float(threshold_otsu(distance)), 8.0)
    regions = label(mask)
    if not regions.any():
        return mask
    largest: NDArray[np.bool_] = regions == max(regionprops(regions), key=lambda region: region.area).label
    return largest


def _nearest(lab: NDArray[np.float64]) -> str:
    colours = {name: rgb2lab(np.uint8([[rgb]]))[0, 0] for name, rgb in COLOURS.items()}
    return min(colours, key=lambda name: float(np.linalg.norm(colours[name] - lab)))


def _shape(mask: NDArray[np.bool_]) -> str:
    seen = _fitted(mask)
    overlap = {name: (seen & known).sum() / (seen | known).sum() for name, known in _known().items()}
    return max(overlap, key=lambda name: overlap[name])


@cache
def _known() -> dict[str, NDArray[np.bool_]]:
    return {shape: _fitted(draw(Scene(shape, "white", "black"))[..., 0] > 127) for shape in SHAPES}


def _fitted(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask's bounding box on a canvas of one size."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.asarray(Image.fromarray(box).convert("L").resize((_CANVAS, _CANVAS), Image.Resampling.BOX)) > 127
