"""What the package says: findings with names, as text for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "FINDINGS",
    "MOST_FINDINGS",
    "SCHEMA",
    "Finding",
    "Severity",
    "counted",
    "json_number",
    "listed",
    "printable",
    "severest",
    "shown",
    "to_json",
]

MOST_FINDINGS = 20
"""Findings of one kind that are listed; what is more is counted."""

SCHEMA = 1
"""Version of the JSON that `--json` prints and `as_dict()` returns."""

Severity = Literal["note", "warning", "error"]

_ORDER: Mapping[str, int] = {"note": 0, "warning": 1, "error": 2}

FINDINGS: Mapping[str, str] = {
    # the container
    "malformed-header": "the file breaks the safetensors format",
    "unknown-field": "a header entry has a field that the format does not define",
    "leading-space": "the header starts with white space instead of `{`",
    "suspicious-name": "a tensor name that no trainer writes",
    "empty-file": "there are no tensors, or nothing in them",
    "not-weights": "the content is something else than the file name promises",
    "unsafe-pickle": "a pickle or its archive asks for more than tensors, or could mislead a reader",
    "malformed-pickle": "the file breaks the format of PyTorch's files",
    "malformed-picture": "a picture, or the embedding in it, breaks its format, or asks for far more than any known",
    "no-embedding": "a picture that carries no embedding, or has lost it",
    "carriers-differ": "the text and the pixels of a picture carry different embeddings",
    "beside-weights": "a checkpoint holds tensors of its training beside the weights, which were not read",
    "unreadable": "the file cannot be opened or read",
    "several-files": "the address names no file, and there are several",
    # what it is
    "unknown-format": "no known kind of adapter fits the tensors",
    "unsupported-kind": "recognised, but not something this version converts",
    "ambiguous-family": "the tensors fit several families equally",
    "unexplained-tensor": "a tensor that belongs to no known module or parameter",
    "missing-partner": "half of a pair of matrices is absent",
    "shape-misfit": "a tensor does not fit the module it names",
    "duplicate-module": "one module is given twice, under two names",
    "base-variant": "fits only a variant of the base model (inpainting and the like)",
    "unreadable-config": "an adapter configuration that cannot be used",
    "unknown-width": "vectors as wide as no known text encoder's",
    "output-vectors": "vectors for behind the text encoder, which only OneTrainer has, were left out",
    # what the numbers say
    "alpha-unknown": "the scale was left out of the file; 1 is assumed",
    "alpha-convention": "trainer and readers disagree on the scale; the readers' is used",
    "odd-alpha": "an alpha that is zero, negative or otherwise unusual",
    "not-finite": "NaN or infinity",
    "odd-norms": "vectors much longer or shorter than those of words",
    "no-effect": "a module, or the whole file, changes nothing",
    "overflow": "a value does not fit the output's dtype",
    "underflow": "values became zero in the output's dtype",
    "dtype-changed": "the output has another dtype than the source",
    "alpha-rounded": "folding the scale into the matrices rounded them",
    "folded": "factors were multiplied together once, because the target has fewer",
    "rank-needed": "a weight change has no exact form as a LoRA; the user has to say what may be lost",
    "rank-truncated": "a weight change was cut to a rank, with this error",
    "base-needed": "a weight change depends on the base model's weights, which were not given",
    "two-files": "the output is two files, to be loaded as two adapters",
    # what an embedding is called
    "token-missing": "neither the file nor its name nor the user says what an embedding is called",
    "token-from-name": "the file names no token; its own name is used",
    "token-differs": "the file's name, by which A1111 calls the embedding, is not the one inside",
    "token-lowercased": "a token with capitals and several vectors is written in lower case",
    "token-known": "the user's token is in the vocabulary, and Diffusers' own loader refuses it",
    "token-renamed": "a token that nobody could type, or that cannot be a file's name, was replaced",
    # what was done
    "skipped": "tensors were left out because the user asked for it",
    "not-for-comfyui": "ComfyUI does not read this layout",
    "not-for-diffusers": "Diffusers has no loader for this on that base model",
    "not-for-a1111": "A1111 and Forge do not read all of it",
    "module-not-loaded": "a module of the file did not arrive in the model",
    "half-applied": "the file is one of two that belong together, and the other was not applied",
    "half-embedding": "an embedding has no vectors for one of the base model's text encoders",
    "delta-mismatch": "the output does not change the weights as the source does",
    "vectors-mismatch": "the output does not hold the vectors of the source",
    "base-lacks-module": "the base model has no such weights as the file changes",
    "ema-unchanged": "a checkpoint's averaged weights stay as they were",
    "not-merged": "an embedding that a LoRA carries is no part of a merged model",
    "merge-rounded": "rounding the merged weights took a part of the change",
    # what was drawn
    "prompt-truncated": "a prompt is longer than the text encoder reads",
    "token-unused": "an embedding's token is in no prompt, so that it changes nothing",
    "base-widths": "the base model given has the file's blocks in other widths, so that no picture is possible",
    "picture-mismatch": "a picture is not what it should be",
    "golden-missing": "there is no golden picture to compare with",
    "golden-damaged": "a golden picture or its sidecar cannot be used",
    "golden-outdated": "a golden picture was drawn with other settings",
    "golden-unused": "golden pictures that no case of the suite draws",
    "other-conditions": "golden pictures of another machine or version: wider tolerances were used",
    "unsteady-picture": "a picture hangs on the last bits of the weights",
}
"""Every finding's name and what it means; docs/findings.md explains each."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth saying: a name out of `FINDINGS`, what it is about, what was expected and found, what to do."""

    name: str
    severity: Severity
    subject: str
    message: str
    fix: str = ""

    def __post_init__(self) -> None:
        if self.name not in FINDINGS:
            raise ValueError(f"{self.name!r} is not a known finding")

    def __str__(self) -> str:
        subject = f"{shown(self.subject)}: " if self.subject else ""
        return f"{self.name}: {subject}{printable(self.message)}" + (f" {printable(self.fix)}" if self.fix else "")

    def as_dict(self) -> dict[str, str]:
        return {
            "name": self.name,
            "severity": self.severity,
            "subject": self.subject,
            "message": self.message,
            "fix": self.fix,
        }


def severest(findings: Iterable[Finding]) -> Severity | None:
    """The highest severity among the findings, None if there are none."""
    return max((finding.severity for finding in findings), key=_ORDER.__getitem__, default=None)


def printable(text: str) -> str:
    """Text out of a file, safe for a terminal: control, format (bidirectional) and surrogate characters escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if not unicodedata.category(character).startswith(("C", "Zl", "Zp")) else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shown(text: str, limit: int = 120) -> str:
    """`printable`, and shortened in the middle when it is longer than `limit` characters."""
    safe = printable(text)
    if len(safe) <= limit:
        return safe
    half = (limit - 1) // 2
    return f"{safe[:half]}…{safe[-half:]}"


def counted(number: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(items: Sequence[str], limit: int = 5) -> str:
    """A sentence fragment that names the first few items and counts the others."""
    named = ", ".join(shown(item) for item in items[:limit])
    rest = len(items) - limit
    return f"{named} and {rest} more" if rest > 0 else named


def json_number(value: float) -> float | str:
    """A number as JSON can hold it: NaN and infinities as text."""
    return value if math.isfinite(value) else str(value)


def to_json(content: Mapping[str, Any]) -> str:
    """One line of JSON; only ASCII, so that no character out of a file reaches the terminal raw."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False)
