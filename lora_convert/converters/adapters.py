"""The algebra: one small class per algorithm, with the weight change that its trainer defines.

Sizes: out and in are the rows and columns of the adapted weight, r the rank, kh × kw a convolution's kernel (absent for
linear layers). Arrays are float64 inside, so that nothing is rounded before the caller decides where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_convert.containers import Source
from lora_convert.inspect.detection import AdaptedModule

__all__ = ["ALGORITHMS", "Adapter", "Lora", "read_adapter", "read_matrices"]

Array = NDArray[Any]


class Adapter(Protocol):
    """What every algorithm offers."""

    def deltas(self) -> Mapping[str, Array]:
        """The definition: ΔW under `weight`, (out, in) or (out, in, kh, kw), float64."""
        ...

    def rows(self, start: int, stop: int) -> Adapter:
        """The adapter of the rows `start` to `stop` (exclusive) of the weight."""
        ...

    def to_lora(self) -> Lora:
        """The same change as one product of two factors, exactly. Raises Unrepresentable where there is none."""
        ...


@dataclass(frozen=True)
class Lora:
    """ΔW = scale · up · down, with a Tucker core `mid` between them if there is one.

    Shapes: down (r, in·kh·kw), or (r', in) with a core; up (out, r); mid (r, r', kh, kw).
    LoRA: Hu et al. 2021, arXiv:2106.09685. Tucker core (LoCon `use_tucker`): LyCORIS `functional/locon.py`.
    """

    down: Array
    up: Array
    mid: Array | None = None
    scale: float = 1.0
    kernel: tuple[int, ...] = ()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array], scale: float, kernel: Sequence[int]) -> Lora:
        """From tensors as stored: matrices or 4-D, kernels flattened or not."""
        down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
        flat = down.reshape(down.shape[0], math.prod(down.shape[1:]))
        return cls(flat, up.reshape(up.shape[0], up.shape[1]), mid, scale, tuple(kernel))

    def to_lora(self) -> Lora:
        if self.mid is None:
            return self
        core, down = self.mid.astype(np.float64), self.down.astype(np.float64)
        folded = np.zeros((core.shape[0], down.shape[1], *core.shape[2:]))
        for inner in range(down.shape[0]):  # no BLAS: its sums differ between machines, and outputs must not
            folded += core[:, inner, None] * down[inner][None, :, None, None]
        return Lora(folded.reshape(core.shape[0], math.prod(folded.shape[1:])), self.up, None, self.scale, self.kernel)

    def rows(self, start: int, stop: int) -> Lora:
        return Lora(self.down, self.up[start:stop], self.mid, self.scale, self.kernel)

    def deltas(self) -> Mapping[str, Array]:
        plain = self.to_lora()
        delta = self.scale * (plain.up.astype(np.float64) @ plain.down.astype(np.float64))
        return {"weight": delta.reshape(delta.shape[0], -1, *self.kernel)} if self.kernel else {"weight": delta}


ALGORITHMS: Mapping[str, Callable[[Mapping[str, Array], float, Sequence[int]], Adapter]] = {"lora": Lora.from_tensors}
"""Algorithm name -> its constructor from stored tensors, scale and kernel."""


def read_matrices(source: Source, module: AdaptedModule) -> dict[str, Array]:
    """The module's stored matrices by field, as arrays; without its scalars."""
    return {part: source.read(tensor) for part, tensor in module.tensors.items() if part not in ("alpha", "scalar")}


def read_adapter(source: Source, module: AdaptedModule) -> Adapter:
    """The adapter of one module with its values read. Raises KeyError for an algorithm that is not in `ALGORITHMS`."""
    scale = 1.0 if module.scale is None else module.scale
    return ALGORITHMS[module.algorithm](read_matrices(source, module), scale, module.modules[0].shape[2:])
