"""Generate the family tables from the real classes: `python -m lora_convert.runtime.tables [--check]`.

Names and shapes come from the live model. The original names come from the few facts below: how the published
checkpoints (LDM and SGM for UNets, OpenCLIP for its text encoders) name the same modules.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lora_convert.families
from lora_convert.families.table import Module, parse_table, walk_key
from lora_convert.runtime.architectures import TEXT_ENCODERS, UNETS, build, weight_modules

if TYPE_CHECKING:
    import torch

FOLDER = Path(lora_convert.families.__file__).parent
COMMAND = "python -m lora_convert.runtime.tables"

_UNET_BLOCK = re.compile(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)")
_UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OPENCLIP_OUTSIDE = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection": "text_projection",
}
_OPENCLIP_LAYER = {
    "self_attn.q_proj": "attn.in_proj",
    "self_attn.k_proj": "attn.in_proj",
    "self_attn.v_proj": "attn.in_proj",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm2": "ln_2",
}
_OPENCLIP_IN_PROJ = ("q_proj", "k_proj", "v_proj")  # torch.nn.MultiheadAttention stacks its rows in this order


def _unet_original(path: str, model: Any) -> str:
    """Name of a UNet's module in LDM and SGM, which number the layers of all blocks in one sequence."""
    found = _UNET_BLOCK.fullmatch(path)
    if found is None:
        return _UNET_OUTSIDE[path]
    where, block, kind, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    layers = model.config.layers_per_block
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op"
    if kind == "upsamplers":
        attends = model.config.up_block_types[block].startswith("CrossAttn")
        return f"output_blocks.{first + layers}.{2 if attends else 1}.conv"
    column, child = (0, _UNET_RESNET[rest]) if kind == "resnets" else (1, rest)
    layer = {
        "down_blocks": f"input_blocks.{first + index + 1}.{column}",
        "mid_block": f"middle_block.{2 * index + column}",
        "up_blocks": f"output_blocks.{first + index}.{column}",
    }[where]
    return f"{layer}.{child}"


def _openclip_original(path: str) -> str:
    if path in _OPENCLIP_OUTSIDE:
        return _OPENCLIP_OUTSIDE[path]
    layer, child = path.removeprefix("text_model.encoder.layers.").split(".", 1)
    return f"transformer.resblocks.{layer}.{_OPENCLIP_LAYER[child]}"


def _module(table: str, model: torch.nn.Module, path: str, weighted: torch.nn.Module) -> Module:
    shape = tuple(weighted.get_parameter("weight").shape)
    mark = "embedding" if type(weighted).__name__ == "Embedding" else None
    if table in UNETS:
        return Module("", path, shape, _unet_original(path, model), None, mark)
    if table.startswith("clip_"):  # published under the names that transformers gives it
        return Module("", path, shape, path, None, mark)
    rows = None
    leaf = path.rpartition(".")[2]
    if leaf in _OPENCLIP_IN_PROJ:
        start = _OPENCLIP_IN_PROJ.index(leaf) * shape[0]
        rows = (start, start + shape[0])
    # A bare parameter that OpenCLIP multiplies from the right.
    mark = "transposed" if path == "text_projection" else mark
    return Module("", path, shape, _openclip_original(path), rows, mark)


def live_modules(table: str) -> tuple[Module, ...]:
    """The rows of a table, taken from the live model, in the order of its `named_modules()`."""
    model = build(table)
    return tuple(_module(table, model, path, weighted) for path, weighted in weight_modules(model).items())


# Each component of a dotted name with the choices it stands for; a line is their product, the first varying slowest.
Choices = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Line:
    path: Choices
    shape: str
    original: Choices
    mark: str

    def joined(self, other: _Line) -> _Line | None:
        """The one line that stands for this line's modules and then the other's, or None."""
        path, original = _joined(self.path, other.path), _joined(self.original, other.original)
        if path is None or original is None or (self.shape, self.mark) != (other.shape, other.mark):
            return None
        return replace(self, path=path, original=original)


def _joined(first: Choices, second: Choices) -> Choices | None:
    if len(first) != len(second):
        return None
    joined = tuple(a if a == b else a + b for a, b in zip(first, second, strict=True))
    both = itertools.chain(itertools.product(*first), itertools.product(*second))
    return joined if list(itertools.product(*joined)) == list(both) else None


def _line(module: Module) -> _Line:
    block = f"[{module.rows[0] // module.shape[0]}]" if module.rows else ""
    return _Line(
        tuple((part,) for part in module.path.split(".")),
        "x".join(map(str, module.shape)),
        tuple((part,) for part in (module.original + block).split(".")),
        module.mark or "",
    )


def _join_siblings(lines: Iterable[_Line]) -> list[_Line]:
    """Join children of one module that follow each other in the walk (`to_q`, `to_k`, `to_v`)."""
    joined: list[_Line] = []
    for line in lines:
        both = joined[-1].joined(line) if joined else None
        if both and joined[-1].path[:-1] == line.path[:-1]:
            joined[-1] = both
        else:
            joined.append(line)
    return joined


def _join_numbers(lines: Sequence[_Line]) -> list[_Line]:
    """Join lines that differ in one number only, innermost first, until no two do."""
    joined: list[_Line] = []
    for line in lines:
        for place, earlier in enumerate(joined):
            if both := earlier.joined(line):
                joined[place] = both
                break
        else:
            joined.append(line)
    return joined if len(joined) == len(lines) else _join_numbers(joined)


def _sibling_ranks(paths: Iterable[str]) -> dict[str, int]:
    """Ranks for `walk_key`, such that under every parent the children of all its numbered copies keep their order.

    Needed because the first of several blocks may lack children of the later ones: SDXL's first has no attentions.
    """
    after: TopologicalSorter[str] = TopologicalSorter()
    last_child: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        for depth, part in enumerate(parts):
            if part.isdecimal():
                continue
            child = "." + ".".join("*" if name.isdecimal() else name for name in parts[: depth + 1])
            previous = last_child.get(parent := ".".join(parts[:depth]))
            after.add(child, *([previous] if previous and previous != child else []))
            last_child[parent] = child
    return {child: rank for rank, child in enumerate(after.static_order())}


def _compressed(modules: Sequence[Module]) -> list[_Line]:
    ranks = _sibling_ranks(module.path for module in modules)
    kinds: dict[Choices, list[_Line]] = {}
    for line in _join_siblings(map(_line, modules)):
        kind = (*(("0",) if part[0].isdecimal() else part for part in line.path[:-1]), line.path[-1])
        kinds.setdefault(kind, []).append(line)
    walk = sorted(kinds, key=lambda kind: walk_key(".".join(part[0] for part in kind), ranks))
    return [line for kind in walk for line in _join_numbers(kinds[kind])]


def _braced(choices: Choices) -> str:
    return ".".join(part[0] if len(part) == 1 else f"{{{_listed(part)}}}" for part in choices)


def _listed(part: tuple[str, ...]) -> str:
    if all(choice.isdecimal() for choice in part):
        numbers = list(map(int, part))
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(part)


def generate(table: str) -> str:
    """The text of a table, compressed into patterns.

    Raises ValueError if the patterns do not expand to exactly the live model's modules in its own order.
    """
    modules = live_modules(table)
    rows = [(_braced(line.path), line.shape, _braced(line.original), line.mark) for line in _compressed(modules)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    class_name = "UNet2DConditionModel" if table in UNETS else "CLIPTextModelWithProjection"
    lines = [f"# {class_name}, generated by `{COMMAND}`"]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    text = "\n".join(lines) + "\n"
    if parse_table("", text) != modules:
        raise ValueError(f"the patterns of {table} do not expand to the modules they were made from")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the tables, or with `--check` only compare them; returns the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Generate the family tables from the real classes.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    check: bool = parser.parse_args(arguments).check
    status = 0
    for table in (*UNETS, *TEXT_ENCODERS):
        path, text = FOLDER / f"{table}.txt", generate(table)
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.stderr.write(
                f"{path.name} differs from the installed classes; run `{COMMAND}` and review the change.\n"
            )
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
