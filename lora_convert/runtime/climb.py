"""The rungs of the proof that need torch, on top of those that do not: loading into the real classes, and pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_convert.containers import Source, Target, opened
from lora_convert.converters.adapters import read_adapter
from lora_convert.converters.base import open_base
from lora_convert.converters.convert import Progress, ValidateResult, local_path, output_files, validate
from lora_convert.converters.embeddings import embedding_files
from lora_convert.converters.fidelity import Rung
from lora_convert.errors import FileError, UsageError
from lora_convert.families import FAMILIES
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import Detection
from lora_convert.report import MOST_FINDINGS, Finding, json_number, shown
from lora_convert.runtime.baked import Baked, compare_models, is_model
from lora_convert.runtime.loading import (
    LoadedAdapter,
    LoadingError,
    arrival_errors,
    bare_components,
    collected_warnings,
    load_adapter,
    not_adapted,
    not_loaded,
    what_arrived_wrong,
)

if TYPE_CHECKING:
    from lora_convert.runtime.picture import Drawing, Gallery

__all__ = ["ProofFiles", "climb"]


@dataclass(frozen=True)
class ProofFiles:
    """The weight files of an output and its source, open, with what they are; an output without a source is its own.

    `outputs` is empty for a merged model.
    """

    outputs: tuple[tuple[Source, Detection], ...]
    source: Source
    truth: Detection


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

    `out` is a path or a hub address of a file in the Diffusers layout, a folder of such files or of peft's, or a model
    into which the source was merged (then `against` and `base` are needed); options are those of `validate`. For `load`
    every module must arrive in the real architecture (built without weights) with the values that its tensors have,
    and every vector of an embedding where a prompt has its token, whatever the loader itself reports; what does not is
    the finding `module-not-loaded`. For `picture` the base
    model (see `open_pipeline`) draws alone, with the source merged into it (an embedding's vectors put into prompts by
    their definition), and with the output loaded: the last two
    must agree within what rounding, and an error that the delta rung let pass, explain. `report` names an HTML page to
    write, `sheet` a PNG with all that was drawn; of what cannot be read there is no report, only the result. Raises
    UsageError for a base that cannot be opened or is of another family.
    """
    if base is not None or report is not None:
        from lora_convert.runtime.picture import Drawing
        from lora_convert.runtime.proof_page import write_proof, write_sheet

    path, gallery, baked, weights = Path(local_path(str(out))), None, None, None
    if is_model(path):
        if against is None or base is None:
            said = "is a whole model; what was merged into it shows only against its source and its base model"
            raise UsageError(f"{shown(path.resolve().name)} {said} (--against, --base)")
        result, baked = _validate_model(path, str(out), against, base, drawing, progress, options)
    else:
        options = options if base is None else dict(_with_family(options, base, path, against))
        weights = None if base is None else _fitting(base, path, against, options)
        result = replace(validate(path, against, base=weights, progress=progress, **options), file=str(out))
        loaded = _load(path, against, result, options) if result.ok else Rung("skipped", "an earlier rung failed")
        result = _with(result, "load", loaded)
    if base is not None:
        result, gallery = _picture(result, path, against, str(base), drawing or Drawing(), baked, progress, options)
    if sheet is not None and gallery is not None:
        write_sheet(Path(sheet), gallery)
    if report is not None and result.family is not None:
        with _opened(path, against, options) as files:
            write_proof(Path(report), result, files, gallery, _asked(base, drawing, options), baked=baked, base=weights)
    return result


def _asked(base: str | Path | None, drawing: Drawing | None, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was asked of a climb, by the names of the command's options; None for what was left as it is."""
    asked: dict[str, Any] = {name: options.get(name) for name in ("family", "skip")}
    if options.get("config"):
        asked["config"] = Path(options["config"])
    if base is None:
        return asked
    asked["base"] = Path(base) if Path(base).exists() else base
    if drawing is not None:
        usual = type(drawing)()
        asked |= {"prompt": drawing.prompts, "steps": drawing.steps, "seed": drawing.seed}
        names = ("scale", "device", "dtype")
        asked |= {name: getattr(drawing, name) for name in names if getattr(drawing, name) != getattr(usual, name)}
    return asked


@contextlib.contextmanager
def _opened(path: Path, against: Target | None, options: Mapping[str, Any]) -> Iterator[ProofFiles]:
    """The files of an output and its source."""
    family, header = options.get("family"), {k: options[k] for k in ("max_header",) if k in options}
    with contextlib.ExitStack() as opens:
        files = () if is_model(path) else (*output_files(path), *_embedded(path)) or (path,)
        sources = [opens.enter_context(opened(file, **header)) for file in files]
        outputs = tuple((source, detect(source, family=family)) for source in sources)
        if against is None:
            yield ProofFiles(outputs, *outputs[0])
            return
        source = opens.enter_context(opened(local_path(against), skip=options.get("skip", ()), **header))
        known = family or next((found.family for _, found in outputs if found.family), None)
        yield ProofFiles(outputs, source, detect(source, family=known, config=options.get("config")))


def _embedded(path: Path) -> tuple[Path, ...]:
    """The files of embeddings in a folder."""
    return embedding_files(path) if path.is_dir() else ()


def _with_family(options: Mapping[str, Any], base: str | Path, path: Path, against: Target | None) -> Mapping[str, Any]:
    """The options with the base model's family, where the vectors of an embedding fit several. Raises UsageError for a
    base of none of them.
    """
    try:
        with _opened(path, against, options) as files, open_base(base) as weights:
            truth, family = files.truth, weights.family
    except FileError:
        return options
    if truth.kind != "embedding" or truth.family is not None or not truth.rivals:
        return options
    rivals = [rival.family for rival in truth.rivals]
    if family not in rivals:
        said = f"the base model {shown(str(base))} is of the family {family}"
        raise UsageError(f"{said}, and the file is for {' or '.join(rivals)}; give a base of that")
    return {**options, "family": family}


def _fitting(base: str | Path, path: Path, against: Target | None, options: Mapping[str, Any]) -> str | Path | None:
    """The base model, for what depends on its weights, if it is of the output's family; else the picture says so."""
    try:
        with _opened(path, against, options) as files, open_base(base) as weights:
            return base if weights.family == files.truth.family else None
    except FileError:
        return None


def _with(result: ValidateResult, name: str, rung: Rung) -> ValidateResult:
    """The result with one more rung."""
    status = "fail" if rung.status == "fail" else result.status
    findings = (*result.findings, *rung.findings)
    return replace(result, rungs={**result.rungs, name: rung}, findings=findings, status=status)


def _picture(
    result: ValidateResult,
    path: Path,
    against: Target | None,
    base: str,
    drawing: Drawing,
    baked: Baked | None,
    progress: Progress | None,
    options: Mapping[str, Any],
) -> tuple[ValidateResult, Gallery | None]:
    """The result with the rung `picture`, and what was drawn for it."""
    from lora_convert.runtime.picture import prove

    before = list(result.rungs.values())[-1]
    if before.status != "pass":
        reason = before.reason if before.status == "skipped" else "an earlier rung failed"
        return _with(result, "picture", Rung("skipped", reason)), None
    with _opened(path, against, options) as files:
        rung, gallery = prove(
            path,
            files.outputs,
            files.source,
            files.truth,
            base,
            drawing,
            delta_error=result.worst_delta_error,
            roundoff=baked.roundoff if baked else 0.0,
            progress=progress,
        )
    return _with(result, "picture", rung), gallery


def _validate_model(
    path: Path,
    name: str,
    against: Target,
    base: str | Path,
    drawing: Drawing | None,
    progress: Progress | None,
    options: Mapping[str, Any],
) -> tuple[ValidateResult, Baked | None]:
    """The rung `delta` of a merged model; a source that is not sound is said to be so, as `validate` does."""
    try:
        with _opened(path, against, options) as files:
            truth, source = files.truth, files.source
            if truth.family is None or not truth.ok:
                raise FileError(truth.findings)
            baked = compare_models(path, base, source, truth, drawing.scale if drawing else 1.0, progress)
    except FileError as error:
        broken = Rung("fail", "a file cannot be read, or the source is not sound", findings=error.findings)
        return ValidateResult(name, str(against), "fail", None, {"structure": broken}, error.findings), None
    result = ValidateResult(name, truth.file, "pass", truth.family)
    return _with(result, "delta", baked.delta), baked


def _load(path: Path, against: Target | None, result: ValidateResult, options: Mapping[str, Any]) -> Rung:
    """The rung `load` of a file or folder: what arrives, against what is in the files."""
    with _opened(path, against, options) as files:
        embeddings = [output for output in files.outputs if output[1].kind == "embedding"]
        if not embeddings:
            return _load_adapters(path, result.family)
        from lora_convert.runtime.embedding_proof import check_loaded, words_of

        words = words_of(embeddings, embeddings if against is None else [(files.source, files.truth)])
        family = files.truth.family or result.family
        rung = check_loaded(path, family, words)
    return rung if len(embeddings) == len(files.outputs) else _together([_load_adapters(path, result.family), rung])


def _load_adapters(path: Path, family: str | None) -> Rung:
    if path.is_dir() and any(file.name == "adapter_model.safetensors" for file in output_files(path)):
        return _load_native(path, family)
    return _together([_load_file(file, family) for file in output_files(path)])


def _together(rungs: Sequence[Rung]) -> Rung:
    """The rungs of several files as one."""
    if len(rungs) == 1:
        return rungs[0]
    bad = [rung for rung in rungs if rung.status != "pass"]
    worst = [rung.figures["worst"] for rung in rungs if rung.figures.get("worst") is not None]
    figures = {
        **{
            name: sum(rung.figures.get(name, 0) for rung in rungs)
            for name in ("modules", "loaded", "vectors", "loaded_vectors")
            if any(name in rung.figures for rung in rungs)
        },
        "worst": max(worst, key=float, default=None),
        "warnings": [warning for rung in rungs for warning in rung.figures.get("warnings", ())],
    }
    findings = tuple(finding for rung in rungs for finding in rung.findings)
    failed = next((rung for rung in bad if rung.status == "fail"), bad[0] if bad else None)
    return Rung(failed.status if failed else "pass", failed.reason if failed else "", figures, findings)


def _load_file(path: Path, family: str | None) -> Rung:
    with opened(path) as source:
        found = detect(source, family=family)
        if found.family is None or any(module.spelling != "diffusers" for module in found.payload):
            return Rung("skipped", "only files in the Diffusers layout are loaded")
        if not source.header.data_start:
            return Rung("skipped", "only safetensors files are given to the loader")
        try:
            loaded = load_adapter(path, found.family)
        except LoadingError as error:
            return _raised(error)
        return _compare(source, found, loaded)


def _raised(error: LoadingError) -> Rung:
    return Rung("fail", "the loader raised", findings=(not_loaded("", f"The loader failed: {error}."),))


def _load_native(path: Path, family: str | None) -> Rung:
    """A folder of peft's, by peft's own functions, onto components without weights."""
    import torch

    from lora_convert.runtime.native import load_native

    if family is None:
        return Rung("skipped", "the base model is not known")
    names = [component.name for component in FAMILIES[family].components]
    try:
        with collected_warnings() as messages:
            components = bare_components(family, dict.fromkeys(names, torch.float32))
            messages.clear()  # what importing the libraries says is not about this folder
            layers = load_native(components, path, "adapter")
    except LoadingError as error:
        return _raised(error)
    except FileError as error:
        return Rung("fail", findings=error.findings)
    return Rung("pass", figures={"modules": len(layers), "loaded": len(layers), "worst": 0.0, "warnings": messages})


def _compare(source: Source, found: Detection, loaded: LoadedAdapter) -> Rung:
    """Every module of the file against what arrived."""
    expected = {module.modules[0].name: module for module in found.payload}
    findings = [not_adapted(name) for name in expected.keys() - loaded.adapters.keys()]
    errors = {}
    for name, module in expected.items():
        if name in loaded.adapters:
            live = loaded.adapters[name]
            found_errors = arrival_errors(read_adapter(source, module), live)
            findings += what_arrived_wrong(name, found_errors, live)
            errors[name] = max(found_errors.values())
    figures: Mapping[str, Any] = {
        "modules": len(expected),
        "loaded": len(loaded.adapters),
        "worst": json_number(max(errors.values())) if errors else None,
        "warnings": list(loaded.warnings),
    }
    return Rung("fail" if findings else "pass", figures=figures, findings=_first(findings))


def _first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda finding: finding.subject)[:MOST_FINDINGS])
