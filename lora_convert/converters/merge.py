"""merge: adapters of any kind baked into a base model's own weights, and what came of it."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from lora_convert._version import __version__
from lora_convert.containers import MAX_HEADER, Source, Target, name_of, opened
from lora_convert.converters.adapters import form_of
from lora_convert.converters.baking import Changes, Ingredient, changed_parameters
from lora_convert.converters.base import BaseWeights, open_base, opened_file
from lora_convert.converters.convert import OutputRecord, Progress, local_path
from lora_convert.converters.layout import CANONICAL_NAME
from lora_convert.converters.merge_files import MergePlan, plan_checkpoint, plan_folder, write_merged
from lora_convert.converters.merge_proof import Rounding, check_merged
from lora_convert.converters.metadata import PROVENANCE
from lora_convert.converters.models import PICKLES
from lora_convert.converters.plan import DTYPES, dora_path
from lora_convert.converters.writer import atomic_folder, flush_folder, scratch_folder
from lora_convert.errors import FileError, Unrepresentable, UsageError, raise_errors
from lora_convert.families import FAMILIES
from lora_convert.hashes import sha256_of
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import Detection
from lora_convert.report import MOST_FINDINGS, SCHEMA, Finding, counted, json_number, listed, severest, shown

__all__ = ["MergeResult", "merge"]

_NOTICEABLE = 1e-4
"""Relative error of a weight change that is worth a note."""


@dataclass(frozen=True)
class MergeResult:
    """What became of a merge: `merged`, `refused` (not doable as asked) or `failed` (a file is wrong).

    `changed` and `copied` count the tensors of the weight files that are not the base's bytes any more, and that are.
    `worst_rounding` is the largest relative error that the written dtype left in a module's change, ‖(W' − W) − ΔW‖ /
    ‖ΔW‖; None if the result was not proved.
    """

    files: tuple[str, ...]
    base: str
    scales: tuple[float, ...]
    status: Literal["merged", "refused", "failed"]
    family: str | None = None
    outputs: tuple[OutputRecord, ...] = ()
    modules: int = 0
    changed: int = 0
    copied: int = 0
    worst_rounding: float | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "merged"

    def as_dict(self) -> dict[str, Any]:
        """The content of `merge --json`."""
        worst = self.worst_rounding
        return {
            "schema": SCHEMA,
            "files": list(self.files),
            "base": self.base,
            "scales": list(self.scales),
            "status": self.status,
            "family": self.family,
            "outputs": [output.as_dict() for output in self.outputs],
            "modules": self.modules,
            "tensors": {"changed": self.changed, "copied": self.copied},
            "worst_rounding": None if worst is None else json_number(worst),
            "findings": [finding.as_dict() for finding in self.findings],
        }


@dataclass(frozen=True)
class _Call:
    """What was asked for, checked as far as it can be before a file is opened."""

    targets: tuple[Target, ...]
    scales: tuple[float, ...]
    out: Path
    single_file: bool
    force: bool
    dtype: str | None
    validated: bool
    family: str | None
    config: str | Path | None
    skip: tuple[str, ...]
    max_header: int
    progress: Progress | None


def merge(
    files: Target | Sequence[Target],
    base: str | Path,
    out: str | Path,
    *,
    scales: float | Sequence[float] = 1.0,
    single_file: bool = False,
    force: bool = False,
    dtype: str | None = None,
    validated: bool = True,
    family: str | None = None,
    config: str | Path | None = None,
    skip: Sequence[str] = (),
    max_header: int = MAX_HEADER,
    progress: Progress | None = None,
    strict: bool = False,
) -> MergeResult:
    """Bake adapters of any kind into a base model: W' = W + Σ scale · ΔW(W), each ΔW as its trainer defines it.

    `base` is what `open_base` takes. `out` is a folder, which becomes a whole Diffusers model; with `single_file` it is
    a name ending in `.safetensors` (or a folder for one), which becomes one checkpoint. `scales` is one number for all
    files or one for each. Sums are rounded once, to the base's own dtypes or to `dtype` (`fp16`, `bf16`, `fp32`), which
    is for the UNet and the text encoders alone. `validated=False` leaves the proof out; `family` decides ties,
    `config` is a peft configuration, `skip` has patterns of tensor names to leave out, of all files.

    The output is put in place as a whole at the end, or not at all. A bad file gives findings and writes nothing, or
    with `strict` raises FileError; a wrong call (the output exists, a base of another family) raises UsageError.
    """
    call = _Call(
        _targets(files), (), Path(out), single_file, force, dtype, validated, family, config,
        (skip,) if isinstance(skip, str) else tuple(skip), max_header, progress,
    )  # fmt: skip
    call = replace(call, scales=_scales(scales, len(call.targets)))
    if dtype not in (*DTYPES, None):
        raise UsageError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    result = MergeResult(tuple(map(name_of, call.targets)), shown(str(base)), call.scales, "failed")
    try:
        with contextlib.ExitStack() as stack:
            weights = stack.enter_context(open_base(base, whole=True))
            _check_out(call, weights)
            result = _merged(replace(result, family=weights.family), call, weights, stack)
    except FileError as error:
        result = replace(result, status="failed", findings=error.findings)
    raise_errors(strict, result.findings)
    return result


def _targets(files: Target | Sequence[Target]) -> tuple[Target, ...]:
    several = isinstance(files, Sequence) and not isinstance(files, str | bytes | bytearray | memoryview)
    targets: tuple[Any, ...] = tuple(files) if several else (files,)  # type: ignore[arg-type]
    if not targets:
        raise UsageError("there is no file to merge")
    return targets


def _scales(scales: float | Sequence[float], number: int) -> tuple[float, ...]:
    given = (float(scales),) if isinstance(scales, Real) else tuple(map(float, scales)) or (1.0,)  # type: ignore[arg-type]
    if not all(map(math.isfinite, given)):
        raise UsageError("--scale must be a finite number")
    if len(given) not in (1, number):
        raise UsageError(f"{len(given)} scales for {counted(number, 'file')}: give one for all, or one for each")
    return given if len(given) == number else given * number


def _check_out(call: _Call, base: BaseWeights) -> None:
    """Raise UsageError if the output would not be what is meant, or would replace something that it must not."""
    is_checkpoint = base.files[0].component is None
    if is_checkpoint and not call.single_file:
        said = f"the base model {shown(base.name)} is a single checkpoint"
        raise UsageError(f"{said}: --single-file writes another one; for a folder give a Diffusers folder as base")
    if not call.single_file and call.out.suffix == ".safetensors":
        raise UsageError(f"the merged model is a folder, and {shown(str(call.out))} a file; or ask for --single-file")
    if call.single_file and call.out.suffix in PICKLES:
        raise UsageError(f"a checkpoint is written as .safetensors, and not as {shown(call.out.suffix)}")
    out, model = _output_path(call, base).resolve(), base.path.resolve()
    if out == model or model in out.parents or out in model.parents:
        raise UsageError(f"the output {shown(str(out))} is in the place of the base model; name another with -o")
    for target in call.targets:
        try:
            place = Path(name_of(target)).resolve()
        except (OSError, RuntimeError, ValueError):  # opening it will say what is wrong with it
            continue
        if place.exists() and (out == place or out in place.parents):
            raise UsageError(f"the output {shown(str(out))} is in the place of an input; name another with -o")
    _check_free(out, call)


def _check_free(out: Path, call: _Call) -> None:
    """Raise UsageError for an output that exists and is not to be replaced, or is nothing that a merge makes."""
    if not os.path.lexists(out):
        return
    said = f"the output {shown(str(out))}"
    if call.single_file and out.is_dir():
        raise UsageError(f"{said} is a folder")
    if call.single_file or not out.is_dir() or any(out.iterdir()):  # an empty folder is as good as none
        if not call.force:
            raise UsageError(f"{said} exists; --force replaces it")
        if not call.single_file and not (out / "model_index.json").is_file():
            raise UsageError(f"{said} is no Diffusers model, and is not replaced; name another with -o")
    here = Path.cwd()
    for is_so, what in ((os.path.ismount(out), "a mount point"), (out in (here, *here.parents), "the current folder")):
        if is_so:
            raise UsageError(f"{said} is {what}, which cannot be replaced as a whole; name a folder inside it with -o")


def _output_path(call: _Call, base: BaseWeights) -> Path:
    if not call.single_file or call.out.suffix == ".safetensors":
        return call.out
    return call.out / f"{base.name.rpartition('/')[2].removesuffix('.safetensors')}.safetensors"


def _merged(result: MergeResult, call: _Call, base: BaseWeights, stack: contextlib.ExitStack) -> MergeResult:
    """The result with everything open: what the files are, then the merge itself, if nothing speaks against it."""
    ingredients, findings = [], []
    for target, scale in zip(call.targets, call.scales, strict=True):
        name = name_of(target)
        try:
            source = stack.enter_context(
                opened(local_path(target, call.progress), call.max_header, _skip(target, call))
            )
            ingredient = Ingredient(name, source, _detected(source, call, base), scale)
            said = _unfit(ingredient, base)
        except FileError as error:
            said = list(error.findings)
        else:
            ingredients.append(ingredient)
        findings += [_of_file(finding, name, call) for finding in said]
    _check_skip(call)
    findings += [*_other_halves(result.files), *_averaged(base)]
    result = replace(result, findings=tuple(findings))
    if severest(findings) == "error":
        refused = all(found.name in _REFUSALS for found in findings if found.severity == "error")
        return replace(result, status="refused" if refused else "failed")
    changes = Changes(base, ingredients)
    result = replace(result, modules=sum(len(ingredient.found.payload) for ingredient in ingredients))
    return _put_in_place(result, call, base, changes, _provenance(ingredients, base), stack)


_REFUSALS = frozenset({"unsupported-kind", "unknown-format", "base-lacks-module", "base-variant"})


def _skip(target: Target, call: _Call) -> tuple[str, ...]:
    """The patterns that match something in this file: of several files, each needs only some of them."""
    if len(call.targets) == 1:
        return call.skip
    return tuple(pattern for pattern in call.skip if fnmatch.filter(_names(target, call), pattern))


def _names(target: Target, call: _Call) -> Sequence[str]:
    with opened(local_path(target, call.progress), call.max_header) as source:
        return tuple(source.header.tensors)


def _check_skip(call: _Call) -> None:
    if len(call.targets) > 1 and call.skip:
        used = {pattern for target in call.targets for pattern in _skip(target, call)}
        for pattern in call.skip:
            if pattern not in used:
                raise UsageError(f"--skip {shown(pattern)!r} matches no tensor")


def _of_file(finding: Finding, name: str, call: _Call) -> Finding:
    """Of several files each finding's subject begins with the file."""
    if len(call.targets) == 1:
        return finding
    return replace(finding, subject=f"{name}: {finding.subject}" if finding.subject else name)


def _detected(source: Source, call: _Call, base: BaseWeights) -> Detection:
    """What a file is. What fits several families equally is taken for the base model's."""
    found = detect(source, family=call.family, config=call.config)
    if found.kind == "lora" and found.family is None and call.family is None:
        again = detect(source, family=base.family, config=call.config)
        found = again if again.ok else found
    if found.kind == "lora" and found.family is not None and found.family != base.family:
        ours, theirs = FAMILIES[base.family].title, FAMILIES[found.family].title
        said = f"the base model {shown(base.name)} is {ours}, and {shown(name_of(source.header.path))} is for {theirs}"
        raise UsageError(f"{said}; give a base of {found.family}")
    return found


def _unfit(ingredient: Ingredient, base: BaseWeights) -> list[Finding]:
    """What there is to say of a file, with what stands against merging it as errors."""
    found = ingredient.found
    findings = [
        replace(finding, severity="error") if finding.name in ("unsupported-kind", "unknown-format") else finding
        for finding in found.findings
    ]
    if found.kind == "embedding":
        fix = "Load it beside the model; lora-convert convert says how."
        findings.append(Finding("unsupported-kind", "error", "", "An embedding changes no weights of a model.", fix))
    if found.kind != "lora" or found.family is None:
        return findings
    for embedding in found.embeddings:
        message = f"The embedding {shown(embedding.token)} that the file carries is no part of a model's weights."
        fix = "lora-convert convert writes it as learned_embeds.safetensors."
        findings.append(Finding("not-merged", "warning", next(iter(embedding.tensors), ""), message, fix))
    lacking: list[str] = []
    unknown: dict[str, int] = {}
    for module in found.payload:
        try:
            form = form_of(module, ingredient.source.header)
        except (KeyError, Unrepresentable):
            unknown[module.algorithm] = unknown.get(module.algorithm, 0) + 1
            continue
        for target in module.modules:
            changed = changed_parameters(form, target, base)
            lacking += [f"{target.name}.{part}" for part in changed if not _has(base, target.name, part, target.shape)]
    for algorithm, number in unknown.items():
        message = f"{counted(number, 'module')} of the file {'is' if number == 1 else 'are'} of the kind {algorithm}."
        findings.append(Finding("unsupported-kind", "error", "", f"{message} This version cannot merge it."))
    for name in lacking[:MOST_FINDINGS]:
        message = f"the base model {shown(base.name)} has no such weights, or in another size."
        findings.append(Finding("base-lacks-module", "error", name, message, "Give the base model it was trained on."))
    if len(lacking) > MOST_FINDINGS:
        more = f"{len(lacking) - MOST_FINDINGS} more weights are not in the base model."
        findings.append(Finding("base-lacks-module", "error", "", more))
    return findings


def _has(base: BaseWeights, name: str, parameter: str, shape: tuple[int, ...]) -> bool:
    """Whether the base model has a parameter in the size that the file's module has."""
    place = base.places.get((name, parameter))
    if place is None:
        return False
    stored = place.file.source.header.tensors[place.tensor].shape
    rows = place.rows[1] - place.rows[0] if place.rows else stored[0]
    return rows * math.prod(stored[1:]) == math.prod(shape if parameter == "weight" else shape[:1])


def _other_halves(files: Sequence[str]) -> Iterator[Finding]:
    """Findings that a file was given of which the folder has the other half."""
    paths = [Path(file) for file in files]
    for path in paths:
        beside = Path(dora_path(str(path)))
        if path.name == CANONICAL_NAME and beside not in paths and beside.is_file():
            message = f"{shown(beside.name)} lies beside it, with the modules that have magnitudes."
            yield Finding("half-applied", "warning", str(path), message, "Merge both files.")


def _averaged(base: BaseWeights) -> list[Finding]:
    """A note where a checkpoint has a second set of weights, which only some readers ask for."""
    ema = sum(name.startswith("model_ema.") for file in base.files for name in file.source.header.tensors)
    if not ema:
        return []
    message = f"{counted(ema, 'tensor')} of averaged weights (model_ema) are copied as they are."
    return [Finding("ema-unchanged", "note", "", message, "Readers that ask for them see nothing of the merge.")]


def _provenance(ingredients: Sequence[Ingredient], base: BaseWeights) -> dict[str, str]:
    return {
        f"{PROVENANCE}version": __version__,
        f"{PROVENANCE}family": base.family,
        f"{PROVENANCE}source_sha256": ",".join(sha256_of(one.source.chunks()) for one in ingredients),
        f"{PROVENANCE}scale": ",".join(f"{one.scale:g}" for one in ingredients),
    }


class _AbandonedError(Exception):
    """Leaves the block of an output without putting it in place."""


@contextlib.contextmanager
def _place(call: _Call, out: Path) -> Iterator[Path]:
    """A folder to build in; what it holds takes the output's place when the block ends well. Links are followed."""
    place = out.resolve()
    if not call.single_file:
        with atomic_folder(place) as folder:
            yield folder
        return
    with scratch_folder(place) as folder:
        yield folder
        (folder / out.name).replace(place)
        flush_folder(place.parent)


def _put_in_place(
    result: MergeResult,
    call: _Call,
    base: BaseWeights,
    changes: Changes,
    provenance: dict[str, str],
    stack: contextlib.ExitStack,
) -> MergeResult:
    """Write the merged model, prove it, and put it where it shall be."""
    out = _output_path(call, base)
    dtype = DTYPES[call.dtype] if call.dtype else None
    plan = (
        plan_checkpoint(stack, base, changes, out.name, dtype, provenance)
        if call.single_file
        else plan_folder(base, changes, dtype, provenance)
    )
    findings = list(result.findings)
    rounding: Rounding | None = None
    try:
        with _place(call, out) as folder:
            records = write_merged(plan, changes, folder, _advance(call.progress, "merging", plan.bytes))
            if call.validated:
                with open_base(folder / out.name if call.single_file else folder) as merged:
                    advance = _advance(call.progress, "proving", plan.bytes)
                    rounding = check_merged(plan, records, changes, folder, merged, advance)
                findings += [*rounding.findings, *_rounding_findings(rounding, plan)]
            if severest(findings) == "error":
                raise _AbandonedError
            sizes = [(folder / record.name).stat().st_size for record in records]
            tensors = sum(_tensors(folder, record.name) for record in records)
    except _AbandonedError:
        return replace(result, status="failed", findings=tuple(findings))
    except FileError as error:
        return replace(result, status="failed", findings=(*findings, *error.findings))
    outputs = tuple(
        OutputRecord(str(out if call.single_file else out / record.name), size, record.sha256)
        for record, size in zip(records, sizes, strict=True)
    )
    changed = sum(not written.is_copy(changes) for file in plan.files for written in file.written)
    return replace(
        result,
        status="merged",
        outputs=outputs,
        changed=changed,
        copied=tensors - changed,
        worst_rounding=rounding.worst if rounding else None,
        findings=tuple(findings),
    )


def _tensors(folder: Path, name: str) -> int:
    """Number of tensors in a file; none in one that has no weights. Raises FileError for a damaged one."""
    if not name.endswith(".safetensors"):
        return 0
    with contextlib.ExitStack() as stack:
        return len(opened_file(stack, folder / name, name, None).source.header.tensors)


def _advance(progress: Progress | None, what: str, total: int) -> Any:
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        if progress:
            progress(what, min(done, total), total)

    return advance


def _rounding_findings(rounding: Rounding, plan: MergePlan) -> list[Finding]:
    if not rounding.changes:
        return [Finding("no-effect", "warning", "", "Every module's change is zero: the base model is as it was.")]
    if rounding.worst <= _NOTICEABLE:
        return []
    dtypes = sorted({one.tensor.dtype for file in plan.files for one in file.written if one.tensor.dtype != "I64"})
    message = (
        f"Rounding the merged weights ({listed(dtypes)}) took up to {rounding.worst:.2%} from a module's change, "
        f"{rounding.whole:.2%} from all together."
    )
    fix = "" if plan.dtype == "F32" else "--dtype fp32 keeps it."
    return [Finding("merge-rounded", "note", rounding.module, message, fix)]
