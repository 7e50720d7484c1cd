"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lora_convert.converters.algorithms.adapter import Array, Base, Form, Shape, Shapes, Stored, matrix, single, wide
from lora_convert.converters.algorithms.lora import Lora, dense_product, fold_core, whole

__all__ = ["Loha", "loha_form", "read_loha"]


@dataclass(frozen=True)
class Loha:
    """ΔW = scale · (w1_a · w1_b) ∘ (w2_a · w2_b).

    Shapes: w1_a (out, r), w1_b (r, in·kh·kw), or 4-D of the same sizes (OneTrainer). With Tucker cores t1 and t2
    (r, r, kh, kw): w1_a (r, out), w1_b (r, in), and a side is Σᵢⱼ t[i, j] · w_a[i] ⊗ w_b[j].
    FedPara: Hyeon-Woo et al. 2022, arXiv:2108.06098; LyCORIS `functional/loha.py`; peft `tuners/loha/layer.py`, whose
    "effective" convolutions are the Tucker form.
    """

    w1_a: Array
    w1_b: Array
    w2_a: Array
    w2_b: Array
    t1: Array | None = None
    t2: Array | None = None
    scale: float = 1.0
    kernel: Shape = ()

    def sides(self) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Both low-rank matrices as factors (out, r) and (r, in·kh·kw)."""
        first = _side(self.w1_a, self.w1_b, self.t1)
        return first, _side(self.w2_a, self.w2_b, self.t2)

    def deltas(self, base: Base | None = None) -> Mapping[str, Array]:
        first, second = (wide(left) @ wide(right) for left, right in self.sides())
        delta = self.scale * first * second
        return {"weight": delta.reshape(delta.shape[0], -1, *self.kernel) if self.kernel else delta}

    def rows(self, start: int, stop: int) -> Loha:
        lefts = (self.w1_a, self.w2_a)
        first, second = (left[start:stop] if self.t1 is None else left[:, start:stop] for left in lefts)
        return Loha(first, self.w1_b, second, self.w2_b, self.t1, self.t2, self.scale, self.kernel)

    def to_lora(self, base: Base | None = None) -> Lora:
        """Rank r₁·r₂: the face-splitting product of the left factors, the Khatri-Rao product of the right ones."""
        (left_1, right_1), (left_2, right_2) = self.sides()
        rank = left_1.shape[1] * left_2.shape[1]
        if rank > min(left_1.shape[0], right_1.shape[1]):
            first, second = dense_product(left_1, right_1), dense_product(left_2, right_2)
            return whole(first * second, self.scale, self.kernel)
        up = single(left_1)[:, :, None] * single(left_2)[:, None, :]
        down = single(right_1)[:, None, :] * single(right_2)[None, :, :]
        rows, columns = left_1.shape[0], right_1.shape[1]
        return Lora(down.reshape(rank, columns), up.reshape(rows, rank), None, self.scale, self.kernel)


def _side(left: Array, right: Array, core: Array | None) -> tuple[Array, Array]:
    return (matrix(left), matrix(right)) if core is None else (left.T, fold_core(core, right))


def read_loha(stored: Stored) -> Loha:
    """From the fields w1_a, w1_b, w2_a, w2_b, and t1 and t2 if it is a Tucker one."""
    tensors = stored.tensors
    w1_a, w1_b, w2_a, w2_b = (tensors[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return Loha(w1_a, w1_b, w2_a, w2_b, tensors.get("t1"), tensors.get("t2"), stored.scale, stored.kernel)


def loha_form(shapes: Shapes, weight: Shape) -> Form:
    """Rank r₁·r₂, at most that of a whole matrix."""
    ranks = (shapes[name][0] for name in (("w1_a", "w2_a") if "t1" in shapes else ("w1_b", "w2_b")))
    return Form(min(prod(ranks), weight[0], prod(weight[1:])))
