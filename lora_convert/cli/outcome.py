"""What every verb does with its results: say them as text or JSON, and make the exit status of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from lora_convert.errors import UsageError
from lora_convert.report import SCHEMA, Finding, printable, severest, to_json

__all__ = ["Outcome", "each", "exit_status", "failed", "say"]


def say(as_json: bool, content: dict[str, Any], lines: Iterable[str]) -> None:
    """Print a result as one line of JSON, or its lines of text."""
    if as_json:
        click.echo(to_json(content))
    else:
        for line in lines:
            click.echo(line)


Outcome = tuple[bool, Sequence[Finding], dict[str, Any], Iterable[str]]
"""Whether it went well, what there is to say, and the same as JSON and as text."""


def each(
    files: Sequence[str],
    targets: Sequence[Any],
    as_json: bool,
    fail_on: str,
    one: Callable[[str, Any], Outcome],
) -> int:
    """Do something with every file and say what came of it; a wrong use with one file does not stop the others."""
    status = 0
    for file, target in zip(files, targets, strict=True):
        try:
            ok, findings, content, lines = one(file, target)
        except UsageError as error:
            if as_json:
                click.echo(to_json({"schema": SCHEMA, "file": file, "status": "refused", "error": str(error)}))
            status = max(status, failed(str(error), 2))
            continue
        say(as_json, content, lines)
        status = max(status, exit_status(findings, fail_on) if ok else 1)
    return status


def exit_status(findings: Sequence[Finding], fail_on: str) -> int:
    """1 if one of the findings is as severe as `--fail-on` says, else 0."""
    worst = severest(findings)
    return 1 if worst == "error" or (worst == "warning" and fail_on == "warning") else 0


def failed(sentence: str, status: int) -> int:
    """Say on standard error why a verb could not run, and return its exit status."""
    click.echo(f"lora-convert: {printable(sentence)}", err=True)
    return status
