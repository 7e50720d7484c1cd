"""Family tables: one line per pattern of modules, expanded into `Module` rows.

A line is `path  shape  original  [mark]`. Braces expand, the k-th choice on the left being the k-th on the right;
`{0-3}` is a range, `{a,b}` a list; several braces multiply, the first one slowest. `attn.in_proj[1]` as an original
says that the module is the second block of rows of a fused `attn.in_proj`; the blocks lie one under the other, each as
high as its module. `#` starts a comment. Marks: `embedding` (a lookup table, no matrix product), `transposed` (the
original is stored transposed), `swapped` (the original has its two halves of rows exchanged).

The order of the lines tells in which order the model registers the children of a module: as they first appear.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

MARKS = frozenset({"embedding", "transposed", "swapped"})

_BRACES = re.compile(r"\{([^{}]*)\}")
_SHAPE = re.compile(r"\d+(x\d+)*")
_ROW_BLOCK = re.compile(r"(.+)\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Module:
    """One weight-bearing module of a base model, under its Diffusers name.

    `shape` is the weight's: (out, in) linear, (out, in, kh, kw) convolution, (n,) norm, (entries, width) embedding.
    `rows` is the half-open block of rows that the module takes in `original` where that is fused (qkv), else None.
    """

    component: str
    path: str
    shape: tuple[int, ...]
    original: str
    rows: tuple[int, int] | None = None
    mark: str | None = None

    @property
    def name(self) -> str:
        """Name in a pipeline: component and path, as in canonical files without the parameter."""
        return f"{self.component}.{self.path}"


def _choices(body: str) -> list[str]:
    low, dash, high = body.partition("-")
    if dash and low.isdecimal() and high.isdecimal():
        return [str(number) for number in range(int(low), int(high) + 1)]
    return body.split(",")


def _expand(pattern: str) -> list[str]:
    """All strings that a pattern with braces stands for, the first brace varying slowest."""
    parts = _BRACES.split(pattern)
    literals, bodies = parts[::2], parts[1::2]
    return [
        literals[0] + "".join(choice + literal for choice, literal in zip(picked, literals[1:], strict=True))
        for picked in itertools.product(*map(_choices, bodies))
    ]


def _lines(component: str, text: str) -> Iterator[Module]:
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        if len(fields) not in (3, 4) or not _SHAPE.fullmatch(fields[1]) or not MARKS.issuperset(fields[3:]):
            raise ValueError(f"line {number} is not `path shape original [mark]`: {line!r}")
        paths, originals = _expand(fields[0]), _expand(fields[2])
        if not paths or len(paths) != len(originals):
            raise ValueError(f"line {number} expands to {len(paths)} paths and {len(originals)} originals: {line!r}")
        shape = tuple(map(int, fields[1].split("x")))
        mark = fields[3] if len(fields) == 4 else None
        for path, original in zip(paths, originals, strict=True):
            yield Module(component, path, shape, original, None, mark)


def _row_blocks(original: str, blocks: Mapping[int, Module]) -> Iterator[Module]:
    if sorted(blocks) != list(range(len(blocks))):
        raise ValueError(f"row blocks of {original} are numbered {sorted(blocks)}, not from 0 without gaps")
    start = 0
    for _, module in sorted(blocks.items()):
        end = start + module.shape[0]
        yield replace(module, original=original, rows=(start, end))
        start = end


def _place_rows(modules: Sequence[Module]) -> Iterator[Module]:
    """Resolve `original[k]` into the rows that the module takes in `original`."""
    fused: dict[str, dict[int, Module]] = {}
    for module in modules:
        if block := _ROW_BLOCK.fullmatch(module.original):
            fused.setdefault(block[1], {})[int(block[2])] = module
        else:
            yield module
    for original, blocks in fused.items():
        yield from _row_blocks(original, blocks)


def walk_key(path: str, ranks: dict[str, int]) -> tuple[int, ...]:
    """Sort key that restores the order of `named_modules()`: siblings by first appearance, numbers by value.

    `ranks` collects the siblings as they appear; the children of all numbered blocks of one list share their ranks.
    """
    key = []
    parent = ""
    for part in path.split("."):
        if part.isdecimal():
            key.append(int(part))
            parent += ".*"
        else:
            parent += f".{part}"
            key.append(ranks.setdefault(parent, len(ranks)))
    return tuple(key)


def parse_table(component: str, text: str) -> tuple[Module, ...]:
    """Parse a table into modules, in the order in which the model's own `named_modules()` visits them.

    Raises ValueError for a line that is not of the table's form, for a path or an original that is given twice, and
    for row blocks that leave a gap.
    """
    modules = list(_lines(component, text))
    for what in ("path", "original"):
        seen: set[str] = set()
        for module in modules:
            name = getattr(module, what)
            if name in seen:
                raise ValueError(f"{what} {name} is given twice")
            seen.add(name)
    ranks: dict[str, int] = {}
    walk = {module.path: walk_key(module.path, ranks) for module in modules}
    return tuple(sorted(_place_rows(modules), key=lambda module: walk[module.path]))
