"""`lora-convert golden`: record golden pictures of a suite, and check that it still draws them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_convert.cli.options import FAIL_ON, JSON, runtime
from lora_convert.cli.outcome import exit_status, say
from lora_convert.errors import UsageError
from lora_convert.report import MOST_FINDINGS, SCHEMA, counted, printable, shown, to_json

if TYPE_CHECKING:
    from lora_convert.runtime.golden import PictureResult, SuiteResult

__all__ = ["golden"]

_COLOURS = {"pass": "green", "fail": "red", "refused": "red", "recorded": "green", "updated": "yellow"}


def _drawing(command: Callable[..., int]) -> Callable[..., int]:
    """The argument and the options of both verbs."""
    options = (
        click.argument("suite", metavar="SUITE.toml"),
        click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this case; repeatable."),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda", "mps"]),
            help="Where to draw (default: as the suite says, else auto: cuda, then mps, then cpu).",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["fp32", "fp16", "bf16"]),
            help="The base model's precision (default: as the suite says, else fp32).",
        ),
        JSON,
        FAIL_ON,
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def golden() -> None:
    """Golden pictures: record what a suite draws, and check later that it still does.

    SUITE.toml lists adapters, base models, prompts and seeds (docs/golden.md). The golden pictures lie in a folder
    beside it, each with a JSON file that says all that determined it.
    """


@golden.command()
@_drawing
@click.option("--update", is_flag=True, help="Draw all anew and replace what changed (default: only what is missing).")
def record(as_json: bool, fail_on: str, **asked: Any) -> int:
    """Draw the golden pictures that a suite does not have yet.

    A picture that its adapters do not change is refused.

    \b
    Examples:
      lora-convert golden record golden/suite.toml
      lora-convert golden record golden/suite.toml --update --case neon
    """
    result = _run("record", as_json, **asked)
    say(as_json, result.as_dict(), _lines(result))
    return exit_status(result.findings, fail_on) if result.ok else 1


@golden.command()
@_drawing
@click.option("--report", type=click.Path(path_type=Path), metavar="HTML", help="Write a page with what failed.")
@click.option("--junit", type=click.Path(path_type=Path), metavar="XML", help="Write JUnit's XML, for CI.")
def check(as_json: bool, fail_on: str, report: Path | None, junit: Path | None, **asked: Any) -> int:
    """Draw a suite's pictures and compare them with the golden ones; the exit status is 1 if one fails.

    With --fail-on warning it is also 1 where golden pictures of another device or torch version were compared.

    \b
    Examples:
      lora-convert golden check golden/suite.toml
      lora-convert golden check golden/suite.toml --report golden.html --junit golden.xml
    """
    for path, ending in ((report, ".html"), (junit, ".xml")):
        if path is not None and path.suffix != ending:
            raise UsageError(f"the name {shown(str(path))} must end in {ending}")
    result = _run("check", as_json, **asked)
    pages = runtime("golden_report", "golden")
    if report is not None:
        pages.write_report(report, result)
    if junit is not None:
        pages.write_junit(junit, result)
    say(as_json, result.as_dict(), _lines(result, report))
    return exit_status(result.findings, fail_on) if result.ok else 1


def _run(verb: str, as_json: bool, suite: str, **asked: Any) -> SuiteResult:
    """Call the library's `record` or `check`; with --json a wrong use is an object too."""
    from lora_convert.cli.progress import progress_bar

    call = getattr(runtime("golden", "golden"), verb)
    try:
        with progress_bar(not as_json) as progress:
            result: SuiteResult = call(suite, progress=progress, **asked)
    except UsageError as error:
        if as_json:
            click.echo(to_json({"schema": SCHEMA, "suite": suite, "status": "refused", "error": str(error)}))
        raise
    return result


def _lines(result: SuiteResult, report: Path | None = None) -> Iterator[str]:
    """A line for every picture, the findings, and how it went."""
    from lora_convert.cli.text import finding_lines

    yield click.style(printable(result.suite), bold=True)
    width = max(len(picture.id) for picture in result.pictures)
    for picture in result.pictures:
        yield f"  {picture.id:{width}}  {_row(picture)}".rstrip()
    findings = result.findings
    yield from finding_lines(findings[:MOST_FINDINGS])
    if len(findings) > MOST_FINDINGS:
        yield f"  and {counted(len(findings) - MOST_FINDINGS, 'more finding')}; --json lists all"
    if result.conditions is not None:
        yield f"  drawn on {result.conditions}"
    counts = Counter(picture.status for picture in result.pictures)
    verdict = ", ".join(f"{number} {status}" for status, number in counts.items())
    yield "  " + click.style(verdict, fg="green" if result.ok else "red")
    if report is not None:
        yield f"  report: {printable(str(report))}"


def _row(picture: PictureResult) -> str:
    status = click.style(f"{picture.status:9}", fg=_COLOURS.get(picture.status))
    figures = str(picture.difference) if picture.difference else ""
    return f"{status}  {picture.level or '':6}  {figures}" if picture.level else f"{status}  {figures}"
