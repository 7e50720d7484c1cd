"""How far two adapters' weight changes are apart, without forming them where their structure allows.

For low-rank changes the norm of a difference follows from the factors. With A₂ ≈ c·A₁ the difference is written as
products of small rests, so that nothing cancels:
    s₂B₂A₂ − s₁B₁A₁ = s₂(D_B·A₂ + t·B₁·D_A),  D_A = A₂ − cA₁,  D_B = B₂ − tB₁,  t = s₁/(s₂c)
and ‖X·Y‖² = ⟨XᵀX, YYᵀ⟩ takes r × r matrices only.
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_convert.converters.adapters import Adapter, Base, Lora, taken_apart
from lora_convert.converters.folding import rescaled
from lora_convert.converters.spectra import ChangeError, relative_difference
from lora_convert.converters.values import peak
from lora_convert.errors import BaseNeeded, Unrepresentable

__all__ = ["change_error", "change_norm", "relative_error"]

Array = NDArray[Any]

_CANCELLED = 1e-3  # where less remains of a sum in float32, it is mostly rounding errors
_SAFE = (2.0**-40, 2.0**40)  # peaks of matrices whose squares can be summed in float32


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
    source, output = source.to_lora(), output.to_lora()  # without Tucker cores
    if _same_bytes(source, output):
        return 0.0
    first, second = _wide(source), _wide(output)
    same = first.down.shape == second.down.shape and first.up.shape == second.up.shape
    difference = _difference(first, second) if same else _general_difference(first, second)
    if not difference:
        return 0.0
    norm = abs(first.scale) * _product_norm(first.up, first.down)
    return difference / norm if norm else math.inf


def change_norm(adapter: Adapter, base: Base | None = None) -> float | None:
    """‖ΔW‖ of the weight, of DoRA that inside; None if it depends on a base model that is not given."""
    inner, _ = taken_apart(adapter)
    try:
        wide = _wide(inner.to_lora(base))
    except BaseNeeded:
        return None
    except Unrepresentable:
        return float(np.linalg.norm(inner.deltas(base).get("weight", 0.0)))
    return abs(wide.scale) * _product_norm(wide.up, wide.down)


def change_error(theirs: Adapter, ours: Adapter, base: Base | None = None) -> ChangeError:
    """The relative error of what `ours` changes, measured against `theirs` (infinite where only one has something).

    DoRA per output is compared by its parts, so that the error holds for every base model. Raises BaseNeeded where
    only the base model's weights could tell.
    """
    if _same(theirs, ours):
        return ChangeError(0.0)
    inner, magnitude = taken_apart(ours)
    if magnitude is None:
        return _parts(theirs, ours, base)
    source, expected = taken_apart(theirs)
    found = _parts(source, inner, base)
    lengths = _vector_error(_norms(inner, base) if expected is None else expected, magnitude)
    return ChangeError(found.weight, max(found.beside, lengths))


def _parts(theirs: Adapter, ours: Adapter, base: Base | None) -> ChangeError:
    """The errors of ΔW and of Δb."""
    try:
        product = ours.to_lora()
    except Unrepresentable:
        return _dense_errors(theirs, ours, base)
    try:
        exact = theirs.to_lora(base)
    except BaseNeeded:
        raise
    except Unrepresentable:
        return relative_difference(theirs, product, base)
    return ChangeError(relative_error(exact, product), _vector_error(exact.bias, product.bias))


def _dense_errors(theirs: Adapter, ours: Adapter, base: Base | None) -> ChangeError:
    first, second = theirs.deltas(base), ours.deltas(base)
    return ChangeError(*(_vector_error(first.get(name), second.get(name)) for name in ("weight", "bias")))


def _vector_error(theirs: Array | None, ours: Array | None) -> float:
    """Relative distance of two arrays of any shape; one that is absent is zero."""
    if theirs is None and ours is None:
        return 0.0
    first, second = (np.zeros(1) if array is None else array.astype(np.float64).reshape(-1) for array in (theirs, ours))
    difference, norm = float(np.linalg.norm(second - first)), float(np.linalg.norm(first))
    if not difference:
        return 0.0
    return difference / norm if norm else math.inf


def _norms(inner: Adapter, base: Base | None) -> Array:
    """‖W+ΔW‖ of every row: the magnitude with which DoRA is plain LoRA."""
    if base is None:
        raise BaseNeeded("whether a magnitude changes anything depends on the base model's weights")
    delta = inner.deltas(base)["weight"]
    return np.asarray(np.linalg.norm((base["weight"] + delta).reshape(delta.shape[0], -1), axis=1))


def _same(first: Any, second: Any) -> bool:
    """Whether two adapters are of one algorithm and hold the same numbers."""
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        return first.shape == second.shape and np.array_equal(first, second)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if is_dataclass(first):
        return all(_same(getattr(first, part.name), getattr(second, part.name)) for part in fields(first))
    return bool(first == second)
