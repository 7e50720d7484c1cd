"""The exceptions of the package. Bad files are findings in a result; these are raised by `strict` or on misuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_convert.report import Finding

__all__ = ["BaseNeeded", "FileError", "LoraConvertError", "Unrepresentable", "UsageError"]


class LoraConvertError(Exception):
    """Base of everything this package raises on purpose."""


class UsageError(LoraConvertError):
    """The call itself is wrong: an unknown option value, an output that exists, a path that is not a file."""


class FileError(LoraConvertError):
    """The input cannot be read or cannot be done as asked. `findings` says all that is wrong with it."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("; ".join(str(finding) for finding in self.findings))

    def __reduce__(self) -> tuple[type[FileError], tuple[tuple[Finding, ...]]]:
        return type(self), (self.findings,)


class Unrepresentable(LoraConvertError):  # noqa: N818 (a property of the adapter, not a mistake)
    """An adapter has no exact form of the kind asked for; the message says why."""


class BaseNeeded(Unrepresentable):
    """What an adapter changes depends on the base model's weights, and none were given."""


def raise_errors(strict: bool, findings: Sequence[Finding]) -> None:
    """With `strict`, raise the findings of severity error as FileError, if there are any."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if strict and errors:
        raise FileError(errors)
