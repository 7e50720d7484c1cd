"""The proof without torch: structure, numbers and ΔW of an output, compared with its source module by module.

ΔW is never formed: for low-rank changes the norm of a difference follows from the factors. With A₂ ≈ c·A₁ the
difference is written as products of small rests, so that nothing cancels:
    s₂B₂A₂ − s₁B₁A₁ = s₂(D_B·A₂ + t·B₁·D_A),  D_A = A₂ − cA₁,  D_B = B₂ − tB₁,  t = s₁/(s₂c)
and ‖X·Y‖² = ⟨XᵀX, YYᵀ⟩ takes r × r matrices only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lora_convert.containers import Source
from lora_convert.converters.adapters import ALGORITHMS, Adapter, Lora, read_adapter, read_matrices
from lora_convert.converters.folding import rescaled
from lora_convert.converters.values import count_zeros, is_finite, is_zero, peak
from lora_convert.inspect.detection import AdaptedModule, Detection
from lora_convert.report import MOST_FINDINGS, Finding, counted, json_number, listed

__all__ = ["Rung", "check_deltas", "check_numbers", "check_structure", "module_figures", "relative_error"]

Array = NDArray[Any]

TOLERANCE: Mapping[str, float] = {"F32": 1e-6, "F64": 1e-6, "F16": 3e-4, "BF16": 2.4e-3}
"""Largest relative error of ΔW, by the output's dtype: one factor rounded once, uniformly distributed mantissas."""

_CANCELLED = 1e-3  # where less remains of a sum in float32, it is mostly rounding errors
_SAFE = (2.0**-40, 2.0**40)  # peaks of matrices whose squares can be summed in float32
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


def _product_norm(left: Array, right: Array) -> float:
    """‖left · right‖ for (m, r) and (r, n)."""
    terms = np.multiply(left.T @ left, right @ right.T, dtype=np.float64)
    square = float(terms.sum())
    if square > _CANCELLED * float(np.abs(terms).sum()):
        return math.sqrt(square)
    triangle = np.linalg.qr(left.astype(np.float64), mode="r")  # keeps the norm, and squares nothing before the sum
    return float(np.linalg.norm(triangle @ right.astype(np.float64)))


def _is_close_to_power(value: float) -> float:
    """The power of two that a ratio means if it is within rounding of one, else the ratio."""
    if not value or not math.isfinite(value):
        return value
    power = math.copysign(2.0 ** round(math.log2(abs(value))), value)
    return power if abs(value / power - 1.0) < 1e-3 else value


def _ratio(second: Array, first: Array) -> float:
    """C for which second ≈ c·first."""
    square = float(np.vdot(first, first))
    return _is_close_to_power(float(np.vdot(first, second)) / square) if square else 0.0


def _difference(first: Lora, second: Lora) -> float:
    """‖ΔW₂ − ΔW₁‖ by small rests, for factors of one shape."""
    ratio = _ratio(second.down, first.down)
    if not ratio or not second.scale:
        return _general_difference(first, second)
    rest_down = second.down - ratio * first.down
    if float(np.vdot(rest_down, rest_down)) > 1e-2 * float(np.vdot(second.down, second.down)):
        return _general_difference(first, second)  # other factors, perhaps of the same product
    through = first.scale / (second.scale * ratio)
    rest_up = second.up - through * first.up
    if not rest_down.any():
        return abs(second.scale) * _product_norm(rest_up, second.down) if rest_up.any() else 0.0
    if not rest_up.any():
        return abs(second.scale * through) * _product_norm(first.up, rest_down)
    left = np.concatenate([rest_up, through * first.up], axis=1)
    right = np.concatenate([second.down, rest_down], axis=0)
    return abs(second.scale) * _product_norm(left, right)


def _general_difference(first: Lora, second: Lora) -> float:
    """‖ΔW₂ − ΔW₁‖ for any ranks, in float64 because the terms cancel."""
    left = np.concatenate(
        [second.scale * second.up.astype(np.float64), -first.scale * first.up.astype(np.float64)], axis=1
    )
    right = np.concatenate([second.down.astype(np.float64), first.down.astype(np.float64)], axis=0)
    return _product_norm(left, right)


def _wide(adapter: Lora) -> Lora:
    """The factors in float32 where that is exact and enough, else in float64."""
    matrices = adapter.up, adapter.down
    short = all(values.dtype.itemsize <= 2 and _SAFE[0] < peak(values) < _SAFE[1] for values in matrices)
    wide = np.float32 if short else np.float64
    down, up = (_widened(values, np.dtype(wide)) for values in (adapter.down, adapter.up))
    return Lora(down, up, None, adapter.scale, adapter.kernel)


def _widened(values: Array, dtype: np.dtype[Any]) -> Array:
    # numpy converts halves one by one in software; looking them up takes half the time
    return rescaled(values, 1.0, dtype) if values.dtype == np.float16 else values.astype(dtype)


def _same_bytes(first: Lora, second: Lora) -> bool:
    return first.scale == second.scale and all(
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
        for one, other in ((first.down, second.down), (first.up, second.up))
    )


def relative_error(source: Lora, output: Lora) -> float:
    """‖ΔW_output − ΔW_source‖ / ‖ΔW_source‖; infinite if only the source is zero."""
    source, output = source.to_lora(), output.to_lora()
    if _same_bytes(source, output):
        return 0.0
    first, second = _wide(source), _wide(output)
    same = first.down.shape == second.down.shape and first.up.shape == second.up.shape
    difference = _difference(first, second) if same else _general_difference(first, second)
    if not difference:
        return 0.0
    norm = abs(first.scale) * _product_norm(first.up, first.down)
    return difference / norm if norm else math.inf


def delta_norm(adapter: Adapter) -> float:
    """‖ΔW‖."""
    wide = _wide(adapter.to_lora())
    return abs(wide.scale) * _product_norm(wide.up, wide.down)


def module_figures(
    output: Source, found: Detection, source: Source | None = None, truth: Detection | None = None
) -> Iterator[tuple[str, AdaptedModule, float, float | None]]:
    """Every module of a file: its name, what adapts it, ‖ΔW‖, and its relative error against the source's if there is
    one that adapts it too.
    """
    theirs = _by_target(truth) if truth else {}
    for name, place in _by_target(found).items():
        ours = _lora(output, place)
        error = relative_error(_lora(source, theirs[name]), ours) if source and name in theirs else None
        yield name, place[0], delta_norm(ours), error


def check_structure(detection: Detection) -> Rung:
    """Every tensor of the output belongs to a module of its family, with the module's shape."""
    if detection.kind != "lora" or detection.family is None:
        errors = detection.findings
    else:
        errors = tuple(finding for finding in detection.findings if finding.severity == "error")
    figures = {"modules": len(detection.payload), "tensors": detection.tensors}
    return Rung("fail" if errors else "pass", figures=figures, findings=errors)


def _by_target(detection: Detection) -> dict[str, tuple[AdaptedModule, int, int]]:
    """Adapted module and its block of rows, by the name of the target module."""
    found = {}
    for module in detection.payload:
        row = 0
        for target in module.modules:
            found[target.name] = module, row, row + target.shape[0]
            row += target.shape[0]
    return found


def _lora(source: Source, place: tuple[AdaptedModule, int, int]) -> Lora:
    module, start, stop = place
    adapter = read_adapter(source, module)
    return (adapter.rows(start, stop) if len(module.modules) > 1 else adapter).to_lora()


def _changes_nothing(place: tuple[AdaptedModule, int, int]) -> bool:
    return place[0].rank == 0


def _tolerance(source: Source, module: AdaptedModule, narrowed: bool) -> float:
    dtypes = {source.header.tensors[module.tensors[part]].dtype for part in ("down", "up")}
    return max(TOLERANCE.get(dtype, TOLERANCE["F16"]) for dtype in dtypes) * (math.sqrt(2) if narrowed else 1.0)


def _missing(ours: Sequence[str], theirs: Sequence[str], message: str) -> list[Finding]:
    known = set(theirs)
    lost = [name for name in ours if name not in known]
    return [Finding("delta-mismatch", "error", "", f"{len(lost)} modules {message}: {listed(lost)}.")] if lost else []


def _new_zeros(matrices: Mapping[str, Array], source: Source, place: tuple[AdaptedModule, int, int]) -> int:
    """Values that are zero in the output and were not in the source, for matrices that correspond one to one."""
    before = read_matrices(source, place[0])
    both = matrices.keys() & before.keys() & {"down", "up"} if matrices.keys() == before.keys() else ()
    pairs = [(matrices[part], before[part]) for part in both]
    return sum(max(0, count_zeros(ours) - count_zeros(theirs)) for ours, theirs in pairs if ours.size == theirs.size)


def check_numbers(
    output: Source, found: Detection, source: Source | None = None, truth: Detection | None = None
) -> Rung:
    """All values are finite and not all of them zero; with a source also what the conversion itself made zero.

    Infinities that the conversion introduced show here too, since a source that has some is never converted.
    """
    broken, zero, lost = [], 0, 0
    places = _by_target(truth) if truth else {}
    for module in found.payload:
        matrices = read_matrices(output, module)
        broken += [module.tensors[part] for part, values in matrices.items() if not is_finite(values)]
        idle = any(is_zero(values) for values in matrices.values()) or module.scale == 0.0
        zero += idle
        if source is not None and not idle and module.modules[0].name in places:
            lost += _new_zeros(matrices, source, places[module.modules[0].name])
    fix = "The file is damaged; train or fetch it again."
    message = "It holds NaN or infinity."
    findings = [Finding("not-finite", "error", name, message, fix) for name in broken[:MOST_FINDINGS]]
    if zero and zero == len(found.payload):
        findings.append(Finding("no-effect", "warning", "", "Every module's change is zero: the file changes nothing."))
    if lost:
        message = f"{counted(lost, 'value')} became zero in the output; the delta rung says whether it matters."
        findings.append(Finding("underflow", "note", "", message))
    figures = {"not_finite": len(broken), "zero_modules": zero, "underflows": lost}
    return Rung("fail" if broken else "pass", figures=figures, findings=tuple(findings))


def check_deltas(
    output: Source, found: Detection, source: Source, truth: Detection, progress: Callable[[int], None] | None = None
) -> Rung:
    """ΔW of every module of the output against the source's, in relative Frobenius norm; the worst are named."""
    foreign = {m.algorithm for m in (*found.payload, *truth.payload)} - ALGORITHMS.keys()
    if foreign:
        message = f"The weight changes of {', '.join(sorted(foreign))} cannot be compared by this version."
        return Rung("fail", findings=(Finding("unsupported-kind", "error", "", message),))
    ours, theirs = _by_target(found), _by_target(truth)
    theirs = {name: place for name, place in theirs.items() if name in ours or not _changes_nothing(place)}
    findings = _missing(list(theirs), list(ours), "of the source are not in the output")
    findings += _missing(list(ours), list(theirs), "of the output are not in the source")
    names = [name for name in theirs if name in ours]

    def compare(batch: Sequence[str]) -> list[float]:
        return [relative_error(_lora(source, theirs[name]), _lora(output, ours[name])) for name in batch]

    errors: dict[str, float] = {}
    batches = [names[start : start + _BATCH] for start in range(0, len(names), _BATCH)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        for batch, results in zip(batches, pool.map(compare, batches), strict=True):
            errors |= zip(batch, results, strict=True)
            if progress:
                progress(len(batch))
    for name in names:
        module = ours[name][0]
        narrowed = _narrowed(source, theirs[name][0], output, module)
        limit = _tolerance(output, module, narrowed)
        if not errors[name] <= limit:
            message = (
                f"its ΔW differs from the source's by {errors[name]:.2e} of its norm; at most {limit:.1e} is allowed."
            )
            fix = "A wider dtype (--dtype fp32) or --alpha header keeps more."
            findings.append(Finding("delta-mismatch", "error", name, message, fix))
    worst = sorted(errors, key=lambda name: (-errors[name], name))[:5]
    figures = {
        "modules": len(errors),
        "worst": json_number(errors[worst[0]]) if worst else None,
        "worst_modules": [{"module": name, "error": json_number(errors[name])} for name in worst if errors[name]],
        "exact_modules": sum(not error for error in errors.values()),
    }
    failed = bool(findings)
    return Rung("fail" if failed else "pass", figures=figures, findings=tuple(findings[:MOST_FINDINGS]))


def _narrowed(source: Source, before: AdaptedModule, output: Source, after: AdaptedModule) -> bool:
    """Whether both factors were rounded, because the output's dtype is narrower."""
    bits = [
        {source.header.tensors[before.tensors[part]].dtype for part in ("down", "up")},
        {output.header.tensors[after.tensors[part]].dtype for part in ("down", "up")},
    ]
    return bits[0] != bits[1]
