"""What the shapes of an adapter's tensors say about the weight it changes, per algorithm.

Only shapes are looked at, so that a file can be placed in a family without reading a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from lora_convert.families import Module

__all__ = ["fits", "is_exact", "lora_misfits", "rank_of"]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Sizes = tuple[int | None, frozenset[int]]
"""Rows of the weight (None if the shapes do not tell), and the numbers of columns that would do (empty: any)."""


def _columns(*sizes: int) -> frozenset[int]:
    return frozenset(sizes)


def _loha(shapes: Shapes) -> Sizes:
    left, right = shapes["w1_a"], shapes["w1_b"]
    if "t1" in shapes:  # Tucker: both factors are (rank, size), the core carries the kernel
        return left[1], _columns(right[1] * prod(shapes["t1"][2:]))
    return left[0], _columns(prod(right[1:]))


def _kronecker_factor(shapes: Shapes, side: str) -> tuple[int, int]:
    """Rows and columns (kernel included) of one Kronecker factor, whole or factorised."""
    if side in shapes:
        whole = shapes[side]
        return whole[0], prod(whole[1:])
    left, right = shapes[f"{side}_a"], shapes[f"{side}_b"]
    core = shapes.get("t2") if side == "w2" else None
    if core:
        return left[1], right[1] * prod(core[2:])
    return left[0], prod(right[1:])


def _lokr(shapes: Shapes) -> Sizes:
    (rows_1, columns_1), (rows_2, columns_2) = (_kronecker_factor(shapes, side) for side in ("w1", "w2"))
    return rows_1 * rows_2, _columns(columns_1 * columns_2)


def _glora(shapes: Shapes) -> Sizes:
    """b1·b2 in LyCORIS since 2.0, b2·b1 before; told apart by the inner size, which is the rank."""
    first, second = shapes["b1"], shapes["b2"]
    orders = [(left[1], left, right) for left, right in ((first, second), (second, first)) if left[1] == right[0]]
    _, left, right = min(orders)
    return left[0], _columns(prod(right[1:]))


def _tlora(shapes: Shapes) -> Sizes:
    return shapes["p"][0], _columns(prod(shapes["q"][1:]))


def _full(shapes: Shapes) -> Sizes:
    if "weight" not in shapes:
        return shapes["bias"][0], frozenset()
    weight = shapes["weight"]
    return weight[0], _columns(prod(weight[1:]))


def _oft(shapes: Shapes) -> Sizes:
    blocks = shapes.get("blocks", shapes.get("diagonal"))
    if blocks is None or len(blocks) < 3:
        return None, frozenset()  # OFT_2 stores triangles, of the input side
    return prod(blocks[-3:-1]), frozenset()


_SIZES: Mapping[str, Callable[[Shapes], Sizes]] = {
    "loha": _loha, "lokr": _lokr, "glora": _glora, "tlora": _tlora, "full": _full, "norm": _full,
    "oft": _oft, "boft": _oft,
}  # fmt: skip


def fits(algorithm: str, shapes: Shapes, rows: int, module: Module) -> bool:
    """Whether the tensors can change a weight of `rows` rows with the columns of `module`.

    True also where the algorithm's shapes do not tell; False where tensors are missing or malformed.
    """
    columns = prod(module.shape[1:])
    if algorithm == "lora":
        return {"down", "up"} <= shapes.keys() and not lora_misfits(shapes, rows, module)
    if algorithm == "ia3":
        return prod(shapes.get("weight", ())) in (rows, module.shape[1] if len(module.shape) > 1 else rows)
    measure = _SIZES.get(algorithm)
    if measure is None:
        return True
    try:
        height, widths = measure(shapes)
    except (KeyError, IndexError, ValueError):
        return False
    return height in (None, rows) and (not widths or columns in widths)


def is_exact(algorithm: str, shapes: Shapes, module: Module) -> bool:
    """Whether a factor has the dimensions of the module: linear layers as matrices, convolutions as 4-D."""
    factor = shapes.get("down") if algorithm == "lora" else shapes.get("weight") if algorithm == "full" else None
    return factor is None or len(factor) == len(module.shape)


def rank_of(algorithm: str, shapes: Shapes) -> int | None:
    """The adapter's rank, None where it has none."""
    if algorithm == "glora" and {"a1", "a2"} <= shapes.keys():
        return min(*shapes["a1"][:2], *shapes["a2"][:2])
    fields = {"lora": ("down",), "loha": ("w1_b",), "lokr": ("w2_b", "w1_b"), "tlora": ("q",)}
    for name in fields.get(algorithm, ()):
        if shapes.get(name):
            return shapes[name][0]
    return None


def lora_misfits(shapes: Shapes, rows: int, module: Module) -> list[tuple[str, str]]:
    """What is wrong with a LoRA's shapes for a module: (field, sentence) pairs, none if they fit.

    Both spellings of a matrix are right, (r, in) and (r, in, 1, 1), and a convolution's kernel may be flattened.
    """
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    wrong = []
    columns, kernel = prod(module.shape[1:]), module.shape[2:]
    if len(up) not in (2, 4) or prod(up[2:]) != 1 or up[0] != rows:
        wrong.append(("up", f"its shape is {_dims(up)}, but the module has {rows} rows"))
    if mid is not None:
        if len(mid) != 4 or mid[2:] != kernel or mid[:2] != (up[1] if len(up) > 1 else 0, down[0]):
            wrong.append(("mid", f"its shape {_dims(mid)} does not join {_dims(up)} to {_dims(down)}"))
        columns = module.shape[1]
    elif len(up) > 1 and len(down) > 1 and up[1] != down[0]:
        wrong.append(("up", f"its shape {_dims(up)} has rank {up[1]}, but lora_down {_dims(down)} has rank {down[0]}"))
    if (
        len(down) not in (2, 4)
        or prod(down[1:]) != columns
        or (len(down) == 4 and mid is None and down[2:] not in (kernel, (1, 1)))
    ):
        wrong.append(("down", f"its shape is {_dims(down)}, but the module takes {_dims(module.shape[1:])}"))
    return wrong


def _dims(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "()"
