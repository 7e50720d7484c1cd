"""What came of a suite as a page for people, with the pictures that failed, and as JUnit's XML for CI."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from lora_convert._version import __version__
from lora_convert.converters.writer import atomic_file
from lora_convert.report import printable
from lora_convert.runtime.comparing import difference_map, legible_factor
from lora_convert.runtime.golden import PictureResult, SuiteResult

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["junit_xml", "report_html", "write_junit", "write_report"]


def write_report(path: str | Path, result: SuiteResult) -> None:
    """Write the page to `path`, whole or not at all. Raises UsageError if the folder cannot be written to."""
    _write(Path(path), report_html(result).encode())


def write_junit(path: str | Path, result: SuiteResult) -> None:
    """Write JUnit's XML to `path`, whole or not at all. Raises UsageError if the folder cannot be written to."""
    _write(Path(path), junit_xml(result))


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)


@dataclass(frozen=True)
class _Shown:
    """One picture of the page: golden, drawn now, and where they differ, so many times; None for what there is not."""

    result: PictureResult
    golden: str | None
    drawn: str | None
    difference: str | None = None
    factor: float = 1.0


def report_html(result: SuiteResult) -> str:
    """The page as HTML, with everything that it shows inside it: every picture's figures, and those that failed."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_harmless
    )
    environment.filters["allowed"] = _allowed
    template = environment.from_string(Path(__file__).with_name("golden.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        result=result,
        shown=[_shown(picture) for picture in result.pictures if picture.findings],
        failed=sum(not picture.ok for picture in result.pictures),
        version=__version__,
    )


def _shown(result: PictureResult) -> _Shown:
    golden, drawn = result.golden, result.drawn
    shown = _Shown(result, _data_uri(golden), _data_uri(drawn))
    if golden is None or drawn is None or golden.size != drawn.size:
        return shown
    factor = legible_factor(golden, drawn)
    return replace(shown, difference=_data_uri(difference_map(golden, drawn, factor)), factor=factor)


def _data_uri(picture: Image.Image | None) -> str | None:
    """The picture itself as an address, exactly."""
    if picture is None:
        return None
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _harmless(value: Any) -> Any:
    """Text without control and bidirectional characters; escaping as HTML comes after it."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _allowed(content: str) -> str:
    """The source expression that lets the page's policy admit this one style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def junit_xml(result: SuiteResult) -> bytes:
    """A test suite with a case per picture, and one for what concerns them all if that failed."""
    failures = sum(not picture.ok for picture in result.pictures)
    suite = ElementTree.Element(
        "testsuite", name=printable(result.suite), tests=str(len(result.pictures)), failures=str(failures), errors="0"
    )
    for picture in result.pictures:
        case_name, _, number = picture.id.rpartition("/")
        case = ElementTree.SubElement(suite, "testcase", classname=case_name, name=number)
        said = [str(finding) for finding in picture.findings]
        if not picture.ok:
            failure = ElementTree.SubElement(case, "failure", message=said[0], type=picture.findings[0].name)
            failure.text = "\n".join(said)
        elif said:
            ElementTree.SubElement(case, "system-out").text = "\n".join(said)
    if result.suite_findings:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(map(str, result.suite_findings))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"
