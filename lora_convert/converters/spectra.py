"""Singular values of ΔW by its structure, the best approximation of any rank, and how far an output is from it.

Nothing is as large as ΔW where it has structure. A product A · B needs the triangles of both factors' QR
decompositions; the SVD of a Kronecker product is the Kronecker product of the SVDs. Only what has neither is formed
whole, and then the Gram matrix of its smaller side is decomposed. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_convert.converters.adapters import Adapter, Array, Base, Lokr, Lora
from lora_convert.converters.algorithms.adapter import matrix, wide
from lora_convert.converters.algorithms.lokr import Side
from lora_convert.errors import BaseNeeded, Unrepresentable

__all__ = ["ChangeError", "Spectrum", "relative_difference", "spectrum"]

_CANCELLED = 1e-10  # of a sum of squares in float64: where less remains, it is mostly rounding errors
_LARGE = 1 << 20  # elements of a factor that is no smaller problem than ΔW: its Gram matrix is decomposed
_CONDITION = 1e-3  # squared it costs digits of the sixteen


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of ΔW as a matrix (out, in·kh·kw).

    `values` are its singular values, descending, float64; those left out are zero. `vectors` gives for a rank k the
    factors up (out, k) and down (k, in·kh·kw) of the best approximation of that rank (Eckart and Young 1936), whose
    columns and rows have the lengths √σ. `bias` is Δb, kept as it is.
    """

    values: Array
    vectors: Callable[[int], tuple[Array, Array]]
    kernel: tuple[int, ...] = ()
    bias: Array | None = None

    def error(self, rank: int) -> float:
        """‖ΔW − its best approximation‖ / ‖ΔW‖ in the Frobenius norm; 0 if ΔW is zero."""
        total = float(np.linalg.norm(self.values))
        return float(np.linalg.norm(self.values[max(rank, 0) :])) / total if total else 0.0

    def rank_for(self, max_error: float) -> int:
        """The smallest rank whose error is at most `max_error`."""
        lost = np.sqrt(np.cumsum(self.values[::-1] ** 2))  # with the last 1, 2, … values left out
        allowed = max_error * float(np.linalg.norm(self.values))
        return len(self.values) - int(np.searchsorted(lost, allowed, side="right"))

    def lora(self, rank: int) -> Lora:
        """The best approximation of a rank (at most the number of values), float32, both factors equally large."""
        up, down = self.vectors(max(0, min(rank, len(self.values))))
        return Lora(down.astype(np.float32), up.astype(np.float32), None, 1.0, self.kernel, self.bias)


def spectrum(adapter: Adapter, base: Base | None = None) -> Spectrum:
    """The decomposition of an adapter's ΔW, by its structure.

    Raises BaseNeeded if ΔW depends on the base model, and Unrepresentable if it is no matrix but a norm's vector, or
    has values that are not finite.
    """
    try:
        return _decomposed(adapter, base)
    except np.linalg.LinAlgError:
        raise Unrepresentable("its values are not all finite, so it has no singular values") from None


def _decomposed(adapter: Adapter, base: Base | None) -> Spectrum:
    if isinstance(adapter, Lokr):
        return _of_kronecker(adapter)
    try:
        plain = adapter.to_lora(base)
    except BaseNeeded:
        raise
    except Unrepresentable:
        return _of_deltas(adapter, base)
    return _of_product(plain)


def _of_product(plain: Lora) -> Spectrum:
    """A · B = Q_A · (R_A · R_Bᵀ) · Q_Bᵀ, and of the Q nothing is needed: A·B·Q_B = A·R_Bᵀ, Q_Aᵀ·A·B = R_A·B."""
    up, down = plain.scale * wide(plain.up), wide(plain.down)
    left, right = _triangle(up), _triangle(down.T)
    first, values, second = np.linalg.svd(left @ right.T, full_matrices=False)

    def vectors(rank: int) -> tuple[Array, Array]:
        root = _inverse_roots(values[:rank])
        return up @ (right.T @ second[:rank].T * root), (root[:, None] * first[:, :rank].T @ left) @ down

    return Spectrum(values, vectors, plain.kernel, plain.bias)


def _triangle(factor: Array) -> Array:
    """R of a factor's QR decomposition, up to signs: from its Gram matrix where that keeps ten digits."""
    try:
        lower = np.linalg.cholesky(factor.T @ factor)
    except np.linalg.LinAlgError:
        return _orthogonalised(factor)
    diagonal = np.diagonal(lower)
    sound = len(diagonal) and diagonal.min() > _CONDITION * diagonal.max()
    return lower.T if sound else _orthogonalised(factor)


def _orthogonalised(factor: Array) -> Array:
    return np.asarray(np.linalg.qr(factor, mode="r"))


def _inverse_roots(values: Array) -> Array:
    """1/√σ, and 0 for the values that are zero but for rounding errors."""
    tiny = values <= (values[0] if len(values) else 0.0) * 1e-14
    return np.where(tiny, 0.0, 1.0 / np.sqrt(np.where(tiny, 1.0, values)))


def _of_kronecker(adapter: Lokr) -> Spectrum:
    first, second = _of_side(adapter.first), _of_side(adapter.second)
    products = np.outer(first.values, second.values).reshape(-1)
    order = np.argsort(-products, kind="stable")
    root = math.sqrt(abs(adapter.scale))
    sign = math.copysign(1.0, adapter.scale)

    def vectors(rank: int) -> tuple[Array, Array]:
        ones, others = np.divmod(order[:rank], max(1, len(second.values)))
        (up_1, down_1), (up_2, down_2) = (side.vectors(len(side.values)) for side in (first, second))
        up = up_1[:, None, ones] * up_2[None, :, others]
        down = down_1[ones, :, None] * down_2[others, None, :]
        return sign * root * up.reshape(adapter.shape[0], rank), root * down.reshape(rank, adapter.shape[1])

    return Spectrum(abs(adapter.scale) * products[order], vectors, adapter.kernel)


def _of_side(side: Side) -> Spectrum:
    if side.right is not None:
        return _of_product(Lora(side.right, side.left))
    if side.left.size > _LARGE:
        return _of_matrix(wide(side.left))
    first, values, second = np.linalg.svd(wide(side.left), full_matrices=False)

    def vectors(rank: int) -> tuple[Array, Array]:
        root = np.sqrt(values[:rank])
        return first[:, :rank] * root, root[:, None] * second[:rank]

    return Spectrum(values, vectors)


def _of_deltas(adapter: Adapter, base: Base | None) -> Spectrum:
    deltas = adapter.deltas(base)
    weight = deltas.get("weight")
    if weight is None or weight.ndim < 2:
        raise Unrepresentable("a norm's weight is a vector, which has no factors")
    dense = _of_matrix(matrix(weight))
    return Spectrum(dense.values, dense.vectors, weight.shape[2:], deltas.get("bias"))


def _of_matrix(delta: Array) -> Spectrum:
    """From the eigenvectors V of the smaller Gram matrix: the best approximation is ΔW · V · Vᵀ of the largest."""
    if delta.shape[0] < delta.shape[1]:
        turned = _of_matrix(delta.T)
        return Spectrum(turned.values, lambda rank: _turned(*turned.vectors(rank)))
    squares, right = np.linalg.eigh(delta.T @ delta)
    values, right = np.sqrt(np.maximum(squares[::-1], 0.0)), right[:, ::-1]

    def vectors(rank: int) -> tuple[Array, Array]:
        root = np.sqrt(values[:rank])
        return delta @ right[:, :rank] * _inverse_roots(values[:rank]), root[:, None] * right[:, :rank].T

    return Spectrum(values, vectors)


def _turned(up: Array, down: Array) -> tuple[Array, Array]:
    return down.T, up.T


class ChangeError(NamedTuple):
    """Relative errors of a change: of ΔW (inside a DoRA), and the larger of those of Δb and DoRA's magnitudes."""

    weight: float
    beside: float = 0.0

    @property
    def worst(self) -> float:
        return float(np.max(self))  # NaN if one is


def relative_difference(adapter: Adapter, output: Lora, base: Base | None = None) -> ChangeError:
    """‖ΔW_output − ΔW_adapter‖ / ‖ΔW_adapter‖, and the same of Δb; infinite if only the adapter's is zero.

    By structure, in float64; where there is an exact form as a product, from its factors, which are float32. No matrix
    as large as ΔW is formed for products and Kronecker products, unless two whole Kronecker factors are met to five
    digits or better. Raises BaseNeeded as `deltas` does.
    """
    plain = output.to_lora()
    if isinstance(adapter, Lokr) and adapter.first.right is None and adapter.second.right is None:
        difference, norm = _from_kronecker(adapter, plain)
        return ChangeError(_ratio(difference, norm), _bias_difference(None, plain.bias))
    try:
        ours = adapter.to_lora(base)
    except BaseNeeded:
        raise
    except Unrepresentable:
        deltas = adapter.deltas(base)
        difference = float(np.linalg.norm(plain.deltas()["weight"] - deltas["weight"]))
        weight = _ratio(difference, float(np.linalg.norm(deltas["weight"])))
        return ChangeError(weight, _bias_difference(deltas.get("bias"), plain.bias))
    return ChangeError(_from_product(ours, plain), _bias_difference(ours.bias, plain.bias))


def _ratio(difference: float, norm: float) -> float:
    return difference / norm if norm else math.inf if difference else 0.0


def _bias_difference(ours: Array | None, theirs: Array | None) -> float:
    first, second = (np.zeros(1) if bias is None else wide(bias) for bias in (ours, theirs))
    return _ratio(float(np.linalg.norm(second - first)), float(np.linalg.norm(first)))


def _from_product(ours: Lora, theirs: Lora) -> float:
    pairs = ((ours.up, theirs.up), (ours.down, theirs.down))
    if ours.scale == theirs.scale and all(np.array_equal(one, other) for one, other in pairs):
        return 0.0
    up, down = ours.scale * wide(ours.up), wide(ours.down)
    left = np.concatenate([theirs.scale * wide(theirs.up), -up], axis=1)
    right = np.concatenate([wide(theirs.down), down])
    return _ratio(_product_norm(left, right), _product_norm(up, down))


def _product_norm(left: Array, right: Array) -> float:
    """‖left · right‖ for (m, r) and (r, n): from ⟨leftᵀ·left, right·rightᵀ⟩, or from triangles where that cancels."""
    terms = (left.T @ left) * (right @ right.T)
    square = float(terms.sum())
    if square > _CANCELLED * float(np.abs(terms).sum()):
        return math.sqrt(square)
    return float(np.linalg.norm(_orthogonalised(left) @ _orthogonalised(right.T).T))


def _from_kronecker(adapter: Lokr, theirs: Lora) -> tuple[float, float]:
    """‖L − K‖ and ‖K‖ from ‖K‖² − 2⟨K, L⟩ + ‖L‖², with ⟨w1 ⊗ w2, u·vᵀ⟩ = ⟨U, w1 · V · w2ᵀ⟩ for reshaped u and v."""
    first, second = wide(adapter.first.left), wide(adapter.second.left)
    norm = abs(adapter.scale) * float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    up, down = theirs.scale * wide(theirs.up), wide(theirs.down)
    lefts = up.T.reshape(up.shape[1], first.shape[0], second.shape[0])
    rights = down.reshape(up.shape[1], first.shape[1], second.shape[1])
    inner = adapter.scale * float(np.sum(lefts * (first @ rights @ second.T)))
    length = _product_norm(up, down)
    square = norm * norm - 2.0 * inner + length * length
    if square > _CANCELLED * (norm * norm + length * length):
        return math.sqrt(square), norm
    return float(np.linalg.norm(theirs.deltas()["weight"] - adapter.deltas()["weight"])), norm
