"""Tensors -> groups -> places: which modules the tensors mean in every family, and which family explains them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lora_convert.containers import Header
from lora_convert.families import FAMILIES, Family
from lora_convert.inspect import shapes
from lora_convert.inspect.detection import Rival
from lora_convert.inspect.kinds import names_other_base
from lora_convert.inspect.names import Place, places, walk_order
from lora_convert.inspect.spelling import split_suffix
from lora_convert.inspect.trainers import family_hints
from lora_convert.report import Finding, shown

__all__ = ["Choice", "Group", "Match", "choose", "group_tensors", "shapes_of"]

_NUMBERED = re.compile(r"(unet|text_encoder|text_encoder_2):(\d+):(up|down)")


@dataclass(slots=True)
class Group:
    """The tensors under one module part: field -> tensor name, and the algorithms that the suffixes speak of."""

    name: str
    tensors: dict[str, str] = field(default_factory=dict)
    algorithms: set[str] = field(default_factory=set)
    doubles: list[tuple[str, str]] = field(default_factory=list)

    def add(self, field_name: str, algorithm: str, tensor: str) -> None:
        if field_name in self.tensors:
            self.doubles.append((self.tensors[field_name], tensor))
        self.tensors[field_name] = tensor
        if field_name not in ("alpha", "scalar"):
            self.algorithms.add(algorithm)

    def algorithm(self, header: Header) -> str:
        """The algorithm's name; several in one module joined by `+`, DoRA last; empty for an alpha without matrices."""
        names = self.algorithms - {"dora"}
        if names == {"oft"} and "blocks" in self.tensors and len(header.tensors[self.tensors["blocks"]].shape) == 4:
            names = {"boft"}
        return "+".join([*sorted(names, key=lambda name: (name != "lora", name)), *(self.algorithms & {"dora"})])


@dataclass(frozen=True)
class Match:
    """How one family explains the groups. `fitted` and `misfits` map groups' names to places."""

    family: Family
    fitted: Mapping[str, Place]
    misfits: Mapping[str, Place]
    unnamed: tuple[str, ...]
    exact: int
    variants: Mapping[str, str]

    @cached_property
    def score(self) -> tuple[int, int, int]:
        return len(self.fitted), self.exact, self.named if not self.fitted else 0

    @property
    def named(self) -> int:
        """Number of groups whose names are of this family, whatever their shapes."""
        return len(self.fitted) + len(self.misfits)


def group_tensors(names: Iterable[str]) -> tuple[dict[str, Group], list[str]]:
    """Tensors by module part, and the names that end in no known parameter."""
    groups: dict[str, Group] = {}
    strays = []
    for tensor in names:
        numbered = _NUMBERED.fullmatch(tensor)
        if numbered:
            part, field_name, algorithm = f"{numbered[1]}:{numbered[2]}", numbered[3], "lora"
        elif (split := split_suffix(tensor)) is not None:
            part, field_name, algorithm = split[0], split[1].field, split[1].algorithm
        else:
            strays.append(tensor)
            continue
        groups.setdefault(part, Group(part)).add(field_name, algorithm, tensor)
    for part, group in list(groups.items()):
        # `.weight` alone is any model's parameter; only `on_input` beside it makes it (IA)³
        if "ia3" in group.algorithms and not {"on_input", "factors"} & group.tensors.keys():
            strays.append(group.tensors.pop("weight"))
            group.algorithms.discard("ia3")
            if not group.tensors:
                del groups[part]
    return groups, strays


def shapes_of(group: Group, header: Header) -> dict[str, tuple[int, ...]]:
    """Shapes of a group's tensors by field."""
    return {name: header.tensors[tensor].shape for name, tensor in group.tensors.items()}


def _fit(group: Group, header: Header, family: Family, place: Place) -> tuple[Place, str] | None:
    """The place, if the group's shapes fit it; with the variant of the base model that they need (usually none)."""
    sizes = shapes_of(group, header)
    algorithm = group.algorithm(header)
    module = place.modules[-1]
    if shapes.fits(algorithm, sizes, place.rows, module):
        return place, ""
    if module.name == "unet.conv_in":
        for title, channels in family.variants:
            widened = replace(module, shape=(module.shape[0], channels, *module.shape[2:]))
            if shapes.fits(algorithm, sizes, place.rows, widened):
                return replace(place, modules=(widened,)), title
    return None


def _numbered_places(family: Family, groups: Mapping[str, Group], header: Header) -> dict[str, list[Place]]:
    """Places of cloneofsimo's numbered layers: the walk order under which most shapes fit."""
    found: dict[str, list[Place]] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        parts = {name: group for name, group in groups.items() if name.rpartition(":")[0] == component}
        best: list[tuple[str, Place]] = []
        for order in walk_order(family, component) if parts else ():
            numbered = [(name, int(name.rpartition(":")[2])) for name in parts]
            tried = [(name, Place((order[n],), "diffusers", "cloneofsimo")) for name, n in numbered if n < len(order)]
            fit = [item for item in tried if _fit(parts[item[0]], header, family, item[1])]
            best = max(best, fit, key=len)
        found.update({name: [place] for name, place in best})
    return found


def _match(family: Family, groups: Mapping[str, Group], header: Header) -> Match:
    numbered = _numbered_places(family, groups, header)
    fitted: dict[str, Place] = {}
    misfits: dict[str, Place] = {}
    unnamed, variants, exact = [], {}, 0
    for name, group in groups.items():
        candidates = numbered.get(name) or list(places(family, name))
        fits = next((fit for place in candidates if (fit := _fit(group, header, family, place))), None)
        if fits:
            fitted[name], variant = fits
            if variant:
                variants[name] = variant
            exact += shapes.is_exact(group.algorithm(header), shapes_of(group, header), fitted[name].modules[-1])
        elif candidates:
            misfits[name] = candidates[0]
        else:
            unnamed.append(name)
    return Match(family, fitted, misfits, tuple(unnamed), exact, variants)


@dataclass(frozen=True)
class Choice:
    """The family that explains the file, None if none or several do, with the reasons."""

    match: Match | None
    evidence: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    findings: tuple[Finding, ...] = ()


def _why_not(match: Match, groups: Mapping[str, Group]) -> str:
    if match.misfits:
        name, place = next(iter(match.misfits.items()))
        size = "x".join(map(str, place.modules[-1].shape))
        return f"the shapes of {len(match.misfits)} of {len(groups)} modules differ ({shown(name)} would be {size})"
    if match.unnamed:
        return f"the names of {len(match.unnamed)} of {len(groups)} modules are not its ({shown(match.unnamed[0])})"
    return "its convolutions would have to be stored as matrices, or its matrices as convolutions"


def _rivals(matches: Sequence[Match], chosen: Match | None, groups: Mapping[str, Group]) -> tuple[Rival, ...]:
    return tuple(
        Rival(match.family.name, len(match.fitted), _why_not(match, groups))
        for match in matches
        if match is not chosen and match.fitted
    )


def choose(
    groups: Mapping[str, Group], header: Header, wanted: str | None, hint: tuple[str, str] | None = None
) -> Choice:
    """The family that explains most, if that is most of the file and no other explains as much.

    In a tie the metadata decides, or else `hint`: a family, and the reason.
    """
    families = [FAMILIES[wanted]] if wanted else list(FAMILIES.values())
    matches = [_match(family, groups, header) for family in families]
    ranked = sorted(matches, key=lambda match: match.score, reverse=True)
    best = ranked[0]
    total = len(groups)
    if wanted:
        return Choice(best, (f"--family {wanted}: {len(best.fitted)} of {total} modules fit",))
    if 2 * best.named < total or any(names_other_base(name) for name in best.unnamed):
        return Choice(None, rivals=_rivals(ranked, None, groups))
    if not best.fitted:
        return _by_names(ranked, header, total)
    tied = [match for match in ranked if len(match.fitted) == len(best.fitted)]
    evidence = f"{len(best.fitted)} of {total} modules have names and shapes of"
    if len(tied) == 1:
        return Choice(best, (f"{evidence} {best.family.title}",), _rivals(ranked, best, groups))
    best_of_tied, reason = _tie_break(tied, header, hint)
    if best_of_tied is None:
        return Choice(None, rivals=_tie(tied), findings=(_ambiguous(tied, total),))
    others = _tie([match for match in tied if match is not best_of_tied])
    said = (f"{evidence} {best_of_tied.family.title}", f"the tensors fit {_names(tied)} equally; {reason}")
    return Choice(best_of_tied, said, (*others, *_rivals(ranked[len(tied) :], best_of_tied, groups)))


def _tie_break(tied: Sequence[Match], header: Header, hint: tuple[str, str] | None = None) -> tuple[Match | None, str]:
    """The family that the metadata names, else the one whose convolutions are stored as convolutions; and why."""
    hints = family_hints(header.metadata) or dict([hint] if hint else ())
    hinted = [match for match in tied if match.family.name in hints]
    if len(hinted) == 1:
        return hinted[0], hints[hinted[0].family.name]
    if any(map(_NUMBERED.fullmatch, header.tensors)):
        parts = {match.family.name: {part.name for part in match.family.components} for match in tied}
        single = [match for match in tied if "text_encoder_2" not in parts[match.family.name]]
        if len(single) == 1:
            return single[0], "cloneofsimo's trainer knows no model with two text encoders"
    exact = [match for match in tied if match.exact == max(match.exact for match in tied)]
    if len(exact) == 1:
        return exact[0], f"matrices and convolutions are stored as those of {exact[0].family.name}"
    return None, ""


def _by_names(ranked: Sequence[Match], header: Header, total: int) -> Choice:
    """The family of a file whose names are known and whose shapes fit nowhere: it is broken, and shall say where."""
    hints = family_hints(header.metadata)
    candidates = [match for match in ranked if match.named == ranked[0].named]
    best = next((match for match in candidates if match.family.name in hints), candidates[0])
    return Choice(best, (f"{best.named} of {total} modules have names of {best.family.title}, none has its shapes",))


def _names(matches: Iterable[Match]) -> str:
    return " and ".join(match.family.name for match in matches)


def _tie(matches: Sequence[Match]) -> tuple[Rival, ...]:
    return tuple(Rival(match.family.name, len(match.fitted), "all names and shapes fit") for match in matches)


def _ambiguous(tied: Sequence[Match], total: int) -> Finding:
    message = f"The tensors fit {_names(tied)} equally, and the metadata names none of them."
    if len(tied[0].fitted) < total:
        message = f"{_names(tied)} each explain {len(tied[0].fitted)} of {total} modules, and none explains all."
    fix = f"Say which with --family ({', '.join(match.family.name for match in tied)})."
    return Finding("ambiguous-family", "error", "", message, fix)
