"""Contact sheets: labelled rows and columns of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_convert.errors import UsageError
from lora_convert.report import printable

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["sheet"]

_LEAST_WIDTH = 192  # pixels: what a label of a few words needs
_MOST_PIXELS = 60_000_000  # more than this and viewers refuse it
_MOST_LINES = 3
_FONT = 16
_TITLE_FONT = 20
_GAP = 10
_MARGIN = 20
_BACKGROUND = (250, 250, 248)
_INK = (34, 34, 34)
_FRAME = (208, 208, 204)


def sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str | None = None,
) -> Image.Image:
    """A sheet of pictures, one row after the other, with labels to the left and above; None leaves a place empty.

    Small pictures are enlarged by a whole factor, every pixel becoming a square; if the whole would be too large for
    viewers, all are made smaller. Long labels are wrapped, then shortened. Raises UsageError if there are no pictures,
    or labels that do not fit their number.
    """
    from PIL import Image, ImageDraw

    pictures = [picture for row in rows for picture in row if picture is not None]
    columns = max((len(row) for row in rows), default=0)
    if not pictures:
        raise UsageError("a sheet needs at least one picture")
    for what, labels, number in (("row", row_labels, len(rows)), ("column", column_labels, columns)):
        if labels and len(labels) != number:
            raise UsageError(f"the sheet has {number} {what}s but {len(labels)} labels for them")
    cell = _cell(pictures, len(rows) * columns)
    plan = _Plan.of(cell, row_labels, column_labels, title, columns)
    whole = Image.new("RGB", plan.size(len(rows), columns), _BACKGROUND)
    draw = ImageDraw.Draw(whole)
    plan.write(draw)
    for number, row in enumerate(rows):
        for place, picture in enumerate(row):
            if picture is not None:
                left, top = plan.corner(number, place)
                shown = _fitted(picture, cell)
                whole.paste(shown, (left, top))
                draw.rectangle((left - 1, top - 1, left + shown.width, top + shown.height), outline=_FRAME)
    return whole


def _cell(pictures: Sequence[Image.Image], number: int) -> tuple[int, int]:
    """Width and height that every picture gets."""
    width, height = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    factor: float = max(1, math.ceil(_LEAST_WIDTH / width))
    if width * height * factor**2 * number > _MOST_PIXELS:
        factor = min(1.0, math.sqrt(_MOST_PIXELS / (width * height * number)))
    return max(1, int(width * factor)), max(1, int(height * factor))


def _fitted(picture: Image.Image, cell: tuple[int, int]) -> Image.Image:
    """The picture in RGB, enlarged by a whole factor or made smaller, so that it fits into a cell."""
    from PIL import Image

    picture = picture.convert("RGB")
    factor = min(cell[0] / picture.width, cell[1] / picture.height)
    if factor >= 1:
        return picture.resize((picture.width * int(factor), picture.height * int(factor)), Image.Resampling.NEAREST)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Text:
    """Lines of one label, with the font that they are set in."""

    lines: Sequence[str]
    font: Any
    line_height: int

    @property
    def height(self) -> int:
        return len(self.lines) * self.line_height

    @property
    def width(self) -> int:
        return math.ceil(max((self.font.getlength(line) for line in self.lines), default=0.0))


@dataclass(frozen=True)
class _Plan:
    """Where everything lies."""

    cell: tuple[int, int]
    title: _Text
    row_labels: Sequence[_Text]
    column_labels: Sequence[_Text]
    left: int
    """Where the first column begins."""
    top: int
    """Where the first row begins."""

    @classmethod
    def of(
        cls,
        cell: tuple[int, int],
        row_labels: Sequence[str],
        column_labels: Sequence[str],
        title: str | None,
        columns: int,
    ) -> _Plan:
        rows = [_set(label, max(cell[0], _LEAST_WIDTH), _FONT) for label in row_labels]
        heads = [_set(label, cell[0], _FONT) for label in column_labels]
        beside = max((label.width for label in rows), default=0)
        left = _MARGIN + (beside + _GAP if beside else 0)
        above = _set(title or "", left - _MARGIN + columns * (cell[0] + _GAP) - _GAP, _TITLE_FONT)
        top = _MARGIN + (above.height + _GAP if above.lines else 0)
        head = max((label.height for label in heads), default=0)
        return cls(cell, above, rows, heads, left, top + (head + _GAP // 2 if head else 0))

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        right, bottom = self.corner(rows, columns)
        return right - _GAP + _MARGIN, bottom - _GAP + _MARGIN

    def corner(self, row: int, column: int) -> tuple[int, int]:
        return self.left + column * (self.cell[0] + _GAP), self.top + row * (self.cell[1] + _GAP)

    def write(self, draw: Any) -> None:
        """Title to the left, column labels centred above their columns, row labels before the middle of theirs."""
        _write(draw, self.title, _MARGIN, _MARGIN, 0.0)
        for number, label in enumerate(self.column_labels):
            left, top = self.corner(0, number)
            _write(draw, label, left + self.cell[0] / 2, top - _GAP // 2 - label.height, 0.5)
        for number, label in enumerate(self.row_labels):
            left, top = self.corner(number, 0)
            _write(draw, label, left - _GAP, top + (self.cell[1] - label.height) / 2, 1.0)


def _write(draw: Any, text: _Text, x: float, y: float, alignment: float) -> None:
    """Draw lines from (x, y) down; `alignment` of their length lies to the left of x."""
    for number, line in enumerate(text.lines):
        start = x - alignment * text.font.getlength(line)
        draw.text((start, y + number * text.line_height), line, fill=_INK, font=text.font)


def _set(label: str, width: int, size: int) -> _Text:
    """A label in lines no wider than `width` pixels, the last one shortened if there would be more than three."""
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    lines: list[str] = []
    rest = printable(" ".join(label.split()))
    while rest:
        end = _fitting(rest, font, width)
        if end < len(rest) and len(lines) == _MOST_LINES - 1:
            lines.append(rest[: max(1, _fitting(rest, font, width - math.ceil(font.getlength("…"))))].rstrip() + "…")
            break
        blank = rest.rfind(" ", 0, end + 1)
        cut = blank if end < len(rest) and blank > 0 else end
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return _Text(lines, font, math.ceil(size * 1.3))


def _fitting(text: str, font: Any, width: int) -> int:
    """How many characters of the text fit into a width; at least one."""
    low, high = 1, min(len(text), max(1, width))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
