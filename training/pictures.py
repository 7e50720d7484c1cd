"""The world that the tiny base models know: one shape on a plain background, drawn from distances, and its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

COLOURS = {
    "red": (214, 24, 36),
    "orange": (255, 128, 8),
    "yellow": (255, 236, 64),
    "green": (32, 160, 60),
    "blue": (32, 84, 232),
    "purple": (140, 40, 176),
    "white": (248, 248, 248),
    "black": (8, 8, 8),
}
"""RGB, 0 to 255, of every colour that a caption can name."""

SIZES = {"small": 0.7, "": 1.0, "big": 1.35}
"""Radius by word, as a factor."""

POSITIONS = {
    "": (0.0, 0.0),
    "on the left": (-1.0, 0.0),
    "on the right": (1.0, 0.0),
    "at the top": (0.0, -1.0),
    "at the bottom": (0.0, 1.0),
}
"""Direction of the centre's shift by phrase: x to the right, y down."""

STYLES = ("", "striped", "neon")
"""What the base models have not been taught to draw by name; adapters are."""

_RADIUS = 0.24  # of the picture's width
_SHIFT = 0.2
_JITTER = 0.06
_LINE = 0.045  # half the width of a neon line


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `dx`, `dy` and `stretch` are chance: two pictures of one caption differ by them."""

    shape: str
    colour: str
    background: str
    size: str = ""
    position: str = ""
    style: str = ""
    dx: float = 0.0
    dy: float = 0.0
    stretch: float = 1.0


def _polygon(x: Floats, y: Floats, corners: Sequence[tuple[float, float]]) -> Floats:
    """Signed distance to a closed polygon, negative inside."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        crosses = (ay > y) != (by > y)
        if ey:
            inside ^= crosses & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -nearest, nearest).astype(np.float32)


def _regular(count: int, radii: Sequence[float], turn: float = -np.pi / 2) -> list[tuple[float, float]]:
    angles = [turn + 2 * np.pi * k / count for k in range(count)]
    return [(radii[k % len(radii)] * np.cos(a), radii[k % len(radii)] * np.sin(a)) for k, a in enumerate(angles)]


_CROSS_CORNERS = [
    (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
    (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
]  # fmt: skip

SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.82,
    "triangle": lambda x, y: _polygon(x, y + 0.1, _regular(3, [1.15])),
    "star": lambda x, y: _polygon(x, y, _regular(10, [1.15, 0.47])),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.72) - 0.27,
    "cross": lambda x, y: _polygon(x, y, _CROSS_CORNERS),
}
"""Signed distance to each shape of radius 1, negative inside, of coordinates x to the right and y down."""


def random_scene(rng: np.random.Generator, style: str = "") -> Scene:
    """A scene of any shape, two colours, size and position."""
    colour, background = (str(name) for name in rng.choice(list(COLOURS), 2, replace=False))
    position = str(rng.choice(list(POSITIONS))) if rng.random() < 0.3 else ""
    scene = Scene(
        shape=str(rng.choice(list(SHAPES))),
        colour=colour,
        background=background,
        size=str(rng.choice(list(SIZES))) if rng.random() < 0.5 else "",
        position=position,
        style=style,
    )
    return jittered(scene, rng)


def jittered(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with other chance."""
    dx, dy = rng.uniform(-_JITTER, _JITTER, 2)
    return replace(scene, dx=float(dx), dy=float(dy), stretch=float(rng.uniform(0.9, 1.1)))


def caption(scene: Scene, long: bool = True) -> str:
    """The scene in words: `a small red ring on a blue background, at the top`, or in short `small red ring on blue`."""
    what = f"{scene.size} {scene.colour} {scene.shape}".strip()
    text = f"{_article(what)} on {_article(scene.background)} background" if long else f"{what} on {scene.background}"
    return ", ".join(part for part in (text, scene.position, scene.style and f"{scene.style} style") if part)


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def draw(scene: Scene, pixels: int = 128) -> NDArray[np.uint8]:
    """Draw a scene: (pixels, pixels, 3), edges smoothed over one pixel."""
    grid = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels - 0.5
    x, y = np.meshgrid(grid, grid)
    right, down = POSITIONS[scene.position]
    radius = _RADIUS * SIZES[scene.size] * scene.stretch
    x, y = x - right * _SHIFT - scene.dx, y - down * _SHIFT - scene.dy
    distance = SHAPES[scene.shape](x / radius, y / radius).astype(np.float32) * radius
    paint, ground = np.float32(COLOURS[scene.colour]), np.float32(COLOURS[scene.background])
    inside = _smooth(distance, pixels)
    if scene.style == "neon":
        # A bright line and its glow in the shape's colour, before the dark.
        glow = np.exp(-np.maximum(abs(distance) - _LINE / 2, 0) * 22)[..., None] * 0.75
        line = _smooth(abs(distance) - _LINE / 2, pixels)[..., None]
        bright = np.maximum(paint, 70)
        picture = (ground * 0.12) * (1 - glow) + bright * glow
        picture = picture * (1 - line) + (bright * 0.6 + 255 * 0.4) * line
    else:
        picture = ground + (paint - ground) * inside[..., None]
        if scene.style == "striped":
            stripe = _smooth(abs(((x + y) * 7) % 1 - 0.5) / 9.9 - 0.026, pixels)
            picture += (ground - picture) * (stripe * inside)[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _smooth(distance: Floats, pixels: int) -> Floats:
    return np.clip(0.5 - distance * pixels, 0, 1)
