"""The proof of a merged model without drawing: its weights less the base model's, against the source's changes.

Both models are read module by module; nothing is loaded whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_convert.containers import Source
from lora_convert.containers.dtypes import numpy_dtype
from lora_convert.converters.adapters import read_adapter
from lora_convert.converters.base import BaseWeights, open_base
from lora_convert.converters.convert import Progress
from lora_convert.converters.fidelity import Rung
from lora_convert.families import FAMILIES, Module
from lora_convert.inspect.detection import AdaptedModule, Detection
from lora_convert.report import MOST_FINDINGS, Finding, json_number
from lora_convert.runtime.reference import UNIT_ROUNDOFF

__all__ = ["Baked", "BakedModule", "compare_models", "is_model"]

Array = NDArray[Any]

_F8_ROUNDOFF = 2.0**-3
_SUM = 2.0**-22  # of ‖W‖: what sums in float32 may lose besides the last rounding


@dataclass(frozen=True, slots=True)
class BakedModule:
    """One module that the source changes. `norm` is ‖ΔW‖ by the source, `base_norm` ‖W‖, `error` the distance of what
    was baked in from it, relative to `norm`; biases are in all three. `parts` are those that change: weight and bias.
    """

    name: str
    source: AdaptedModule
    norm: float
    base_norm: float
    error: float
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Baked:
    """What the comparison of two models says. `roundoff` is the unit roundoff of the coarsest changed tensor."""

    delta: Rung
    modules: tuple[BakedModule, ...]
    roundoff: float


def is_model(path: Path) -> bool:
    """Whether a path is a model's folder in the Diffusers layout."""
    return (path / "model_index.json").is_file()


def compare_models(
    model: Path,
    base: str | Path,
    source: Source,
    truth: Detection,
    scale: float = 1.0,
    progress: Progress | None = None,
) -> Baked:
    """The rung `delta` of a merged model: every module changed by `scale` times what the source says, and no other.

    Each may be off by the rounding to the dtype in which the model stores it. Raises UsageError for a model or base
    that cannot be opened or is of another family than the source, FileError for one that is damaged.
    """
    assert truth.family is not None
    with open_base(base, truth.family) as before, open_base(model, truth.family) as after:
        changed = {target.name: module for module in truth.payload for target in module.modules}
        others = [module for module in FAMILIES[truth.family].modules.values() if module.name not in changed]
        advance = _counter(progress, len(truth.payload) + len(others))
        modules: list[BakedModule] = []
        findings: list[Finding] = []
        roundoff = 0.0
        for module in truth.payload:
            comparison = _Comparison(before, after, module.modules)
            deltas = read_adapter(source, module).deltas(comparison.base)
            for found, allowed in comparison.against(deltas, scale, module):
                modules.append(found)
                findings += _too_far(found, allowed)
            roundoff = max(roundoff, comparison.roundoff)
            advance()
        for other in others:
            findings += _Comparison(before, after, (other,)).untouched()
            advance()
    return Baked(_rung(modules, findings, len(others)), tuple(modules), roundoff)


class _Comparison:
    """The parameters of some modules in both models: `base` and `baked`, and the dtypes in which they are stored."""

    def __init__(self, before: BaseWeights, after: BaseWeights, modules: Sequence[Module]) -> None:
        self.base, self.baked, self.modules = before.of(modules), after.of(modules), modules
        stored = [_dtypes(model, modules, self.base) for model in (before, after)]
        self.retyped = stored[0] != stored[1]
        self.roundoff = max(UNIT_ROUNDOFF.get(dtype, _F8_ROUNDOFF) for dtype in stored[1])
        self.smallest = max(_smallest(dtype) for dtype in stored[1])

    def against(
        self, deltas: Mapping[str, Array], scale: float, module: AdaptedModule
    ) -> Iterator[tuple[BakedModule, float]]:
        """Each of the modules, and how far its relative error may go."""
        row = 0
        for target in self.modules:
            rows = slice(row, row + target.shape[0])
            row += target.shape[0]
            squares = np.zeros(4)  # of the error, ΔW, W, and what rounding may do
            for part, weight in self.base.items():
                old, new = (values[rows].astype(np.float64) for values in (weight, self.baked[part]))
                wanted = scale * deltas[part][rows] if part in deltas else np.zeros_like(old)
                rounding = self.rounding(new) if part in deltas or self.retyped else 0.0
                squares += [_square(new - old - wanted), _square(wanted), _square(old), rounding**2]
            error, norm, base_norm, rounding = (math.sqrt(square) for square in squares)
            relative = error / norm if norm else math.inf if error else 0.0
            baked = BakedModule(target.name, module, norm, base_norm, relative, tuple(deltas))
            yield baked, rounding / norm if norm else 0.0

    def untouched(self) -> Iterator[Finding]:
        """A finding for every parameter that is not what it was."""
        for part, weight in self.base.items():
            error = math.sqrt(_square(self.baked[part].astype(np.float64) - weight))
            if not error <= (self.rounding(weight) if self.retyped else 0.0):
                said = f"The source does not change it, but its {part} is off by {error:.2e}."
                yield Finding("delta-mismatch", "error", self.modules[0].name, said)

    def rounding(self, values: Array) -> float:
        """How far rounding to the merged model's dtype may move an array, subnormal numbers included."""
        return (self.roundoff + _SUM) * math.sqrt(_square(values)) + self.smallest * math.sqrt(values.size)


def _dtypes(model: BaseWeights, modules: Sequence[Module], parts: Iterable[str]) -> list[str]:
    places = [model.places[module.name, part] for part in parts for module in modules]
    return [place.file.source.header.tensors[place.tensor].dtype for place in places]


def _smallest(dtype: str) -> float:
    """Half the smallest positive number of a dtype."""
    if dtype not in ("F16", "BF16"):
        return 0.0
    tiny = np.array(1, np.uint16).view(numpy_dtype(dtype))
    return float(tiny) / 2


def _square(values: Array) -> float:
    return float(np.vdot(values, values))


def _too_far(found: BakedModule, allowed: float) -> Iterator[Finding]:
    if not found.error <= allowed:
        said = f"what was merged differs from the source's ΔW by {found.error:.2e} of its norm"
        yield Finding("delta-mismatch", "error", found.name, f"{said}; rounding explains {allowed:.1e}.")


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """A function that reports that one more module is compared."""
    steps = itertools.count(1)

    def advance() -> None:
        if progress:
            progress("proving", next(steps), total)

    return advance


def _rung(modules: list[BakedModule], findings: list[Finding], untouched: int) -> Rung:
    worst = sorted(modules, key=lambda module: (-module.error, module.name))[:5]
    figures = {
        "modules": len(modules),
        "worst": json_number(worst[0].error) if worst else None,
        "worst_modules": [{"module": m.name, "error": json_number(m.error)} for m in worst if m.error],
        "untouched_modules": untouched,
    }
    return Rung("fail" if findings else "pass", figures=figures, findings=tuple(findings[:MOST_FINDINGS]))
