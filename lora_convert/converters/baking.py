"""A base model's tensors with adapters' weight changes added to them: W' = W + Σ scale · ΔW, one tensor at a time.

Sums are made in float64 and rounded to float32, and once to the dtype that is written.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_convert.containers import Source
from lora_convert.containers.dtypes import WEIGHTS, numpy_dtype
from lora_convert.converters.adapters import Form, form_of, read_adapter
from lora_convert.converters.base import PARAMETERS, BaseWeights, ParameterPlace, WeightFile
from lora_convert.converters.plan import OutputTensor
from lora_convert.converters.values import is_finite
from lora_convert.errors import FileError, Unrepresentable
from lora_convert.families import Module
from lora_convert.inspect.detection import AdaptedModule, Detection
from lora_convert.report import Finding

__all__ = ["Changes", "Ingredient", "Written", "baked", "content"]

Array = NDArray[Any]

_CHUNK = 1 << 22
_KEPT = 1 << 27
"""Bytes of weight changes that are kept, because a module's bias and the other rows of a fused one follow soon."""


@dataclass(frozen=True, eq=False)
class Ingredient:
    """An open adapter file, what it was found to be, and how strongly it is added."""

    file: str
    source: Source
    found: Detection
    scale: float


@dataclass(frozen=True, eq=False)
class _Part:
    """What one adapted module of a file does to one parameter: the rows `start` to `stop` of its own change."""

    ingredient: Ingredient
    module: AdaptedModule
    form: Form
    start: int
    stop: int


class Changes:
    """The weight changes of several adapters, by parameter of the base model that they are added to."""

    def __init__(self, base: BaseWeights, ingredients: Sequence[Ingredient]) -> None:
        self.base = base
        self.modules: dict[str, Module] = {}
        self.inhabitants: dict[tuple[WeightFile, str], list[tuple[str, str, ParameterPlace]]] = defaultdict(list)
        self._parts: dict[tuple[str, str], list[_Part]] = defaultdict(list)
        self._kept: OrderedDict[int, Mapping[str, Array]] = OrderedDict()
        self._uses: Counter[int] = Counter()
        for ingredient in ingredients:
            for module in ingredient.found.payload:
                self._add(ingredient, module)
        for (name, parameter), place in base.places.items():
            self.inhabitants[place.file, place.tensor].append((name, parameter, place))

    def _add(self, ingredient: Ingredient, module: AdaptedModule) -> None:
        form = form_of(module, ingredient.source.header)
        row = 0
        for target in module.modules:
            part = _Part(ingredient, module, form, row, row + target.shape[0])
            row = part.stop
            self.modules[target.name] = target
            for parameter in changed_parameters(form, target, self.base):
                self._parts[target.name, parameter].append(part)
                self._uses[id(module)] += 1

    @property
    def parameters(self) -> Sequence[tuple[str, str]]:
        """All that is changed: pipeline names of modules, and `weight` or `bias`."""
        return tuple(self._parts)

    def touches(self, file: WeightFile, tensor: str) -> bool:
        """Whether a stored tensor holds a parameter that is changed."""
        return any((name, parameter) in self._parts for name, parameter, _ in self.inhabitants.get((file, tensor), ()))

    def of(self, name: str, parameter: str) -> Array | None:
        """Σ scale · ΔW of a parameter in its module's own shape, float64; None if nothing changes it.

        Raises FileError if a value is NaN or infinite, or reading fails.
        """
        total: Array | None = None
        for part in self._parts.get((name, parameter), ()):
            delta = self._deltas(part).get(parameter)
            if delta is None:  # of a bias that only a base model with one would have
                continue
            rows, scale = delta[part.start : part.stop], part.ingredient.scale
            scaled = rows if scale == 1.0 else scale * rows
            total = scaled if total is None else total + scaled
        if total is not None and not np.isfinite(np.vdot(total, total)):
            message = "its weight change has values that are NaN or infinite."
            raise FileError([Finding("not-finite", "error", f"{name}.{parameter}", message)])
        return total

    def _deltas(self, part: _Part) -> Mapping[str, Array]:
        key = id(part.module)
        if key in self._kept:
            return self._kept[key]
        source, module, form = part.ingredient.source, part.module, part.form
        own = self.base.of(module.modules) if form.needs_base or form.magnitude else None
        try:
            deltas = read_adapter(source, module).deltas(own)
        except Unrepresentable as error:
            raise FileError([Finding("unsupported-kind", "error", module.modules[0].name, f"{error}.")]) from None
        assert all(getattr(form, parameter) for parameter in deltas), "a change that was not announced would be lost"
        if self._uses[key] > 1:
            self._kept[key] = deltas
            while len(self._kept) > 1 and sum(map(_nbytes, self._kept.values())) > _KEPT:
                self._kept.popitem(last=False)
        return deltas


def _nbytes(arrays: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in arrays.values())


def changed_parameters(form: Form, target: Module, base: BaseWeights) -> list[str]:
    """Which parameters of a module an adapter changes; a bias that it merely scales only where there is one."""
    changed = [parameter for parameter in PARAMETERS if getattr(form, parameter)]
    if form.needs_base and (target.name, "bias") not in base.places:
        return [parameter for parameter in changed if parameter != "bias"]
    return changed


@dataclass(frozen=True)
class Written:
    """A tensor of an output file: stored tensors of the base one under another, or the transpose of one."""

    tensor: OutputTensor
    pieces: tuple[tuple[WeightFile, str], ...]
    transposed: bool = False

    @property
    def retyped(self) -> bool:
        return any(file.source.header.tensors[name].dtype != self.tensor.dtype for file, name in self.pieces)

    def is_copy(self, changes: Changes) -> bool:
        """Whether its bytes are those of the base."""
        return not self.transposed and not self.retyped and not any(changes.touches(*piece) for piece in self.pieces)


def content(written: Written, changes: Changes) -> Iterator[bytes | memoryview]:
    """The bytes of an output tensor, piece by piece. Raises FileError for values that cannot be written."""
    if written.is_copy(changes):
        for file, name in written.pieces:
            where = file.source.header.tensors[name].where
            for start in range(where.start, where.end, _CHUNK):
                yield file.source.reader.read_at(start, min(_CHUNK, where.end - start))
        return
    for file, name in written.pieces:
        values = baked(file, name, changes)
        upright = values.T if written.transposed else values
        rounded = np.ascontiguousarray(_rounded(upright, written.tensor))
        yield rounded.reshape(-1).view(np.uint8).data


def baked(file: WeightFile, tensor: str, changes: Changes) -> Array:
    """A stored tensor with all changes added; float32 if it is one of floats, else as it is."""
    if file.source.header.tensors[tensor].dtype not in WEIGHTS:
        return file.source.read(tensor)
    # before the stored values are in memory: making a change takes twice its size
    added = [(place, changes.of(name, part)) for name, part, place in changes.inhabitants.get((file, tensor), ())]
    values = file.source.read(tensor).astype(np.float32)
    if any(change is not None for _, change in added) and not is_finite(values):
        message = "the base model's own values are NaN or infinite there."
        raise FileError([Finding("not-finite", "error", tensor, message, "Give an undamaged base model.")])
    for place, change in added:
        if change is not None:
            target = values if place.rows is None else values[place.rows[0] : place.rows[1]]
            target += (change.T if place.transposed else change).reshape(target.shape)
    return values


def _rounded(values: Array, tensor: OutputTensor) -> Array:
    """In the output's dtype. Raises FileError if a value does not fit."""
    dtype = numpy_dtype(tensor.dtype)
    if dtype == values.dtype:
        return values
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if not is_finite(rounded):
        lost = int(np.isfinite(values).sum() - np.isfinite(rounded.astype(np.float32)).sum())
        if lost:  # not of values that are infinite in the base model
            message = f"{lost} of its {values.size} values do not fit {tensor.dtype}."
            raise FileError([Finding("overflow", "error", tensor.name, message, "--dtype fp32 holds them.")])
    return rounded
