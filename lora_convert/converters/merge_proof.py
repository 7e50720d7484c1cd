"""Reading a merged model back: what was not to change is byte for byte the base's, and the changes are ΔW."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_convert.containers import Source, open_source
from lora_convert.containers.header import MAX_HEADER_LIMIT
from lora_convert.containers.source import FileReader, chunks_of, open_path
from lora_convert.converters.baking import Changes, content
from lora_convert.converters.base import BaseWeights
from lora_convert.converters.merge_files import FileRecord, MergePlan, OutputFile
from lora_convert.converters.writer import offsets
from lora_convert.families import FAMILIES
from lora_convert.report import Finding

__all__ = ["Rounding", "check_merged"]

Advance = Callable[[int], None]
Array = NDArray[Any]


@dataclass
class Rounding:
    """What rounding to the written dtype did to the weight changes: ‖(W' − W) − ΔW‖ / ‖ΔW‖.

    `worst` is the largest of a module's, `whole` that of all together.
    """

    worst: float = 0.0
    module: str = ""
    errors: float = 0.0
    changes: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def whole(self) -> float:
        return math.sqrt(self.errors / self.changes) if self.changes else 0.0

    def add(self, name: str, error: float, change: float) -> None:
        self.errors += error**2
        self.changes += change**2
        if change and error / change >= self.worst:
            self.worst, self.module = error / change, name


def check_merged(
    plan: MergePlan,
    records: Sequence[FileRecord],
    changes: Changes,
    folder: Path,
    merged: BaseWeights,
    advance: Advance,
) -> Rounding:
    """Read everything back: copies are the base's bytes, and each change is ΔW up to the rounding of the dtype.

    `merged` are the weights below `folder`, opened as those of a base model are. What is wrong is a finding of severity
    error in the result.
    """
    found = Rounding()
    for record in records:
        with contextlib.closing(FileReader(open_path(folder / record.name), owned=True)) as reader:
            digest = hashlib.sha256()
            for chunk in chunks_of(reader):
                digest.update(chunk)
                advance(len(chunk))
        if digest.hexdigest() != record.sha256:
            found.findings.append(_mismatch(record.name, "what was read back is not what was written."))
    for output in plan.files:
        with open_source(folder / output.name, MAX_HEADER_LIMIT) as source:
            found.findings += _check_copies(output, source, changes)
    if not found.findings:
        _check_changes(changes, merged, found)
    return found


def _mismatch(subject: str, message: str) -> Finding:
    return Finding("delta-mismatch", "error", subject, message, "Please report it; nothing was put in place.")


def _check_copies(output: OutputFile, source: Source, changes: Changes) -> list[Finding]:
    """Whether the header is the planned one, and every tensor without a change has the base's own bytes."""
    written = {tensor.name: (tensor.dtype, tensor.shape) for tensor in output.tensors}
    there = {name: (info.dtype, info.shape) for name, info in source.header.tensors.items()}
    if written != there or dict(source.header.metadata) != dict(output.metadata):
        return [_mismatch(output.name, "its header is not the planned one.")]
    starts = offsets(output.tensors)
    for one in output.written:
        if any(changes.touches(*piece) for piece in one.pieces):
            continue
        position = source.header.data_start + starts[one.tensor.name]
        for chunk in content(one, changes):
            if source.reader.read_at(position, len(chunk)) != chunk:
                return [_mismatch(one.tensor.name, "it differs from the base model's, and nothing should change it.")]
            position += len(chunk)
    return []


_ROUNDOFF: Mapping[str, tuple[float, float]] = {
    "F16": (2.0**-11, 2.0**-25),
    "BF16": (2.0**-8, 2.0**-134),
    "F32": (2.0**-24, 2.0**-150),
    "F64": (2.0**-24, 2.0**-150),
    "F8_E4M3": (2.0**-4, 2.0**-10),
    "F8_E5M2": (2.0**-3, 2.0**-17),
}
"""Largest relative error of one rounding, and the largest absolute one among subnormal values."""


def _check_changes(changes: Changes, merged: BaseWeights, found: Rounding) -> None:
    """Compare W' − W with ΔW for all that is changed, and with nothing for other rows of the same stored tensors."""
    base, family = changes.base, FAMILIES[changes.base.family]
    touched = dict.fromkeys((place.file, place.tensor) for place in map(base.places.__getitem__, changes.parameters))
    for name, parameter, _ in (inhabitant for tensor in touched for inhabitant in changes.inhabitants[tensor]):
        module = changes.modules.get(name, family.modules[name])
        change = changes.of(name, parameter)
        before, after = base.parameter(module, parameter), merged.parameter(module, parameter)
        wanted = np.zeros(before.shape) if change is None else change.reshape(before.shape)
        difference = after.astype(np.float64)
        difference -= before
        difference -= wanted
        place = merged.places[name, parameter]
        unit, least = _ROUNDOFF[place.file.source.header.tensors[place.tensor].dtype]
        error = _norm(difference)
        allowed = 1.01 * unit * _norm(after) + 2.0**-23 * _norm(before)
        if not error <= allowed + least * math.sqrt(before.size):
            message = f"the stored change is off by {error:.3g}, and rounding explains {allowed:.3g}."
            found.findings.append(_mismatch(f"{name}.{parameter}", message))
        found.add(f"{name}.{parameter}", error, _norm(wanted))


def _norm(values: Array) -> float:
    """‖values‖, also where squares do not fit the dtype: a bound of infinity would allow anything."""
    with np.errstate(over="ignore"):
        norm = float(np.linalg.norm(values))
    return norm if math.isfinite(norm) else float(np.linalg.norm(values.astype(np.longdouble)))
