"""The rungs of the proof that need torch, on top of those that do not: loading into the real classes, and pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_convert.containers import Source, Target, opened
from lora_convert.converters.adapters import read_adapter
from lora_convert.converters.convert import Progress, ValidateResult, local_path, validate
from lora_convert.converters.fidelity import Rung, relative_error
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import Detection
from lora_convert.report import MOST_FINDINGS, Finding
from lora_convert.runtime.loading import (
    LOADED_TOLERANCE,
    LoadedAdapter,
    LoadingError,
    load_adapter,
    not_adapted,
    not_loaded,
    off_by,
)

if TYPE_CHECKING:
    from lora_convert.runtime.picture import Drawing

__all__ = ["climb"]


def climb(
    out: str | Path,
    against: Target | None = None,
    *,
    base: str | Path | None = None,
    drawing: Drawing | None = None,
    report: str | Path | None = None,
    sheet: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> ValidateResult:
    """`lora_convert.validate`, and if that passes the rungs `load` and, with a `base`, `picture`.

    `out` is a path or a hub address of a file in the Diffusers layout; options are those of `validate`. For `load`
    every module of the file must arrive in the real architecture (built without weights) with the ΔW that its tensors
    say, whatever the loader itself reports; one that does not is the finding `module-not-loaded`. For `picture` the
    base model (see `open_pipeline`) draws alone, with the source merged into it, and with the file loaded: the last two
    must agree within what rounding explains. `report` names an HTML page to write, `sheet` a PNG with all that was
    drawn; of a file or source that cannot be read there is no report, only the result. Raises UsageError for a base
    that cannot be opened or is of another family.
    """
    if base is not None or report is not None:
        from lora_convert.runtime.picture import Drawing, prove
        from lora_convert.runtime.proof_page import write_proof, write_sheet

    path = Path(local_path(str(out)))
    result = replace(validate(path, against, progress=progress, **options), file=str(out))
    loaded = _load(path, options.get("family")) if result.ok else Rung("skipped", "an earlier rung failed")
    result, gallery = _with(result, "load", loaded), None
    if base is not None and loaded.status != "pass":
        reason = loaded.reason if loaded.status == "skipped" else "an earlier rung failed"
        result = _with(result, "picture", Rung("skipped", reason))
    elif base is not None:
        with _sources(path, against, options) as files:
            error = result.worst_delta_error
            rung, gallery = prove(path, *files, str(base), drawing or Drawing(), delta_error=error, progress=progress)
        result = _with(result, "picture", rung)
    if sheet is not None and gallery is not None:
        write_sheet(Path(sheet), gallery)
    if report is not None and result.family is not None:
        with _sources(path, against, options) as files:
            write_proof(Path(report), result, *files, gallery)
    return result


@contextlib.contextmanager
def _sources(
    path: Path, against: Target | None, options: Mapping[str, Any]
) -> Iterator[tuple[Source, Detection, Source, Detection]]:
    """The file and its source, open, with what they are; a file without a source is its own."""
    family, header = options.get("family"), {k: options[k] for k in ("max_header",) if k in options}
    with contextlib.ExitStack() as opens:
        output = opens.enter_context(opened(path, **header))
        found = detect(output, family=family)
        if against is None:
            yield output, found, output, found
            return
        source = opens.enter_context(opened(local_path(against), skip=options.get("skip", ()), **header))
        yield output, found, source, detect(source, family=family or found.family, config=options.get("config"))


def _with(result: ValidateResult, name: str, rung: Rung) -> ValidateResult:
    """The result with one more rung."""
    status = "fail" if rung.status == "fail" else result.status
    findings = (*result.findings, *rung.findings)
    return replace(result, rungs={**result.rungs, name: rung}, findings=findings, status=status)


def _load(path: Path, family: str | None) -> Rung:
    with opened(path) as source:
        found = detect(source, family=family)
        if found.family is None or any(module.spelling != "diffusers" for module in found.payload):
            return Rung("skipped", "only files in the Diffusers layout are loaded")
        try:
            loaded = load_adapter(path, found.family)
        except LoadingError as error:
            return Rung("fail", "the loader raised", findings=(not_loaded("", f"The loader failed: {error}."),))
        return _compare(source, found, loaded)


def _compare(source: Source, found: Detection, loaded: LoadedAdapter) -> Rung:
    """Every module of the file against what arrived."""
    expected = {module.modules[0].name: module for module in found.payload}
    findings = [not_adapted(name) for name in expected.keys() - loaded.adapters.keys()]
    errors = {
        name: relative_error(read_adapter(source, module).to_lora(), loaded.adapters[name])
        for name, module in expected.items()
        if name in loaded.adapters
    }
    findings += [off_by(name, error) for name, error in errors.items() if error > LOADED_TOLERANCE]
    figures: Mapping[str, Any] = {
        "modules": len(expected),
        "loaded": len(loaded.adapters),
        "worst": max(errors.values(), default=None),
        "warnings": list(loaded.warnings),
    }
    return Rung("fail" if findings else "pass", figures=figures, findings=_first(findings))


def _first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda finding: finding.subject)[:MOST_FINDINGS])
