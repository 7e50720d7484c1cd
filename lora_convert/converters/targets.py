"""An adapter of a fused module (qkv) as the adapters of its targets, each with the rows that are its own."""

from __future__ import annotations

from collections.abc import Iterator

from lora_convert.converters.adapters import Adapter, Base, Difference
from lora_convert.errors import Unrepresentable
from lora_convert.families import Module
from lora_convert.inspect.detection import AdaptedModule

__all__ = ["by_target"]


def by_target(
    adapter: Adapter, module: AdaptedModule, base: Base | None = None
) -> Iterator[tuple[Module, Adapter, Base | None]]:
    """The targets in row order, each with its adapter and its part of `base`, the rows of all of them.

    An algorithm that does not split by rows is taken as the dense change that it makes.
    """
    first = 0
    for target in module.modules:
        last = first + target.shape[0]
        if len(module.modules) == 1:
            yield target, adapter, base
        else:
            part = None if base is None else {name: values[first:last] for name, values in base.items()}
            yield target, _rows(adapter, target, first, base), part
        first = last


def _rows(adapter: Adapter, target: Module, first: int, base: Base | None) -> Adapter:
    rows = slice(first, first + target.shape[0])
    try:
        return adapter.rows(rows.start, rows.stop)
    except Unrepresentable:
        deltas = {name: values[rows] for name, values in adapter.deltas(base).items()}
        return Difference(target.shape, deltas.get("weight"), deltas.get("bias"))
