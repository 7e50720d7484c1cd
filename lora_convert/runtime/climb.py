"""The rungs of the proof that need torch, on top of those that do not: loading into the real classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_convert.containers import Source, Target, opened
from lora_convert.converters.adapters import read_adapter
from lora_convert.converters.convert import ValidateResult, local_path, validate
from lora_convert.converters.fidelity import Rung, relative_error
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import Detection
from lora_convert.report import MOST_FINDINGS, Finding
from lora_convert.runtime.loading import LoadedAdapter, LoadingError, load_adapter

__all__ = ["climb"]

_TOLERANCE = 2e-6
"""Relative error of a loaded ΔW: the loader multiplies in float32, and the scale is a quotient."""


def climb(out: str | Path, against: Target | None = None, **options: Any) -> ValidateResult:
    """`lora_convert.validate`, and if that passes, the rung `load`: the file is loaded by its pipeline's own loader.

    `out` is a path or a hub address of a file in the Diffusers layout; options are those of `validate`. Every module of
    the file must arrive in the real architecture (built without weights) with the ΔW that its tensors say, whatever the
    loader itself reports; one that does not is the finding `module-not-loaded`.
    """
    path = Path(local_path(str(out)))
    result = validate(path, against, **options)
    rung = _load(path, options.get("family")) if result.ok else Rung("skipped", "an earlier rung failed")
    findings = (*result.findings, *rung.findings)
    status = "fail" if rung.status == "fail" else result.status
    return replace(result, file=str(out), rungs={**result.rungs, "load": rung}, findings=findings, status=status)


def _load(path: Path, family: str | None) -> Rung:
    with opened(path) as source:
        found = detect(source, family=family)
        if found.family is None or any(module.spelling != "diffusers" for module in found.payload):
            return Rung("skipped", "only files in the Diffusers layout are loaded")
        try:
            loaded = load_adapter(path, found.family)
        except LoadingError as error:
            failure = Finding("module-not-loaded", "error", "", f"The loader failed: {error}.")
            return Rung("fail", "the loader raised", findings=(failure,))
        return _compare(source, found, loaded)


def _compare(source: Source, found: Detection, loaded: LoadedAdapter) -> Rung:
    """Every module of the file against what arrived."""
    expected = {module.modules[0].name: module for module in found.payload}
    findings = [
        Finding("module-not-loaded", "error", name, "It is in the file, but the loader did not adapt it.")
        for name in expected.keys() - loaded.adapters.keys()
    ]
    errors = {
        name: relative_error(read_adapter(source, module).to_lora(), loaded.adapters[name])
        for name, module in expected.items()
        if name in loaded.adapters
    }
    wrong = {name: error for name, error in errors.items() if error > _TOLERANCE}
    findings += [
        Finding("module-not-loaded", "error", name, f"It arrived changed: its ΔW is off by {error:.2e} of its norm.")
        for name, error in wrong.items()
    ]
    figures: Mapping[str, Any] = {
        "modules": len(expected),
        "loaded": len(loaded.adapters),
        "worst": max(errors.values(), default=None),
        "warnings": list(loaded.warnings),
    }
    return Rung("fail" if findings else "pass", figures=figures, findings=_first(findings))


def _first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda finding: finding.subject)[:MOST_FINDINGS])
