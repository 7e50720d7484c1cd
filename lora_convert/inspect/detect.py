"""Header -> Detection: group the tensors into adapters, place them in every family, choose with reasons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite, prod
from pathlib import Path

from lora_convert.containers import Header, Source
from lora_convert.containers.dtypes import WEIGHTS
from lora_convert.errors import FileError, UsageError
from lora_convert.families import FAMILIES, Family
from lora_convert.inspect import shapes
from lora_convert.inspect.config import AdapterConfig, find_config, from_metadata, parse_config
from lora_convert.inspect.detection import AdaptedModule, Detection, Rival
from lora_convert.inspect.facts import training_facts, trigger_words
from lora_convert.inspect.kinds import OTHER_BASES, other_kind
from lora_convert.inspect.names import Place, places, walk_order
from lora_convert.inspect.spelling import split_suffix
from lora_convert.inspect.trainers import family_hints, trainer_of
from lora_convert.report import Finding, listed, shown

__all__ = ["detect"]

_MOST_FINDINGS = 20
_NUMBERED = re.compile(r"(unet|text_encoder|text_encoder_2):(\d+):(up|down)")


@dataclass(slots=True)
class _Group:
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
class _Match:
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


def _group(header: Header) -> tuple[dict[str, _Group], list[str]]:
    """Tensors by module part, and the names that end in no known parameter."""
    groups: dict[str, _Group] = {}
    strays = []
    for tensor in header.tensors:
        numbered = _NUMBERED.fullmatch(tensor)
        if numbered:
            part, field_name, algorithm = f"{numbered[1]}:{numbered[2]}", numbered[3], "lora"
        elif (split := split_suffix(tensor)) is not None:
            part, field_name, algorithm = split[0], split[1].field, split[1].algorithm
        else:
            strays.append(tensor)
            continue
        groups.setdefault(part, _Group(part)).add(field_name, algorithm, tensor)
    for part, group in list(groups.items()):
        # `.weight` alone is any model's parameter; only `on_input` beside it makes it (IA)³
        if "ia3" in group.algorithms and "on_input" not in group.tensors:
            strays.append(group.tensors.pop("weight"))
            group.algorithms.discard("ia3")
            if not group.tensors:
                del groups[part]
    return groups, strays


def _shapes(group: _Group, header: Header) -> dict[str, tuple[int, ...]]:
    return {name: header.tensors[tensor].shape for name, tensor in group.tensors.items()}


def _fit(group: _Group, header: Header, family: Family, place: Place) -> tuple[Place, str] | None:
    """The place, if the group's shapes fit it; with the variant of the base model that they need (usually none)."""
    sizes = _shapes(group, header)
    algorithm = group.algorithm(header).partition("+")[0]
    module = place.modules[-1]
    if shapes.fits(algorithm, sizes, place.rows, module):
        return place, ""
    if module.name == "unet.conv_in":
        for title, channels in family.variants:
            widened = replace(module, shape=(module.shape[0], channels, *module.shape[2:]))
            if shapes.fits(algorithm, sizes, place.rows, widened):
                return replace(place, modules=(widened,)), title
    return None


def _numbered_places(family: Family, groups: Mapping[str, _Group], header: Header) -> dict[str, list[Place]]:
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


def _match(family: Family, groups: Mapping[str, _Group], header: Header) -> _Match:
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
            exact += shapes.is_exact(group.algorithm(header), _shapes(group, header), fitted[name].modules[-1])
        elif candidates:
            misfits[name] = candidates[0]
        else:
            unnamed.append(name)
    return _Match(family, fitted, misfits, tuple(unnamed), exact, variants)


@dataclass(frozen=True)
class _Choice:
    match: _Match | None
    evidence: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    findings: tuple[Finding, ...] = ()


def _why_not(match: _Match, groups: Mapping[str, _Group]) -> str:
    if match.misfits:
        name, place = next(iter(match.misfits.items()))
        size = "x".join(map(str, place.modules[-1].shape))
        return f"{len(match.misfits)} of {len(groups)} modules have other shapes ({shown(name)} would be {size})"
    if match.unnamed:
        return f"{len(match.unnamed)} of {len(groups)} modules have no such name ({shown(match.unnamed[0])})"
    return "its convolutions would have to be stored as matrices, or its matrices as convolutions"


def _rivals(matches: Sequence[_Match], chosen: _Match | None, groups: Mapping[str, _Group]) -> tuple[Rival, ...]:
    return tuple(
        Rival(match.family.name, len(match.fitted), _why_not(match, groups))
        for match in matches
        if match is not chosen and match.fitted
    )


def _choose(groups: Mapping[str, _Group], header: Header, wanted: str | None) -> _Choice:
    """The family that explains most, if that is most of the file and no other explains as much."""
    families = [FAMILIES[wanted]] if wanted else list(FAMILIES.values())
    matches = [_match(family, groups, header) for family in families]
    ranked = sorted(matches, key=lambda match: match.score, reverse=True)
    best = ranked[0]
    total = len(groups)
    if wanted:
        return _Choice(best, (f"--family {wanted}: {len(best.fitted)} of {total} modules fit",))
    if 2 * best.named < total:
        return _Choice(None, rivals=_rivals(ranked, None, groups))
    if not best.fitted:
        return _by_names(ranked, header, total)
    tied = [match for match in ranked if match.score == best.score]
    evidence = [f"{len(best.fitted)} of {total} modules have names and shapes of {best.family.title}"]
    if len(tied) > 1:
        hints = family_hints(header.metadata)
        hinted = [match for match in tied if match.family.name in hints]
        if len(hinted) != 1:
            return _Choice(None, rivals=_tie(tied), findings=(_ambiguous(tied, total),))
        best = hinted[0]
        evidence = [
            f"{len(best.fitted)} of {total} modules have names and shapes of {best.family.title}",
            f"the tensors fit {_names(tied)} equally; {hints[best.family.name]}",
        ]
        others = _tie([match for match in tied if match is not best])
        return _Choice(best, tuple(evidence), (*others, *_rivals(ranked[len(tied) :], best, groups)))
    return _Choice(best, tuple(evidence), _rivals(ranked, best, groups))


def _by_names(ranked: Sequence[_Match], header: Header, total: int) -> _Choice:
    """The family of a file whose names are known and whose shapes fit nowhere: it is broken, and shall say where."""
    hints = family_hints(header.metadata)
    candidates = [match for match in ranked if match.named == ranked[0].named]
    best = next((match for match in candidates if match.family.name in hints), candidates[0])
    return _Choice(best, (f"{best.named} of {total} modules have names of {best.family.title}, none has its shapes",))


def _names(matches: Iterable[_Match]) -> str:
    return " and ".join(match.family.name for match in matches)


def _tie(matches: Sequence[_Match]) -> tuple[Rival, ...]:
    return tuple(Rival(match.family.name, len(match.fitted), "all names and shapes fit") for match in matches)


def _ambiguous(tied: Sequence[_Match], total: int) -> Finding:
    message = f"The tensors fit {_names(tied)} equally, and the metadata names none of them."
    if len(tied[0].fitted) < total:
        message = f"{_names(tied)} each explain {len(tied[0].fitted)} of {total} modules, and none explains all."
    fix = f"Say which with --family ({', '.join(match.family.name for match in tied)})."
    return Finding("ambiguous-family", "error", "", message, fix)


def _capped(findings: list[Finding], what: str) -> list[Finding]:
    """At most `_MOST_FINDINGS`, the last one counting the others."""
    more = len(findings) - _MOST_FINDINGS
    if more <= 0:
        return findings
    last = findings[-1]
    return [*findings[:_MOST_FINDINGS], Finding(last.name, last.severity, "", f"{more} more {what}.", last.fix)]


def _unexplained(names: Sequence[str], family: Family) -> list[Finding]:
    message = f"No module or parameter of {family.title} has this name."
    fix = "Is it misspelt, or made for another base model? --skip PATTERN leaves tensors out."
    return _capped(
        [Finding("unexplained-tensor", "error", name, message, fix) for name in names], "tensors are unexplained"
    )


def _misfit_findings(groups: Mapping[str, _Group], match: _Match, header: Header) -> list[Finding]:
    findings = []
    for name, place in match.misfits.items():
        group, sizes = groups[name], _shapes(groups[name], header)
        module = place.modules[-1]
        fix = "The file is damaged, or was made for another base model."
        wrong = []
        if {"down", "up"} <= sizes.keys() and group.algorithm(header) in ("lora", "lora+dora"):
            wrong = [(group.tensors[part], said) for part, said in shapes.lora_misfits(sizes, place.rows, module)]
        elif not {"down", "up"} & sizes.keys():
            size = "x".join(map(str, module.shape))
            wrong = [(next(iter(group.tensors.values())), f"its shapes do not make a weight of {size}")]
        findings += [
            Finding("shape-misfit", "error", tensor, f"It does not fit {module.name}: {said}.", fix)
            for tensor, said in wrong
        ]
    return _capped(findings, "tensors do not fit their modules")


def _partner_findings(groups: Mapping[str, _Group]) -> list[Finding]:
    """Findings for LoRA halves without the other half, alphas without matrices and parameters given twice."""
    findings = []
    fix = "The file was cut or merged wrongly. --skip PATTERN leaves tensors out."
    for group in groups.values():
        present = next(iter(group.tensors.values()))
        lacking = [part for part in ("down", "up") if part not in group.tensors]
        if "lora" in group.algorithms and lacking and not (group.algorithms & {"full"} and len(lacking) == 2):
            message = f"The module has no {_PARTS[lacking[0]]} matrix beside it."
            findings.append(Finding("missing-partner", "error", present, message, fix))
        elif not group.algorithms or group.algorithms == {"dora"}:
            message = "There are no matrices that it could belong to."
            findings.append(Finding("missing-partner", "error", present, message, fix))
        for first, second in group.doubles:
            message = f"{shown(first)} gives the same parameter of the same module."
            findings.append(Finding("duplicate-module", "error", second, message, "Leave one out with --skip."))
    return _capped(findings, "tensors lack their partner")


_PARTS = {"down": "down (A)", "up": "up (B)"}


def _duplicate_findings(match: _Match, groups: Mapping[str, _Group]) -> list[Finding]:
    """Findings for modules that are given under two names."""
    seen: dict[str, str] = {}
    findings = []
    for name, place in {**match.fitted, **match.misfits}.items():
        for module in place.modules:
            other = seen.setdefault(module.name, name)
            if other != name:
                first, second = (next(iter(groups[part].tensors.values())) for part in (other, name))
                message = f"{module.name} is changed by it and by {shown(first)}: two names of one module."
                fix = "Readers would take one of them or both; leave one out with --skip."
                findings.append(Finding("duplicate-module", "error", second, message, fix))
    return _capped(findings, "modules are given twice")


def _variant_findings(match: _Match) -> list[Finding]:
    return [
        Finding(
            "base-variant",
            "warning",
            name,
            f"conv_in takes {match.fitted[name].modules[0].shape[1]} channels, as {variant} models do.",
            f"It loads only on such a variant of {match.family.title}.",
        )
        for name, variant in match.variants.items()
    ]


def _dtype_findings(header: Header, names: Iterable[str]) -> list[Finding]:
    return [
        Finding("unsupported-kind", "error", name, f"Its dtype {header.tensors[name].dtype} is not one for weights.")
        for name in names
        if header.tensors[name].dtype not in WEIGHTS
    ]


def _read_alphas(source: Source, groups: Mapping[str, _Group]) -> tuple[dict[str, float], list[Finding]]:
    """The scalars (alpha, scalar) by tensor name."""
    values: dict[str, float] = {}
    findings = []
    for group in groups.values():
        for part in ("alpha", "scalar"):
            tensor = group.tensors.get(part)
            if tensor is None:
                continue
            info = source.header.tensors[tensor]
            if prod(info.shape) != 1:
                message = f"One number is expected, its shape is {list(info.shape)}."
                findings.append(Finding("shape-misfit", "error", tensor, message))
                continue
            try:
                values[tensor] = source.read_scalar(tensor)
            except KeyError:
                message = f"One number is expected, its dtype is {info.dtype}."
                findings.append(Finding("shape-misfit", "error", tensor, message))
    return values, findings


def _configs(source: Source, spellings: set[str], config: Path | None) -> Mapping[str, AdapterConfig]:
    """Configurations by component: from `--config`, from beside a peft file, from the header."""
    if config is not None:
        given = parse_config(config)
    elif "peft" in spellings and (beside := _beside(source)) is not None:
        given = parse_config(beside)
    else:
        return from_metadata(source.header.metadata)
    return dict.fromkeys(("unet", "text_encoder", "text_encoder_2"), given)


def _beside(source: Source) -> Path | None:
    """The peft configuration that lies beside the file, here or on the hub."""
    path = source.header.path
    if path.startswith("hf://"):
        from lora_convert.containers.hub import download_beside

        return download_beside(path, "adapter_config.json")
    return None if path.startswith("<") else find_config(Path(path))


def _adapted(
    group: _Group, place: Place, header: Header, values: Mapping[str, float] | None, config: AdapterConfig | None
) -> AdaptedModule:
    algorithm = group.algorithm(header)
    rank = shapes.rank_of(algorithm.partition("+")[0], _shapes(group, header))
    alpha = None
    scale: float | None = 1.0
    if "alpha" in group.tensors:
        alpha = values.get(group.tensors["alpha"]) if values is not None else None
        scale = None if alpha is None else alpha / rank if rank else 1.0
    elif config is not None:
        alpha = config.alpha_of(place.modules[0])
        scale = config.scale_of(alpha, rank) if rank else 1.0
    if "scalar" in group.tensors and scale is not None:
        scalar = values.get(group.tensors["scalar"]) if values is not None else None
        scale = None if scalar is None else scale * scalar
    return AdaptedModule(place.modules, algorithm, dict(group.tensors), place.spelling, rank, alpha, scale)


def _alpha_findings(payload: Sequence[AdaptedModule], metadata: Mapping[str, str]) -> list[Finding]:
    findings = []
    for module in payload:
        tensor = module.tensors.get("alpha", "")
        if not module.algorithm.startswith("lora") or module.alpha is None:
            continue
        if not isfinite(module.alpha):
            message = f"alpha is {module.alpha:g}, so the strength of {module.modules[0].name} is unknown."
            fix = "Leave it out with --skip (the scale is then 1), or ask the author for a sound file."
            findings.append(Finding("not-finite", "error", tensor or module.modules[0].name, message, fix))
        elif module.alpha <= 0:
            effect = "switches the module off" if module.alpha == 0 else "turns the module's effect around"
            message = f"alpha is {module.alpha:g}, which {effect}; kept as it is."
            findings.append(Finding("odd-alpha", "warning", tensor or module.modules[0].name, message))
    findings = _capped(findings, "alphas are unusual")
    if '"algo": "dylora"' in metadata.get("ss_network_args", "") and "lycoris" in metadata.get("ss_network_module", ""):
        message = (
            "LyCORIS' DyLoRA trains with alpha/block_count, but every reader applies alpha/rank; "
            "the readers' scale is what users saw and is kept."
        )
        findings.append(Finding("alpha-convention", "note", "", message))
    return findings


def _unknown_alpha(payload: Sequence[AdaptedModule], configs: Mapping[str, AdapterConfig]) -> list[Finding]:
    spellings = {module.spelling for module in payload}
    if configs or any("alpha" in module.tensors for module in payload):
        return []
    if "peft" in spellings:
        message = "peft keeps alpha and rs-LoRA in adapter_config.json, which is not here: alpha = rank is assumed."
        fix = "Put adapter_config.json beside the file or name it with --config."
        return [Finding("alpha-unknown", "warning", "", message, fix)]
    modern = any(tensor.endswith("lora_A.weight") for module in payload for tensor in module.tensors.values())
    if "diffusers" in spellings and modern:
        message = "The file states no alpha; as every reader does, alpha = rank is assumed."
        return [Finding("alpha-unknown", "note", "", message)]
    return []


def _spelling_evidence(payload: Sequence[AdaptedModule]) -> tuple[str, ...]:
    counts = Counter(module.spelling for module in payload)
    return tuple(f"{number} modules are spelt as {spelling}" for spelling, number in counts.most_common())


def _no_adapter(source: Source, groups: Mapping[str, _Group], base: Detection) -> Detection:
    """A file without a LoRA-like tensor: another kind, or unknown."""
    other = other_kind(source.header)
    if other is not None and other.kind == "embedding" and any(0 in t.shape for t in source.header.tensors.values()):
        empty = Finding("empty-file", "error", "", "The embedding has no vectors.")
        return replace(base, kind="embedding", findings=(*base.findings, empty))
    if other is not None:
        message = f"This is {other.title}, not a LoRA."
        said = Finding("unsupported-kind", "warning", "", message, "inspect describes it; convert takes LoRA files.")
        return replace(base, kind=other.kind, findings=(*base.findings, said))
    names = tuple(source.header.tensors)
    message = (
        f"None of the {len(names)} tensors has a name that a known trainer writes, for example {listed(names, 3)}."
    )
    unknown = Finding("unknown-format", "warning", "", message)
    return replace(base, kind="unknown", unexplained=names, findings=(*base.findings, unknown))


def _no_family(source: Source, groups: Mapping[str, _Group], choice: _Choice, base: Detection) -> Detection:
    """LoRA-like tensors that no family explains, or that several explain."""
    if choice.findings:
        return replace(base, rivals=choice.rivals, findings=(*base.findings, *choice.findings))
    other = other_kind(source.header)
    if other is not None:
        return _no_adapter(source, groups, base)
    known = next(
        (title for pattern, title in OTHER_BASES.items() if any(re.match(pattern, name) for name in groups)), None
    )
    example = shown(next(iter(groups)))
    message = f"It is an adapter, but its modules ({example}, …) are of no base model that this version knows."
    if known:
        message = f"It is an adapter for {known}, for which this version has no table ({example}, …)."
    families = ", ".join(FAMILIES)
    said = Finding("unknown-format", "warning", "", message, f"Known families: {families}.")
    return replace(
        base, rivals=choice.rivals, unexplained=tuple(source.header.tensors), findings=(*base.findings, said)
    )


def detect(
    source: Source, *, family: str | None = None, config: Path | None = None, read_alphas: bool = True
) -> Detection:
    """Say what a weight file is, from its header and, unless `read_alphas` is False, the bytes of its scalars.

    `family` decides a tie, `config` is a peft `adapter_config.json`. Bad content becomes findings of the result; raises
    UsageError for a family that does not exist.
    """
    if family is not None and family not in FAMILIES:
        raise UsageError(f"there is no family {shown(family)!r}; known are {', '.join(FAMILIES)}")
    header = source.header
    dtypes = dict(Counter(tensor.dtype for tensor in header.tensors.values()).most_common())
    base = Detection(
        header.path,
        "lora",
        findings=header.findings,
        tensors=len(header.tensors),
        bytes=source.reader.size,
        dtypes=dtypes,
        metadata=header.metadata,
        trigger_words=trigger_words(header.metadata),
        training=training_facts(header.metadata),
    )
    groups, strays = _group(header)
    if not any(group.algorithms for group in groups.values()):
        return _no_adapter(source, groups, base) if header.tensors else replace(base, kind="unknown")
    choice = _choose(groups, header, family)
    if choice.match is None:
        return _no_family(source, groups, choice, base)
    return _explained(source, groups, strays, choice, base, config, read_alphas)


def _explained(
    source: Source,
    groups: Mapping[str, _Group],
    strays: Sequence[str],
    choice: _Choice,
    base: Detection,
    config: Path | None,
    read_alphas: bool,
) -> Detection:
    """The detection of a file whose family is known: payload, trainer, and everything that is wrong with it."""
    match, header = choice.match, source.header
    assert match is not None
    findings = list(base.findings)
    values, said = _read_alphas(source, groups) if read_alphas else (None, [])
    findings += said
    try:
        spellings = {place.spelling for place in match.fitted.values()} if read_alphas else set()
        configs = _configs(source, spellings, config)
    except FileError as error:
        findings += error.findings
        configs = {}
    payload = tuple(
        _adapted(groups[name], place, header, values, configs.get(place.modules[0].component))
        for name, place in match.fitted.items()
        if groups[name].algorithms
    )
    unexplained = [tensor for name in match.unnamed for tensor in groups[name].tensors.values()] + list(strays)
    findings += _unexplained(unexplained, match.family)
    findings += _partner_findings(groups) + _misfit_findings(groups, match, header)
    findings += _duplicate_findings(match, groups) + _variant_findings(match)
    used = [t for m in payload for part, t in m.tensors.items() if part not in ("alpha", "scalar", "on_input")]
    findings += _dtype_findings(header, used) + _alpha_findings(payload, header.metadata)
    findings += _unknown_alpha(payload, configs) if read_alphas else []
    trainer = trainer_of(payload, header.metadata)
    evidence = [*choice.evidence, *_spelling_evidence(payload)]
    hints = family_hints(header.metadata)
    if match.family.name in hints:
        evidence.append(hints[match.family.name])
    return replace(
        base,
        family=match.family.name,
        trainer=trainer[0] if trainer else None,
        payload=payload,
        evidence=tuple(dict.fromkeys([*evidence, *([trainer[1]] if trainer else [])])),
        rivals=choice.rivals,
        unexplained=tuple(unexplained),
        findings=tuple(findings),
    )
