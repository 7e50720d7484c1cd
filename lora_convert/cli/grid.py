"""`--grid scales=0,0.5,1` and `--grid seeds=0..3`: the axes of a sheet of pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lora_convert.errors import UsageError
from lora_convert.report import shown

__all__ = ["MOST_PICTURES", "Axis", "finite_number", "grid_axes", "places"]

MOST_PICTURES = 1000
_WRITE = "write scales=0,0.5,1 or seeds=0..3"


@dataclass(frozen=True)
class Axis:
    """One side of a sheet: `scales` or `seeds`, and the values along it."""

    name: str
    values: Sequence[float]

    def labels(self, *, factors: bool) -> list[str]:
        """One label per value; `factors` says that a scale multiplies others."""
        sign = " ×" if factors and self.name == "scales" else ""
        return [f"{self.name.removesuffix('s')}{sign} {value:.12g}" for value in self.values]


def grid_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """What each `--grid` says: none, the columns, or rows and columns. Raises UsageError for what is no axis."""
    axes = tuple(_axis(text) for text in texts)
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        raise UsageError("--grid takes one axis of scales and one of seeds; one is given twice")
    if math.prod(len(axis.values) for axis in axes) > MOST_PICTURES:
        raise UsageError(f"a sheet has at most {MOST_PICTURES:,} pictures")
    return axes


def _axis(text: str) -> Axis:
    name, _, listing = text.partition("=")
    if name not in ("scales", "seeds"):
        raise UsageError(f"--grid {shown(text)}: {_WRITE}")
    values: list[float] = []
    for part in listing.split(","):
        try:
            values += _seeds(part) if name == "seeds" else [finite_number(part)]
        except ValueError:
            said = "a seed, or a range from a smaller to a larger one" if name == "seeds" else "a number"
            raise UsageError(f"--grid {shown(text)}: {shown(repr(part))} is not {said}; {_WRITE}") from None
    return Axis(name, tuple(values))


def _seeds(text: str) -> Sequence[int]:
    """`7` or `0..3`, whose end belongs to it. Raises ValueError for anything else."""
    first, dots, last = text.partition("..")
    seeds = range(int(first), (int(last) if dots else int(first)) + 1)
    if not seeds or seeds[0] < 0:
        raise ValueError(text)
    return seeds[: MOST_PICTURES + 1]  # enough to be too many


def finite_number(text: str) -> float:
    """A number. Raises ValueError for anything else, NaN and infinities too."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def places(axes: Sequence[Axis]) -> Iterator[Mapping[str, float]]:
    """The values at every place of the sheet, row by row."""
    for values in product(*(axis.values for axis in axes)):
        yield {axis.name: value for axis, value in zip(axes, values, strict=True)}
