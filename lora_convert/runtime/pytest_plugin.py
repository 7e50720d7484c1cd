"""Golden pictures in other projects' tests: the pytest fixture `lora_golden`.

    def test_style(lora_golden):
        lora_golden.check(pipeline("a red circle").images[0], "red-circle")

compares a picture with `golden/red-circle.png` beside the test's file; `pytest --lora-golden-update` draws the golden
pictures. Every pytest run loads this module once the package is installed, so it imports nothing until it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from PIL import Image

    from lora_convert.runtime.comparing import Difference, Picture
    from lora_convert.runtime.policy import Tolerance

__all__ = ["LoraGolden"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_PROPERTY = "lora_golden"
_written = pytest.StashKey[set[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options and the setting of the fixture."""
    group = parser.getgroup("lora_golden", "golden pictures (lora-convert)")
    group.addoption("--lora-golden-update", action="store_true", help="write the golden pictures instead of comparing")
    group.addoption(
        "--lora-golden-output",
        metavar="DIR",
        help="where to put pictures that differ and their difference maps (default: the test's tmp_path)",
    )
    group.addoption("--lora-golden-dir", metavar="DIR", help="goes before the setting lora_golden_dir")
    parser.addini(
        "lora_golden_dir", "folder of the golden pictures, beside the test's file if relative", default="golden"
    )


@pytest.fixture
def lora_golden(request: pytest.FixtureRequest) -> LoraGolden:
    """Compare pictures with golden ones: `lora_golden.check(image, "name")`."""
    return LoraGolden(request)


class LoraGolden:
    """The golden pictures of one test."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        config = request.config
        self._request = request
        self._update = bool(config.getoption("lora_golden_update"))
        self._written = config.stash.setdefault(_written, set())
        self.folder = request.path.parent / (config.getoption("lora_golden_dir") or config.getini("lora_golden_dir"))
        """Where the golden pictures are."""

    def check(
        self, image: Picture, name: str, *, tolerance: str | Mapping[str, float] | Tolerance | None = None
    ) -> Difference:
        """Fail the test if `image` is not as the golden picture of this name; return how far it is from it.

        `image` is a PIL image or an array, uint8, (height, width[, 1, 3 or 4]). `name` has letters, digits, `._-`, and
        slashes for folders. `tolerance` is a level of the policy (`strict`, `loose`, `wide`), figures that replace some
        of `wide`'s (`{"flip": 0.1}`), or a `Tolerance`; the default is `wide`, by which another machine's picture
        passes. With --lora-golden-update the picture is written instead, unless it shows the same already.
        """
        from lora_convert.runtime.comparing import compare, picture_of

        __tracebackhide__ = True
        limits = _tolerance(tolerance)
        if not _NAME.fullmatch(name):
            pytest.fail(f"{name!r} is no name of a golden picture: letters, digits, dots, hyphens, slashes", False)
        path, drawn = self.folder / f"{name}.png", picture_of(image)
        if self._update and path not in self._written:
            return self._write(path, drawn)
        golden = self._golden(path, name, drawn)
        if golden.size != drawn.size:
            sizes = f"{drawn.width}×{drawn.height} pixels, and its golden picture {golden.width}×{golden.height}"
            self._fail(f"the picture {name!r} has {sizes}", name, drawn)
        difference = compare(golden, drawn)
        excesses = ", ".join(limits.excesses(difference))
        if excesses and path in self._written:
            pytest.fail(f"two tests write the golden picture {name!r}, and their pictures differ: {excesses}", False)
        if excesses:
            self._fail(f"the picture {name!r} differs from {_short(path)}: {excesses}", name, drawn, golden)
        return difference

    def _write(self, path: Path, drawn: Image.Image) -> Difference:
        from lora_convert.runtime.comparing import Difference
        from lora_convert.runtime.golden_file import write_picture

        self._written.add(path)
        if write_picture(path, drawn):
            self._request.node.user_properties.append((_PROPERTY, f"wrote {_short(path)}"))
        return Difference(0.0, 1.0, 0.0)

    def _golden(self, path: Path, name: str, drawn: Image.Image) -> Image.Image:
        from lora_convert.runtime.golden_file import read_picture

        __tracebackhide__ = True
        draw = f"pytest {_short(self._request.path)} --lora-golden-update"
        if not path.exists():
            self._fail(f"there is no golden picture {_short(path)}; draw it with: {draw}", name, drawn)
        try:
            return read_picture(path)
        except (OSError, ValueError) as error:
            self._fail(f"{_short(path)} cannot be read ({error}); draw it anew with: {draw}", name, drawn)
            raise

    def _fail(self, said: str, name: str, drawn: Image.Image, golden: Image.Image | None = None) -> None:
        """Fail the test, and leave what a person needs to see why."""
        from lora_convert.runtime.comparing import difference_map, legible_factor
        from lora_convert.runtime.golden_file import write_picture

        __tracebackhide__ = True
        new = self._output() / f"{name}.new.png"
        write_picture(new, drawn)
        lines = [said, f"  as it is now: {new}"]
        if golden is not None:
            difference = new.with_name(new.name.replace(".new.png", ".difference.png"))
            factor = legible_factor(golden, drawn)
            write_picture(difference, difference_map(golden, drawn, factor))
            lines.append(f"  difference × {factor:g}: {difference}")
            lines.append("If the change is meant, run again with --lora-golden-update.")
        pytest.fail("\n".join(lines), pytrace=False)

    def _output(self) -> Path:
        """A folder of the test's own; below --lora-golden-output it has the names of the test and its file."""
        asked = self._request.config.getoption("lora_golden_output")
        if asked is None:
            folder: Path = self._request.getfixturevalue("tmp_path")
            return folder
        return Path(asked) / re.sub(r"[^\w.-]+", "-", self._request.node.nodeid).strip("-")


def _tolerance(asked: str | Mapping[str, float] | Tolerance | None) -> Tolerance:
    """Raises UsageError for a level or a figure that there is not."""
    from lora_convert.errors import UsageError
    from lora_convert.runtime.policy import FIGURES, POLICY, Tolerance

    if isinstance(asked, Tolerance):
        return asked
    if isinstance(asked, Mapping):
        unknown = asked.keys() - set(FIGURES)
        if unknown:
            raise UsageError(f"a tolerance has {', '.join(FIGURES)}, and no {sorted(unknown)[0]}")
        return POLICY["wide"].tolerance.given(asked)
    level = POLICY.get(asked or "wide")
    if level is None:
        raise UsageError(f"{asked!r} is no level of the policy; there are {', '.join(POLICY)}")
    return level.tolerance


def _short(path: Path) -> str:
    """The path as a person at the shell would give it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which golden pictures were written, by whichever worker."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    said = {
        text
        for report in reports
        if getattr(report, "when", None) == "call"
        for key, text in getattr(report, "user_properties", ())
        if key == _PROPERTY
    }
    if said:
        terminalreporter.section("golden pictures")
        for line in sorted(said):
            terminalreporter.write_line(line)
