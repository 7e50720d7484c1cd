"""Plan -> bytes: every step's tensors read, computed and written, one module in memory at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lora_convert.containers import Source
from lora_convert.containers.dtypes import numpy_dtype
from lora_convert.converters.adapters import Adapter, Base, Lora, adapter_of, read_matrices, taken_apart
from lora_convert.converters.base import BaseWeights
from lora_convert.converters.fidelity import TOLERANCE
from lora_convert.converters.folding import Split, rescaled, split_scale
from lora_convert.converters.metadata import write_final_header
from lora_convert.converters.native import native_tensors
from lora_convert.converters.plan import OutputTensor, Plan, Step
from lora_convert.converters.spectra import spectrum
from lora_convert.converters.targets import by_target
from lora_convert.converters.values import count_zeros, is_finite, is_zero, peak
from lora_convert.converters.writer import header_bytes, offsets
from lora_convert.errors import Unrepresentable
from lora_convert.families import Module
from lora_convert.report import MOST_FINDINGS, Finding, counted

__all__ = ["Execution", "Truncation", "execute", "ranks_for", "run_step"]

Array = NDArray[Any]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Truncation:
    """What was lost of one module: its rank, the relative Frobenius error of its ΔW, and ‖ΔW‖."""

    module: str
    rank: int
    error: float
    norm: float

    @property
    def kept(self) -> float:
        """The part of ‖ΔW‖² that is left."""
        return 1.0 - self.error**2

    def as_dict(self) -> dict[str, Any]:
        return {"module": self.module, "rank": self.rank, "error": self.error, "kept_energy": self.kept}


@dataclass
class Execution:
    """What was noticed while a plan ran. `rounding` is the largest relative error that folding caused, by module."""

    findings: list[Finding] = field(default_factory=list)
    rounding: dict[str, float] = field(default_factory=dict)
    underflows: dict[str, int] = field(default_factory=dict)
    truncations: list[Truncation] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    folded: bool = False

    def closing_findings(self) -> list[Finding]:
        """Findings that sum up over the modules."""
        findings = self.findings[:MOST_FINDINGS]
        if len(self.findings) > MOST_FINDINGS:
            more = len(self.findings) - MOST_FINDINGS
            findings.append(Finding(self.findings[-1].name, "error", "", f"{more} more tensors have such values."))
        if self.rounding:
            worst = max(self.rounding, key=self.rounding.__getitem__)
            modules = counted(len(self.rounding), "module")
            message = f"The matrices of {modules} were rounded, by at most {self.rounding[worst]:.1e} (estimated): "
            message += "the scale was folded into them." if self.folded else "to their dtype, once."
            fix = "--alpha header keeps matrices as they are (read by diffusers 0.34 and later)." if self.folded else ""
            findings.append(Finding("alpha-rounded", "note", worst, message, fix))
        if self.underflows:
            worst = max(self.underflows, key=self.underflows.__getitem__)
            number, tensors = sum(self.underflows.values()), len(self.underflows)
            message = f"{counted(number, 'value')} became zero in {counted(tensors, 'tensor')}."
            findings.append(Finding("underflow", "note", worst, message))
        return findings

    def truncation_findings(self, allowed: float) -> list[Finding]:
        """What truncating lost: a note, or errors for the modules that lost more than `allowed` of their ΔW."""
        lossy = sorted((t for t in self.truncations if t.error), key=lambda item: (-item.error, item.module))
        if not lossy:
            return []
        too_much = [item for item in lossy if item.error > allowed]
        if too_much:
            return _refused_truncations(too_much, allowed)
        worst = lossy[0]
        message = (
            f"Truncated: {counted(len(lossy), 'module')}. This one lost most: at rank {worst.rank} it keeps "
            f"{worst.kept:.1%} of ‖ΔW‖², a relative error of {worst.error:.2e}; over the whole file it is "
            f"{self.file_error():.2e}."
        )
        return [Finding("rank-truncated", "note", worst.module, message, "A higher --rank keeps more.")]

    def file_error(self) -> float:
        """Relative Frobenius error of all truncated modules together."""
        total = sum(item.norm**2 for item in self.truncations)
        lost = sum((item.error * item.norm) ** 2 for item in self.truncations)
        return math.sqrt(lost / total) if total else 0.0


def _refused_truncations(lossy: Sequence[Truncation], allowed: float) -> list[Finding]:
    worst = lossy[0]
    modules = counted(len(lossy), "module")
    message = (
        f"{modules} would lose more than {allowed * 100:.3g} % of ΔW. This one loses most: rank {worst.rank} leaves "
        f"{worst.kept:.1%} of ‖ΔW‖², a relative error of {worst.error:.0%}."
    )
    fix = (
        "A higher --rank keeps more; --max-error E takes the rank that E needs, and together with --rank accepts what "
        "is lost; lora-convert merge loses nothing, nor does --to peft where peft has a form for the kind."
    )
    return [Finding("rank-truncated", "error", worst.module, message, fix)]


def _all_finite(step: Step, tensors: Mapping[str, Array], noticed: Execution) -> bool:
    """Whether every stored value is a number; a finding for each tensor where one is not."""
    sound = True
    for part, values in tensors.items():
        if values.dtype.kind in "iub" or is_finite(values):
            continue
        sound = False
        bad = int(values.size - np.isfinite(values.astype(np.float32)).sum())
        message = f"{bad} of its {values.size} values are NaN or infinite."
        fix = "The training broke down or the file is damaged; --skip can leave the module out."
        noticed.findings.append(Finding("not-finite", "error", step.source.tensors[part], message, fix))
    return sound


def _product(step: Step, name: str, adapter: Adapter, base: Base | None, noticed: Execution) -> Lora:
    """The factors that are written: exact ones, or the closest of the step's rank."""
    if not step.truncated:
        return adapter.to_lora(base)
    found = spectrum(adapter, base)
    norm = float(np.linalg.norm(found.values))
    if not math.isfinite(norm):
        raise Unrepresentable("its values are too large for a norm")
    noticed.truncations.append(Truncation(name, step.rank, found.error(step.rank), norm))
    return found.lora(step.rank)


def _of_rank(factors: Lora, rank: int) -> Lora:
    """The factors with zeros added up to the rank that was planned before the values were known."""
    missing = rank - factors.down.shape[0]
    if missing <= 0:
        return factors
    down = np.pad(factors.down, ((0, missing), (0, 0)))
    return replace(factors, down=down, up=np.pad(factors.up, ((0, 0), (0, missing))))


def _split(step: Step, factors: Lora, group: tuple[OutputTensor, ...]) -> Split:
    scale = factors.scale if step.fold is None else step.fold
    down, up = (numpy_dtype(tensor.dtype) for tensor in group[:2])
    if scale == 1.0 and factors.down.dtype == down and factors.up.dtype == up:
        return Split(1.0, 1.0)
    return split_scale(factors.down, factors.up, scale, down, up)


def run_step(
    step: Step, source: Source, noticed: Execution, weights: BaseWeights | None = None
) -> Iterator[tuple[OutputTensor, Array]]:
    """The arrays of a step's output tensors. What is wrong with the values is noted, and nothing more is yielded.

    `weights` is the base model, for steps that need it.
    """
    tensors = read_matrices(source, step.source)
    if not _all_finite(step, tensors, noticed):
        return
    if step.native:
        yield from _native(step, source, noticed)
        return
    base = weights.of(step.source.modules) if weights is not None and step.needs_base else None
    try:
        adapter = adapter_of(tensors, step.source)
        if step.truncated:  # the best of a rank is found for every target by itself
            for (target, part, rows), group in zip(by_target(adapter, step.source, base), step.outputs, strict=True):
                yield from _written(step, (target,), part, rows, (group,), noticed)
        else:
            yield from _written(step, step.source.modules, adapter, base, step.outputs, noticed)
    except Unrepresentable as error:  # what shapes alone did not tell
        noticed.findings.append(Finding("unsupported-kind", "error", step.name, f"It cannot be converted: {error}."))


def _written(
    step: Step,
    targets: Sequence[Module],
    adapter: Adapter,
    base: Base | None,
    groups: Sequence[tuple[OutputTensor, ...]],
    noticed: Execution,
) -> Iterator[tuple[OutputTensor, Array]]:
    """The tensors of targets whose rows one adapter changes."""
    inner, magnitude = taken_apart(adapter)
    with np.errstate(over="ignore", invalid="ignore"):  # what that leads to is said below
        factors = _of_rank(_product(step, targets[0].name, inner, base, noticed), step.rank)
    if not (_fits_f32(factors.down) and _fits_f32(factors.up)):
        message = "The values of its factors do not fit F32."
        noticed.findings.append(Finding("overflow", "error", step.name, message, "No wider dtype is written."))
        return
    if magnitude is None and factors.bias is None and _changes_nothing(factors):
        noticed.idle.append(step.name)
    split = _split(step, factors, groups[0])
    if split.error > 0.0 and not step.truncated:
        noticed.rounding[step.name] = split.error
        noticed.folded |= step.fold not in (None, 1.0)
    yield from _Written(step, factors, split, magnitude, base).tensors(targets, groups, noticed)


def _fits_f32(values: Array) -> bool:
    return values.dtype.itemsize <= 2 or peak(values) <= float(np.finfo(np.float32).max)


def _changes_nothing(factors: Lora) -> bool:
    return factors.scale == 0.0 or is_zero(factors.down) or is_zero(factors.up)


def _native(step: Step, source: Source, noticed: Execution) -> Iterator[tuple[OutputTensor, Array]]:
    for target, form, group in zip(step.source.modules, step.native, step.outputs, strict=True):
        arrays = native_tensors(source, step.source, form, target)
        for tensor in group:
            if not is_finite(arrays[tensor.role]):
                message = f"Its values do not fit {tensor.dtype}."
                fix = "A wider dtype (--dtype fp32) may hold them."
                noticed.findings.append(Finding("overflow", "error", tensor.name, message, fix))
            yield tensor, arrays[tensor.role]


@dataclass(frozen=True)
class _Written:
    """A step's matrices on their way into tensors: the factors, what multiplies them, and what stands beside them."""

    step: Step
    factors: Lora
    split: Split
    magnitude: Array | None
    base: Base | None

    def tensors(
        self, targets: Sequence[Module], groups: Sequence[tuple[OutputTensor, ...]], noticed: Execution
    ) -> Iterator[tuple[OutputTensor, Array]]:
        """Every target's tensors: the rows that are its own."""
        first = 0
        for target, group in zip(targets, groups, strict=True):
            rows = slice(first, first + target.shape[0])
            first = rows.stop
            made: dict[str, Array] = {}
            for tensor in group:
                made[tensor.role] = self._values(tensor, rows, made, noticed)
                yield tensor, made[tensor.role]

    def _values(self, tensor: OutputTensor, rows: slice, made: Mapping[str, Array], noticed: Execution) -> Array:
        if tensor.role == "down":
            return _converted(self.factors.down, self.split.down, tensor, noticed)
        if tensor.role == "up":
            return _converted(self.factors.up[rows], self.split.up, tensor, noticed)
        if tensor.role == "alpha":
            return np.array(self.step.alpha, numpy_dtype(tensor.dtype))
        if tensor.role == "bias":
            bias = self.factors.bias
            values = np.zeros(tensor.shape, np.float32) if bias is None else bias.reshape(-1)[rows]
            return _converted(values, 1.0, tensor, noticed)
        if self.magnitude is not None:
            return _converted(self.magnitude.reshape(-1)[rows], 1.0, tensor, noticed)
        return _converted(self._norms(rows, made), 1.0, tensor, noticed)

    def _norms(self, rows: slice, made: Mapping[str, Array]) -> Array:
        """‖W+ΔW‖ of every row, with the factors as they were rounded: the magnitude that changes nothing."""
        assert self.base is not None
        weight = self.base["weight"][rows].reshape(rows.stop - rows.start, -1).astype(np.float64)
        up, down = (made[role].astype(np.float64).reshape(made[role].shape[0], -1) for role in ("up", "down"))
        return np.asarray(np.linalg.norm(weight + self.step.alpha / self.step.rank * (up @ down), axis=1))


def _converted(values: Array, factor: float, tensor: OutputTensor, noticed: Execution) -> Array:
    """A matrix in the output's dtype and shape; overflow and underflow are noted."""
    dtype = numpy_dtype(tensor.dtype)
    converted = rescaled(values, factor, dtype)
    if converted is not values:
        grows = abs(factor) > 1.0 or dtype != values.dtype
        if grows and not is_finite(converted):
            message = f"times {factor:g} its values do not fit {tensor.dtype}."
            fix = "A wider dtype (--dtype fp32) may hold them; --alpha header keeps the scale out of the matrices."
            noticed.findings.append(Finding("overflow", "error", tensor.name, message, fix))
        shrinks = factor and (abs(factor) < 1.0 or dtype != values.dtype)
        zeros = count_zeros(converted) if shrinks else 0
        if zeros and (lost := zeros - count_zeros(values)) > 0:
            noticed.underflows[tensor.name] = lost
    return converted.reshape(tensor.shape)


def ranks_for(
    plan: Plan, source: Source, weights: BaseWeights | None = None, progress: Progress | None = None
) -> dict[str, int]:
    """The smallest rank of every truncated step that keeps to `--max-error`, by the step's name."""
    assert plan.options.max_error is not None
    ranks = {}
    for step in plan.steps:
        if step.truncated:
            tensors = read_matrices(source, step.source)
            if _all_finite(step, tensors, Execution()):  # what is wrong is said when the step runs
                base = weights.of(step.source.modules) if weights is not None and step.needs_base else None
                allowed = _before_rounding(plan.options.max_error, step.outputs[0])
                with contextlib.suppress(Unrepresentable), np.errstate(over="ignore", invalid="ignore"):
                    parts = by_target(adapter_of(tensors, step.source), step.source, base)
                    ranks[step.name] = max(_rank_for(part, rows, allowed) for _, part, rows in parts)
        if progress:
            progress(1)
    return ranks


def _before_rounding(max_error: float, group: Sequence[OutputTensor]) -> float:
    """What truncating may lose so that with the rounding of both factors the error is what was asked for."""
    rounding = math.sqrt(2) * max(TOLERANCE[tensor.dtype] for tensor in group if tensor.role in ("down", "up"))
    return math.sqrt(max(max_error**2 - rounding**2, (max_error / 2) ** 2))


def _rank_for(adapter: Adapter, base: Base | None, max_error: float) -> int:
    return max(1, spectrum(taken_apart(adapter)[0], base).rank_for(max_error))


def execute(
    plan: Plan,
    source: Source,
    files: Sequence[BinaryIO],
    metadata: Sequence[dict[str, str]],
    source_sha256: Callable[[], str],
    progress: Progress | None = None,
    weights: BaseWeights | None = None,
) -> Execution:
    """Write the plan's outputs to open files, headers last because they hold hashes of what comes before.

    `source_sha256` is asked last, so that the source can be hashed meanwhile. Returns what was noticed; if that has
    errors, the files' contents are not to be used.
    """
    noticed = Execution()
    starts = [len(header_bytes(out.tensors, entries)) for out, entries in zip(plan.outputs, metadata, strict=True)]
    places = [offsets(output.tensors) for output in plan.outputs]
    for step in plan.steps:
        for tensor, values in run_step(step, source, noticed, weights) if step.outputs else ():
            file = files[tensor.file]
            file.seek(starts[tensor.file] + places[tensor.file][tensor.name])
            file.write(np.ascontiguousarray(values).view(np.uint8).data if values.size else b"")
        if progress:
            progress(sum(source.header.tensors[name].nbytes for name in step.source.tensors.values()))
    if not noticed.findings:
        for output, file, entries in zip(plan.outputs, files, metadata, strict=True):
            write_final_header(file, output.tensors, entries, source_sha256)
    return noticed
