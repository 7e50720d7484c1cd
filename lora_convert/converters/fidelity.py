"""The proof without torch: structure, numbers and ΔW of an output, compared with its source module by module."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

from lora_convert.containers import Source
from lora_convert.converters.adapters import (
    ALGORITHMS,
    Adapter,
    Base,
    form_of,
    read_adapter,
    read_matrices,
    taken_apart,
)
from lora_convert.converters.base import BaseWeights
from lora_convert.converters.comparing import change_error, change_norm, relative_error
from lora_convert.converters.metadata import is_truncated
from lora_convert.converters.refusals import LOSES_TOO_MUCH
from lora_convert.converters.spectra import spectrum
from lora_convert.converters.targets import by_target
from lora_convert.converters.values import count_zeros, is_finite, is_zero
from lora_convert.errors import BaseNeeded, Unrepresentable
from lora_convert.families import Module
from lora_convert.inspect.detection import AdaptedModule, Detection
from lora_convert.report import MOST_FINDINGS, Finding, counted, json_number, listed

__all__ = [
    "TOLERANCE",
    "Opened",
    "Rung",
    "check_deltas",
    "check_numbers",
    "check_structure",
    "module_figures",
    "relative_error",
]

Array = NDArray[Any]

Opened = tuple[Source, Detection]
"""An open weight file, and what it was found to be."""

TOLERANCE: Mapping[str, float] = {"F32": 1e-6, "F64": 1e-6, "F16": 3e-4, "BF16": 2.4e-3}
"""Largest relative error of ΔW, by the output's dtype: one factor rounded once, uniformly distributed mantissas."""

_COMPUTED_F32 = 1e-5
"""The same for factors that were computed in float32 out of others."""

_BATCH = 8  # modules that a thread compares at a time
_MOST_THREADS = 4  # each holds the matrices of one module


@dataclass(frozen=True)
class Rung:
    """One step of the proof: `pass`, `fail` or `skipped` (with the reason), and its figures."""

    status: Literal["pass", "fail", "skipped"]
    reason: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"status": self.status, "reason": self.reason, **self.figures}


@dataclass(frozen=True)
class _Place:
    """Where the change of one target is held: by which module of which file."""

    source: Source
    module: AdaptedModule
    target: Module

    @property
    def changes_nothing(self) -> bool:
        return form_of(self.module, self.source.header).changes_nothing

    def adapter(self, weights: BaseWeights | None) -> Adapter:
        """The target's own adapter. The base model's weights are for one that does not split by rows."""
        whole = read_adapter(self.source, self.module)
        several = weights is not None and len(self.module.modules) > 1
        base = weights.of(self.module.modules) if several and weights is not None else None
        return next(adapter for target, adapter, _ in by_target(whole, self.module, base) if target is self.target)

    def dtypes(self) -> set[str]:
        return {self.source.header.tensors[name].dtype for name in self.module.values.values()}


def _places(files: Sequence[Opened]) -> dict[str, _Place]:
    """By the target's name."""
    return {
        target.name: _Place(source, module, target)
        for source, found in files
        for module in found.payload
        for target in module.modules
    }


def _doubled(files: Sequence[Opened]) -> list[str]:
    """Targets that more than one file changes."""
    names = [target.name for _, found in files for module in found.payload for target in module.modules]
    return sorted({name for name in names if names.count(name) > 1}) if len(files) > 1 else []


def module_figures(
    outputs: Sequence[Opened], sources: Sequence[Opened] = (), weights: BaseWeights | None = None
) -> Iterator[tuple[str, AdaptedModule, float | None, float | None]]:
    """Every module of an output: its name, what adapts it, ‖ΔW‖, and its relative error against the source's if there
    is one that adapts it too; None where only the base model's weights could tell.
    """
    theirs = _places(sources)
    for name, place in _places(outputs).items():
        ours = place.adapter(weights)
        base = weights.of((place.target,)) if weights is not None else None
        error = None
        if name in theirs:
            try:
                error = change_error(theirs[name].adapter(weights), ours, base).worst
            except BaseNeeded:
                error = None
        yield name, place.module, change_norm(ours, base), error


def check_structure(outputs: Sequence[Detection]) -> Rung:
    """Every tensor of the output belongs to a module of its family, with the module's shape, or to an embedding."""
    findings: list[Finding] = []
    for found in outputs:
        sound = found.kind == "embedding" or (found.kind == "lora" and found.family is not None)
        findings += [finding for finding in found.findings if not sound or finding.severity == "error"]
    figures = {
        "modules": sum(len(found.payload) for found in outputs),
        "tensors": sum(found.tensors for found in outputs),
    }
    failed = bool(findings)
    return Rung("fail" if failed else "pass", figures=figures, findings=tuple(findings))


def _new_zeros(matrices: Mapping[str, Array], before: Mapping[str, Array]) -> int:
    """Values that are zero in the output and were not in the source, for matrices that correspond one to one."""
    both = matrices.keys() & before.keys() & {"down", "up"} if matrices.keys() == before.keys() else ()
    pairs = [(matrices[part], before[part]) for part in both]
    return sum(max(0, count_zeros(ours) - count_zeros(theirs)) for ours, theirs in pairs if ours.size == theirs.size)


_PRODUCTS = frozenset({"lora", "loha", "lokr"})
"""Algorithms that change nothing as soon as one of their matrices is zero; of others all have to be."""


def _is_idle(module: AdaptedModule, matrices: Mapping[str, Array]) -> bool:
    if module.scale == 0.0:
        return True
    if "dora" in module.algorithm or "on_input" in module.tensors:
        return False
    any_or_all = any if module.algorithm in _PRODUCTS else all
    return any_or_all(is_zero(values) for values in matrices.values() if values.dtype.kind not in "iub")


def check_numbers(outputs: Sequence[Opened], sources: Sequence[Opened] = ()) -> Rung:
    """All values are finite and not all of them zero; with a source also what the conversion itself made zero.

    Infinities that the conversion introduced show here too, since a source that has some is never converted.
    """
    broken, zero, lost, modules = [], 0, 0, 0
    theirs = _places(sources)
    for output, found in outputs:
        modules += len(found.payload)
        for module in found.payload:
            matrices = read_matrices(output, module)
            broken += [
                module.tensors[part]
                for part, values in matrices.items()
                if values.dtype.kind not in "iub" and not is_finite(values)
            ]
            idle = _is_idle(module, matrices)
            zero += idle
            place = theirs.get(module.modules[0].name)
            if place is not None and not idle:
                lost += _new_zeros(matrices, read_matrices(place.source, place.module))
    fix = "The file is damaged; train or fetch it again."
    message = "It holds NaN or infinity."
    findings = [Finding("not-finite", "error", name, message, fix) for name in broken[:MOST_FINDINGS]]
    if zero and zero == modules:
        findings.append(Finding("no-effect", "warning", "", "Every module's change is zero: the file changes nothing."))
    if lost:
        message = f"{counted(lost, 'value')} became zero in the output; the delta rung says whether it matters."
        findings.append(Finding("underflow", "note", "", message))
    figures = {"not_finite": len(broken), "zero_modules": zero, "underflows": lost}
    return Rung("fail" if broken else "pass", figures=figures, findings=tuple(findings))


def _missing(ours: Sequence[str], theirs: Sequence[str], message: str) -> list[Finding]:
    known = set(theirs)
    lost = [name for name in ours if name not in known]
    return [Finding("delta-mismatch", "error", "", f"{len(lost)} modules {message}: {listed(lost)}.")] if lost else []


def _tolerance(theirs: _Place, ours: _Place) -> float:
    """What rounding to the output's dtype explains: of one factor, or of both where both were changed."""
    computed = theirs.module.algorithm != ours.module.algorithm or "mid" in theirs.module.tensors
    limits = dict(TOLERANCE) | ({"F32": _COMPUTED_F32} if computed else {})
    limit = max(limits.get(dtype, limits["F16"]) for dtype in ours.dtypes())
    both = computed or theirs.dtypes() != ours.dtypes()
    return limit * (math.sqrt(2) if both else 1.0)


@dataclass(frozen=True)
class _Verdict:
    """A target's error, what is allowed, and, of one that is the best of its rank, that best error."""

    error: float
    allowed: float
    best: float | None = None


def _judged(theirs: _Place, ours: _Place, weights: BaseWeights | None) -> _Verdict:
    """Compare one target. Raises BaseNeeded."""
    base = weights.of((ours.target,)) if weights is not None and _asks_base(theirs, ours) else None
    source, output = theirs.adapter(weights), ours.adapter(weights)
    error, limit = change_error(source, output, base), _tolerance(theirs, ours)
    if not error.weight > limit >= error.beside or not is_truncated(ours.source.header.metadata):
        return _Verdict(error.worst, limit)
    best = _best_error(source, output, base)
    # what rounding adds is orthogonal to what was cut, but for chance
    return _Verdict(error.weight, math.hypot(best, limit) * (1 + 1e-3), best)


def _asks_base(theirs: _Place, ours: _Place) -> bool:
    """Whether comparing them can need the base model's weights, which take time to read."""
    plain = {"lora", "loha", "lokr", "full"}
    return any(part not in plain for module in (theirs.module, ours.module) for part in module.algorithm.split("+"))


def _best_error(source: Adapter, output: Adapter, base: Base | None) -> float:
    """The relative error of the best approximation of the output's rank (Eckart and Young 1936)."""
    inner, magnitude = taken_apart(output)
    within = source if magnitude is None else taken_apart(source)[0]
    return spectrum(within, base).error(inner.to_lora().down.shape[0])


def check_deltas(
    outputs: Sequence[Opened],
    sources: Sequence[Opened],
    weights: BaseWeights | None = None,
    progress: Callable[[int], None] | None = None,
) -> Rung:
    """What every module of the output changes against the source's, in relative Frobenius norm; the worst are named.

    An output that says that ranks were truncated passes where it is the best of its rank. `weights` is the base model,
    for algorithms that only it makes comparable.
    """
    known = {part for _, found in (*outputs, *sources) for m in found.payload for part in m.algorithm.split("+")}
    foreign = known - ALGORITHMS.keys() - {"dora"}
    if foreign:
        message = f"The weight changes of {', '.join(sorted(foreign))} cannot be compared by this version."
        return Rung("fail", findings=(Finding("unsupported-kind", "error", "", message),))
    ours, theirs = _places(outputs), _places(sources)
    theirs = {name: place for name, place in theirs.items() if name in ours or not place.changes_nothing}
    findings = _missing(list(theirs), list(ours), "of the source are not in the output")
    findings += _missing(list(ours), list(theirs), "of the output are not in the source")
    twice = _doubled(outputs)
    if twice:
        findings.append(
            Finding("duplicate-module", "error", "", f"Two files change the same modules: {listed(twice)}.")
        )
    names = [name for name in theirs if name in ours]
    try:
        verdicts = _judge_all(names, theirs, ours, weights, progress)
    except BaseNeeded as error:
        reason = f"{error}; name the base model with --base"
        return Rung("fail" if findings else "skipped", reason, findings=tuple(findings[:MOST_FINDINGS]))
    except Unrepresentable as error:
        unclear = Finding("unsupported-kind", "error", "", f"A module's change cannot be read: {error}.")
        return Rung("fail", findings=(*findings, unclear)[:MOST_FINDINGS])
    findings += [_mismatch(name, found) for name, found in verdicts.items() if not found.error <= found.allowed]
    figures = _figures(verdicts)
    failed = bool(findings)
    findings = findings or _cut(verdicts)
    return Rung("fail" if failed else "pass", figures=figures, findings=tuple(findings[:MOST_FINDINGS]))


def _judge_all(
    names: Sequence[str],
    theirs: Mapping[str, _Place],
    ours: Mapping[str, _Place],
    weights: BaseWeights | None,
    progress: Callable[[int], None] | None,
) -> dict[str, _Verdict]:
    def judge(batch: Sequence[str]) -> list[_Verdict]:
        return [_judged(theirs[name], ours[name], weights) for name in batch]

    verdicts: dict[str, _Verdict] = {}
    batches = [names[start : start + _BATCH] for start in range(0, len(names), _BATCH)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        for batch, results in zip(batches, pool.map(judge, batches), strict=True):
            verdicts |= zip(batch, results, strict=True)
            if progress:
                progress(len(batch))
    return verdicts


def _mismatch(name: str, found: _Verdict) -> Finding:
    message = f"its change differs from the source's by {found.error:.2e} of its norm; at most {found.allowed:.1e} is "
    if found.best is not None:
        message += "what a matrix of its rank needs to differ."
        return Finding("delta-mismatch", "error", name, message)
    fix = "A wider dtype (--dtype fp32) or --alpha header keeps more."
    return Finding("delta-mismatch", "error", name, f"{message}allowed.", fix)


def _cut(verdicts: Mapping[str, _Verdict]) -> list[Finding]:
    """What is lost in modules that are only the best of their rank."""
    errors = {name: found.error for name, found in verdicts.items() if found.best is not None}
    if not errors:
        return []
    worst = max(errors, key=errors.__getitem__)
    message = f"Truncated: {counted(len(errors), 'module')}; this one lost most, a relative error of "
    severity: Literal["note", "warning"] = "warning" if errors[worst] > LOSES_TOO_MUCH else "note"
    return [Finding("rank-truncated", severity, worst, f"{message}{errors[worst]:.2e}.")]


def _figures(verdicts: Mapping[str, _Verdict]) -> dict[str, Any]:
    worst = sorted(verdicts, key=lambda name: (-verdicts[name].error, name))[:5]
    figures: dict[str, Any] = {
        "modules": len(verdicts),
        "worst": json_number(verdicts[worst[0]].error) if worst else None,
        "worst_modules": [
            {"module": name, "error": json_number(verdicts[name].error)} for name in worst if verdicts[name].error
        ],
        "exact_modules": sum(not found.error for found in verdicts.values()),
    }
    truncated = sum(found.best is not None for found in verdicts.values())
    return figures | ({"truncated_modules": truncated} if truncated else {})
