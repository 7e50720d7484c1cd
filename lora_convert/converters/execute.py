"""Plan -> bytes: every step's tensors read, rescaled and written, one module in memory at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lora_convert.containers import Source
from lora_convert.containers.dtypes import numpy_dtype
from lora_convert.converters.adapters import Lora, read_adapter
from lora_convert.converters.folding import Split, rescaled, split_scale
from lora_convert.converters.metadata import STALE, Hashes, with_hashes
from lora_convert.converters.plan import OutputTensor, Plan, Step
from lora_convert.converters.values import count_zeros, is_finite, peak
from lora_convert.converters.writer import header_bytes, offsets
from lora_convert.hashes import legacy_hash
from lora_convert.report import MOST_FINDINGS, Finding, counted

__all__ = ["Execution", "execute", "run_step"]

Array = NDArray[Any]
Progress = Callable[[int], None]

_CHUNK = 1 << 20


@dataclass
class Execution:
    """What was noticed while a plan ran. `rounding` is the largest relative error that folding caused, by module."""

    findings: list[Finding] = field(default_factory=list)
    rounding: dict[str, float] = field(default_factory=dict)
    underflows: dict[str, int] = field(default_factory=dict)
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
            message += "the scale was folded into them." if self.folded else "their dtype became narrower."
            fix = "--alpha header keeps matrices as they are (read by diffusers 0.34 and later)." if self.folded else ""
            findings.append(Finding("alpha-rounded", "note", worst, message, fix))
        if self.underflows:
            worst = max(self.underflows, key=self.underflows.__getitem__)
            number, tensors = sum(self.underflows.values()), len(self.underflows)
            message = f"{counted(number, 'value')} became zero in {counted(tensors, 'tensor')}."
            findings.append(Finding("underflow", "note", worst, message))
        return findings


def _peaks(step: Step, factors: Lora, noticed: Execution) -> list[float]:
    """The largest magnitude of each stored matrix; a finding for each where that is not a number."""
    peaks = []
    for part, values in (("down", factors.down), ("up", factors.up), ("mid", factors.mid)):
        if values is None:
            continue
        peaks.append(peak(values))
        if not math.isfinite(peaks[-1]):
            bad = int(values.size - np.isfinite(values.astype(np.float32)).sum())
            message = f"{bad} of its {values.size} values are NaN or infinite."
            fix = "The training broke down or the file is damaged; --skip can leave the module out."
            noticed.findings.append(Finding("not-finite", "error", step.source.tensors[part], message, fix))
    return peaks


def _split(step: Step, factors: Lora, group: tuple[OutputTensor, ...]) -> Split:
    down, up = (numpy_dtype(tensor.dtype) for tensor in group[:2])
    if step.fold == 1.0 and factors.down.dtype == down and factors.up.dtype == up:
        return Split(1.0, 1.0)
    return split_scale(factors.down, factors.up, step.fold, down, up)


def _alpha(step: Step, tensor: OutputTensor) -> Array:
    return np.array(step.alpha, numpy_dtype(tensor.dtype))


def run_step(step: Step, source: Source, noticed: Execution) -> Iterator[tuple[OutputTensor, Array]]:
    """The arrays of a step's output tensors. What is wrong with the values is noted, and nothing more is yielded."""
    factors = read_adapter(source, step.source)
    assert isinstance(factors, Lora)
    peaks = _peaks(step, factors, noticed)
    if not all(map(math.isfinite, peaks)):
        return
    name = step.source.modules[0].name
    if step.source.scale == 0.0 or 0.0 in peaks:
        noticed.idle.append(name)
    plain = factors.to_lora()
    split = _split(step, plain, step.outputs[0])
    if split.error > 0.0:
        noticed.rounding[name] = split.error
        noticed.folded |= step.fold != 1.0
    first_row = 0
    for target, group in zip(step.source.modules, step.outputs, strict=True):
        rows = plain.rows(first_row, first_row + target.shape[0])
        first_row += target.shape[0]
        for tensor in group:
            if tensor.role == "alpha":
                yield tensor, _alpha(step, tensor)
                continue
            values, factor = (rows.down, split.down) if tensor.role == "down" else (rows.up, split.up)
            yield tensor, _converted(values, factor, tensor, noticed)


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
        lost = count_zeros(converted) - count_zeros(values) if shrinks else 0
        if lost > 0:
            noticed.underflows[tensor.name] = lost
    return converted.reshape(tensor.shape)


def execute(
    plan: Plan,
    source: Source,
    file: BinaryIO,
    metadata: dict[str, str],
    source_sha256: Callable[[], str],
    progress: Progress | None = None,
) -> Execution:
    """Write the plan's output to an open file, header last because it holds hashes of what comes before.

    `source_sha256` is asked last, so that the source can be hashed meanwhile. Returns what was noticed; if that has
    errors, the file's content is not to be used.
    """
    noticed = Execution()
    start = len(header_bytes(plan.tensors, metadata))
    places = offsets(plan.tensors)
    for step in plan.steps:
        for tensor, values in run_step(step, source, noticed) if step.outputs else ():
            file.seek(start + places[tensor.name])
            file.write(np.ascontiguousarray(values).view(np.uint8).data if values.size else b"")
        if progress:
            progress(sum(source.header.tensors[name].nbytes for name in step.source.tensors.values()))
    if not noticed.findings:
        tensors, legacy = _content_hashes(plan, file, start, metadata)
        final = with_hashes(metadata, Hashes(tensors, legacy, source_sha256()))
        file.seek(0)
        file.write(header_bytes(plan.tensors, final))
    return noticed


def _content_hashes(plan: Plan, file: BinaryIO, start: int, metadata: dict[str, str]) -> tuple[str, str]:
    """SHA-256 and kohya's legacy hash of the data just written, if the metadata asks for them.

    kohya's legacy hash is of the file as it would be with training metadata alone, so positions count from there.
    """
    if not STALE.keys() & metadata.keys():
        return "", ""
    size = file.seek(0, 2) - start
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    training_header = header_bytes(plan.tensors, training)

    def read_at(offset: int, length: int) -> bytes:
        inside = training_header[offset : offset + length]
        if len(inside) < length:
            file.seek(start + max(0, offset - len(training_header)))
            inside += file.read(length - len(inside))
        return inside

    digest = hashlib.sha256()
    file.seek(start)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest(), legacy_hash(read_at, len(training_header) + size)[:8]
