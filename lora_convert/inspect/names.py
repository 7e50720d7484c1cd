"""Which modules of a family a tensor's module part means: a lookup among generated names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from lora_convert.families import FAMILIES, Component, Family, Module
from lora_convert.inspect.spelling import BARE, PREFIXES, Naming, Prefix

__all__ = ["Naming", "Place", "places", "walk_order"]


@dataclass(frozen=True, slots=True)
class Place:
    """The modules that one name means: one, or all blocks of rows of a fused original; and how it was spelt."""

    modules: tuple[Module, ...]
    naming: Naming
    spelling: str = ""

    @property
    def rows(self) -> int:
        """Rows of the weight that an adapter under this name changes."""
        return sum(module.shape[0] for module in self.modules)


def _index(component: Component, separator: str) -> dict[str, Place]:
    """Every name that a module of the component has behind a prefix, with dots or flattened."""
    index: dict[str, Place] = {}
    fused: dict[str, list[Module]] = {}
    for module in component.modules.values():
        place = Place((module,), "diffusers")
        names = [module.path, module.path.removeprefix("text_model.")]  # transformers 5 lost `text_model.`
        for name in names:
            index.setdefault(name.replace(".", separator), place)
        if module.mark != "transposed":
            fused.setdefault(module.original, []).append(module)
    for original, modules in fused.items():
        blocks = sorted(modules, key=_first_row)
        index.setdefault(original.replace(".", separator), Place(tuple(blocks), "original"))
        if len(blocks) > 1:
            for number, module in enumerate(blocks):
                index.setdefault(f"{original}.{number}".replace(".", separator), Place((module,), "original"))
    return index


def _first_row(module: Module) -> int:
    return module.rows[0] if module.rows else 0


@cache
def _family_index(family: str, component: str, separator: str) -> Mapping[str, Place]:
    part = FAMILIES[family].component(component)
    return _index(part, separator) if part else {}


def _prefixes(name: str) -> Sequence[Prefix]:
    """The rows that can apply to a name: those it starts with, or the one without a prefix if there are none."""
    return [prefix for prefix in PREFIXES if name.startswith(prefix.text)] or [BARE]


def places(family: Family, name: str) -> Iterator[Place]:
    """All meanings that a module part (a tensor name without its parameter suffix) has in a family."""
    for prefix in _prefixes(name):
        rest = name[len(prefix.text) :]
        for component in family.components:
            if component.name not in prefix.components or (prefix.tables and component.table not in prefix.tables):
                continue
            place = _family_index(family.name, component.name, prefix.separator).get(rest)
            if place and place.naming in prefix.spellings:
                yield Place(place.modules, place.naming, prefix.spellings[place.naming])


# cloneofsimo's files number the adapted layers in the order in which the model is walked. In diffusers before 0.15 a
# transformer block registered its feed-forward between the two attentions.
_WALKED = {
    "unet": re.compile(r".*\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.0\.proj)"),
    "unet extended": re.compile(
        r".*\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.0\.proj|resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj))"
    ),
    "text_encoder": re.compile(r".*\.self_attn\.(k|v|q|out)_proj"),
}


_BLOCK_PART = re.compile(r"(.*\.transformer_blocks\.\d+)\.(attn1|ff|attn2)\..*")


def _feed_forward_second(modules: Sequence[Module]) -> list[Module]:
    """The same modules with each block's feed-forward moved between its attentions."""
    first: dict[str, int] = {}

    def key(item: tuple[int, Module]) -> tuple[int, int, int]:
        index, module = item
        part = _BLOCK_PART.fullmatch(module.path)
        if part is None:
            return index, 0, index
        return first.setdefault(part[1], index), ("attn1", "ff", "attn2").index(part[2]), index

    return [module for _, module in sorted(enumerate(modules), key=key)]


def walk_order(family: Family, component: str) -> Sequence[Sequence[Module]]:
    """The orders in which cloneofsimo's trainer may have numbered the layers of a component."""
    part = family.component(component)
    if part is None:
        return ()
    orders = []
    for key, pattern in _WALKED.items():
        if key.split()[0] == component:
            walked = [module for module in part.modules.values() if pattern.fullmatch(module.path)]
            orders += [walked, _feed_forward_second(walked)] if component == "unet" else [walked]
    return orders
