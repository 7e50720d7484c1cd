"""What the shapes of an adapter's tensors say about the weight it changes, per algorithm.

Only shapes are looked at, so that a file can be placed in a family without reading a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt, prod

from lora_convert.families import Module

__all__ = ["fits", "is_exact", "is_per_input", "lora_misfits", "rank_of", "wrong_parts"]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Sizes = tuple[int | None, frozenset[int]]
"""Rows of the weight (None if the shapes do not tell), and the numbers of columns that would do (empty: any)."""


def _sets(*fields: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(text.split()) for text in fields)


_COMPLETE: Mapping[str, tuple[frozenset[str], ...]] = {
    "loha": _sets("w1_a w1_b w2_a w2_b", "w1_a w1_b w2_a w2_b t1 t2"),
    "lokr": _sets(*(f"{one} {two}" for one in ("w1", "w1_a w1_b") for two in ("w2", "w2_a w2_b", "w2_a w2_b t2"))),
    "glora": _sets("b1 b2", "b1 b2 bm", "a1 a2 b1 b2", "a1 a2 b1 b2 bm"),
    "tlora": _sets("q p lambda"),
    "ia3": _sets("weight on_input", "factors"),
    "oft": _sets("blocks", "blocks rescale", "diagonal", "diagonal rescale", "rotation"),
    "boft": _sets("blocks", "blocks rescale"),
}
"""The sets of fields that make a module; with others it would not be clear what the module is."""


def _columns(*sizes: int) -> frozenset[int]:
    return frozenset(sizes)


def _joined(size: int, other: int) -> int:
    """The size at which two factors are joined. Raises ValueError if they differ."""
    if size != other:
        raise ValueError("the factors do not join")
    return size


def _low_rank(left: Shape, right: Shape, core: Shape | None = None) -> tuple[int, int]:
    """Rows and columns (kernel included) of a product: left (rows, r), right (r, columns), kernels flattened or not.

    With a Tucker core (r, r', kernel): left (r, rows), right (r', columns).
    """
    if core is not None:
        _joined(left[0], core[0])
        _joined(right[0], core[1])
        return left[1], right[1] * prod(core[2:])
    _joined(prod(left[1:]), right[0])
    return left[0], prod(right[1:])


def _loha(shapes: Shapes) -> Sizes:
    rows, columns = _low_rank(shapes["w1_a"], shapes["w1_b"], shapes.get("t1"))
    others = _low_rank(shapes["w2_a"], shapes["w2_b"], shapes.get("t2"))
    return _joined(rows, others[0]), _columns(_joined(columns, others[1]))


def _kronecker_factor(shapes: Shapes, side: str) -> tuple[int, int]:
    """Rows and columns (kernel included) of one Kronecker factor, whole or factorised."""
    if side in shapes:
        whole = shapes[side]
        return whole[0], prod(whole[1:])
    return _low_rank(shapes[f"{side}_a"], shapes[f"{side}_b"], shapes.get("t2") if side == "w2" else None)


def _lokr(shapes: Shapes) -> Sizes:
    (rows_1, columns_1), (rows_2, columns_2) = (_kronecker_factor(shapes, side) for side in ("w1", "w2"))
    return rows_1 * rows_2, _columns(columns_1 * columns_2)


def _glora_orders(shapes: Shapes) -> list[tuple[int, Shape, Shape]]:
    """b1·b2 in LyCORIS since 2.0, b2·b1 before; told apart by the inner size, which is the rank and comes first."""
    first, second = shapes["b1"], shapes["b2"]
    pairs = ((first, second), (second, first))
    orders = [(right[0], left, right) for left, right in pairs if prod(left[1:]) == right[0]]
    return sorted(orders, key=lambda order: order[0])


def _glora(shapes: Shapes) -> Sizes:
    _, left, right = _glora_orders(shapes)[0]
    if {"a1", "a2"} <= shapes.keys():
        first, second = shapes["a1"], shapes["a2"]
        if left is not shapes["b1"]:
            first, second = second, first
        _joined(first[1], second[0])
        _joined(_joined(first[0], second[1]), right[1])
    core = shapes.get("bm")
    if core is None:
        return left[0], _columns(prod(right[1:]))
    _joined(len(core), 4)
    _joined(core[0], _joined(core[1], right[0]))
    return left[0], _columns(prod(right[1:]) * prod(core[2:]))


def _tlora(shapes: Shapes) -> Sizes:
    _joined(prod(shapes["lambda"]), shapes["q"][0])
    return _low_rank(shapes["p"], shapes["q"])[0], _columns(prod(shapes["q"][1:]))


def _full(shapes: Shapes) -> Sizes:
    if "weight" not in shapes:
        return prod(shapes["bias"]), frozenset()
    weight = shapes["weight"]
    if "bias" in shapes:
        _joined(prod(shapes["bias"]), weight[0])
    return weight[0], _columns(prod(weight[1:]))


def _oft(shapes: Shapes) -> Sizes:
    if "rotation" in shapes:  # OFT_2 stores triangles, of the input side
        count, elements = shapes["rotation"]
        size = (1 + isqrt(1 + 8 * elements)) // 2
        _joined(size * (size - 1) // 2, max(elements, 1))
        return None, _columns(count * size) if count != 1 else frozenset()
    blocks = shapes["blocks"] if "blocks" in shapes else shapes["diagonal"]
    _joined(len(blocks), 3)
    return _rotated(blocks, shapes), frozenset()


def _boft(shapes: Shapes) -> Sizes:
    blocks = shapes["blocks"]
    _joined(len(blocks), 4)
    rows = _rotated(blocks[1:], shapes)
    _joined(blocks[2] % 2, 0)
    if blocks[0] > max(rows, 1).bit_length():  # before a power of any size is computed
        raise ValueError("there are more stages than butterflies of the rows")
    _joined(rows % (2 ** (blocks[0] - 1) * blocks[2]) if blocks[0] else 0, 0)  # the last stage mixes the widest
    return rows, frozenset()


def _rotated(blocks: Shape, shapes: Shapes) -> int:
    """Rows that square blocks rotate, every one of which may have a factor."""
    rows = blocks[0] * _joined(blocks[1], max(blocks[2], 1))
    return _joined(prod(shapes.get("rescale", (rows,))), rows)


def _fits_ia3(shapes: Shapes, rows: int, module: Module) -> bool:
    """LyCORIS' factors with a number that says of which side, or peft's, which keep their place."""
    width = module.shape[1]
    if "factors" not in shapes:
        return prod(shapes["weight"]) in (rows, width) and prod(shapes["on_input"]) == 1
    known = ((rows, 1), (1, width)) if len(module.shape) == 2 else ((1, rows, 1, 1), (1, width, 1, 1))
    return shapes["factors"] in known


_SIZES: Mapping[str, Callable[[Shapes], Sizes]] = {
    "loha": _loha, "lokr": _lokr, "glora": _glora, "tlora": _tlora, "full": _full, "norm": _full,
    "oft": _oft, "boft": _boft,
}  # fmt: skip


def fits(algorithm: str, shapes: Shapes, rows: int, module: Module) -> bool:
    """Whether the tensors can change a weight of `rows` rows with the columns of `module`.

    Of several algorithms joined by `+` all must. True also where the shapes do not tell; False where tensors are
    missing or malformed.
    """
    parts = set(algorithm.split("+"))
    if "dora" in parts and "weight" not in shapes and parts < {"full", "norm", "dora"}:
        return parts == {"dora"}  # a lone bias has nothing that could be normalised
    return all(_fits(part, shapes, rows, module) for part in parts)


def _fits(algorithm: str, shapes: Shapes, rows: int, module: Module) -> bool:
    columns = prod(module.shape[1:])
    if (len(module.shape) < 2 and algorithm not in ("full", "norm")) or any(wrong_parts(algorithm, shapes)):
        return False
    if algorithm == "lora":
        return {"down", "up"} <= shapes.keys() and not lora_misfits(shapes, rows, module)
    if algorithm == "ia3":
        return _fits_ia3(shapes, rows, module)
    if algorithm == "dora":
        return not _magnitude_misfits(shapes, rows, module)
    measure = _SIZES.get(algorithm)
    if measure is None:
        return True
    try:
        height, widths = measure(shapes)
    except (KeyError, IndexError, ValueError):
        return False
    return height in (None, rows) and (not widths or columns in widths)


def wrong_parts(algorithm: str, shapes: Shapes) -> tuple[list[str], list[str]]:
    """The fields that a module lacks to be one of the algorithm, and those that are too many."""
    complete = _COMPLETE.get(algorithm, ())
    given = frozenset(shapes).intersection(frozenset().union(*complete))
    if not complete or given in complete:
        return [], []
    nearest = min(complete, key=lambda fields: len(fields ^ given))
    return sorted(nearest - given), sorted(given - nearest)


def is_exact(algorithm: str, shapes: Shapes, module: Module) -> bool:
    """Whether a factor has the dimensions of the module: linear layers as matrices, convolutions as 4-D."""
    factor = shapes.get("down") if algorithm == "lora" else shapes.get("weight") if algorithm == "full" else None
    return factor is None or len(factor) == len(module.shape)


def rank_of(algorithm: str, shapes: Shapes) -> int | None:
    """The adapter's rank, None where it has none."""
    if algorithm == "glora" and {"b1", "b2"} <= shapes.keys():
        return next((order[0] for order in _glora_orders(shapes)), None)
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
    if len(module.shape) < 2:
        return [("up", "the module is a norm, whose weight is a vector")]
    columns, kernel = prod(module.shape[1:]), module.shape[2:]
    if len(up) not in (2, 4) or prod(up[2:]) != 1 or up[0] != rows:
        wrong.append(("up", f"its shape is {_dims(up)}, but the module has {rows} rows"))
    if mid is not None:
        if len(mid) != 4 or mid[2:] != kernel or mid[:2] != (up[1] if len(up) > 1 else 0, down[0] if down else 0):
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
    for name in ("up_bias", "bias"):
        if name in shapes and prod(shapes[name]) != rows:
            wrong.append((name, f"its shape is {_dims(shapes[name])}, but the module has {rows} rows"))
    return wrong + _magnitude_misfits(shapes, rows, module)


def _magnitude_misfits(shapes: Shapes, rows: int, module: Module) -> list[tuple[str, str]]:
    """What is wrong with a DoRA's magnitude: one number per row, or per input under LyCORIS' name."""
    per_input = is_per_input(shapes.get("dora_scale", ()))
    for name, size in (("dora_scale", module.shape[1] if per_input else rows), ("magnitude", rows)):
        if name in shapes and prod(shapes[name]) != size:
            return [(name, f"its shape is {_dims(shapes[name])}, but the module's weight is {_dims(module.shape)}")]
    return []


def is_per_input(dora_scale: Shape) -> bool:
    """Whether a magnitude under LyCORIS' name, which keeps its place in the weight, is one per input: (1, in, …)."""
    return len(dora_scale) > 1 and dora_scale[0] == 1 and dora_scale[1] != 1


def _dims(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "()"
