"""Header -> Detection: what a file is, of which family, by whom, and everything that is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from lora_convert.containers import Header, Source
from lora_convert.errors import FileError, UsageError
from lora_convert.families import FAMILIES
from lora_convert.families.encoders import EMBEDDING_FAMILIES
from lora_convert.inspect import diagnose, embedding_family, embedding_forms, embeddings, shapes
from lora_convert.inspect.config import COMPONENTS, AdapterConfig, find_config, from_metadata, parse_config
from lora_convert.inspect.detection import AdaptedModule, Detection
from lora_convert.inspect.facts import training_facts, trigger_words
from lora_convert.inspect.kinds import names_other_base, other_kind
from lora_convert.inspect.match import Choice, Group, choose, group_tensors, shapes_of
from lora_convert.inspect.names import Place
from lora_convert.inspect.trainers import family_hints, trainer_of
from lora_convert.report import Finding, listed, shown

__all__ = ["detect"]


def _read_alphas(source: Source, groups: Mapping[str, Group]) -> tuple[dict[str, float], list[Finding]]:
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


def _configs(source: Source, spellings: set[str], config: str | Path | None) -> Mapping[str, AdapterConfig]:
    """Configurations by component: from `--config`, from beside a peft file, from the header."""
    if config is not None:
        given = parse_config(config)
    elif "peft" in spellings and (beside := _beside(source)) is not None:
        given = parse_config(beside)
    else:
        return from_metadata(source.header.metadata)
    return dict.fromkeys(COMPONENTS, given)


def _beside(source: Source) -> Path | None:
    """The peft configuration that lies beside the file, here or on the hub."""
    path = source.header.path
    if path.startswith("hf://"):
        from lora_convert.containers.hub import download_beside

        return download_beside(path, "adapter_config.json")
    return None if path.startswith("<") else find_config(Path(path))


def _adapted(
    group: Group, place: Place, header: Header, values: Mapping[str, float] | None, config: AdapterConfig | None
) -> AdaptedModule:
    algorithm = group.algorithm(header)
    sizes = shapes_of(group, header)
    ranks = (shapes.rank_of(part, sizes) for part in algorithm.split("+"))
    rank = next((rank for rank in ranks if rank is not None), None)
    alpha = None
    scale: float | None = 1.0
    if "alpha" in group.tensors:
        alpha = values.get(group.tensors["alpha"]) if values is not None else None
        scale = None if alpha is None else alpha / rank if rank else 1.0
    elif config is not None and (rank is not None or "lokr" in algorithm):
        alpha = config.alpha_of(place.modules[0])
        applied = config.rank_of(place.modules[0]) if rank is None else rank
        scale = config.scale_of(alpha, applied) if applied else 1.0
    if "scalar" in group.tensors and scale is not None:
        scalar = values.get(group.tensors["scalar"]) if values is not None else None
        scale = None if scalar is None else scale * scalar
    return AdaptedModule(place.modules, algorithm, dict(group.tensors), place.spelling, rank, alpha, scale)


def _spelling_evidence(payload: Sequence[AdaptedModule]) -> tuple[str, ...]:
    counts = Counter(module.spelling for module in payload)
    return tuple(f"{number} modules are spelt as {spelling}" for spelling, number in counts.most_common())


def _no_adapter(source: Source, base: Detection, family: str | None, read_values: bool) -> Detection:
    """A file without a LoRA-like tensor: another kind, or unknown."""
    other = other_kind(source.header)
    if other is not None:
        message = f"This is {other.title}, not a LoRA."
        fix = "inspect describes it; convert takes LoRA files and embeddings."
        said = Finding("unsupported-kind", "warning", "", message, fix)
        return replace(base, kind=other.kind, findings=(*base.findings, said))
    if embedding_forms.looks_like_embedding(source.header):
        return embeddings.describe(source, base, family, read_values=read_values)
    names = tuple(source.header.tensors)
    message = (
        f"None of the {len(names)} tensors has a name that a known trainer writes, for example {listed(names, 3)}."
    )
    unknown = Finding("unknown-format", "warning", "", message)
    return replace(base, kind="unknown", unexplained=names, findings=(*base.findings, unknown))


def _no_family(source: Source, groups: Mapping[str, Group], choice: Choice, base: Detection) -> Detection:
    """LoRA-like tensors that no family explains, or that several explain."""
    if choice.findings:
        return replace(base, rivals=choice.rivals, findings=(*base.findings, *choice.findings))
    if other_kind(source.header) is not None:
        return _no_adapter(source, base, None, False)
    known = next(filter(None, map(names_other_base, groups)), None)
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
    source: Source, *, family: str | None = None, config: str | Path | None = None, read_alphas: bool = True
) -> Detection:
    """Say what a weight file is, from its header and, unless `read_alphas` is False, the bytes of its scalars.

    `family` decides a tie, `config` is a peft `adapter_config.json`. Bad content becomes findings of the result; raises
    UsageError for a family that does not exist.
    """
    if family is not None and family not in EMBEDDING_FAMILIES:
        raise UsageError(f"there is no family {shown(family)!r}; known are {', '.join(EMBEDDING_FAMILIES)}")
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
        training=training_facts({**header.extras, **header.metadata}),
    )
    if embedding_forms.is_own(header):
        return embeddings.describe(source, base, family, read_values=read_alphas)
    vectors, numbers = embedding_forms.bundled(header)
    beside = {*numbers, *(one.vectors.tensor for one in vectors)}
    groups, strays = group_tensors(name for name in header.tensors if name not in beside)
    if not any(group.algorithms for group in groups.values()):
        return _no_adapter(source, base, family, read_alphas) if header.tensors else replace(base, kind="unknown")
    if family is not None and family not in FAMILIES:
        raise UsageError(f"the modules of {family} are in no table yet, so that no LoRA for it can be read")
    told = embedding_family.family_of(vectors, header) if vectors else None
    choice = choose(groups, header, family, (told, f"the embedding with them is for {told}") if told else None)
    if choice.match is None:
        found = _no_family(source, groups, choice, base)
    else:
        found = _explained(source, groups, strays, choice, base, config, read_alphas)
    if vectors:
        carried, said = embeddings.carried(source, vectors, found.family, read_values=read_alphas)
        unexplained = tuple(name for name in found.unexplained if name not in beside)
        found = replace(found, embeddings=carried, unexplained=unexplained, findings=(*found.findings, *said))
    return found


def _explained(
    source: Source,
    groups: Mapping[str, Group],
    strays: Sequence[str],
    choice: Choice,
    base: Detection,
    config: str | Path | None,
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
        configs: Mapping[str, AdapterConfig] | None = _configs(source, spellings, config)
    except FileError as error:
        findings += error.findings
        configs = None
    payload = tuple(
        _adapted(groups[name], place, header, values, (configs or {}).get(place.modules[0].component))
        for name, place in match.fitted.items()
        if groups[name].algorithms
    )
    unexplained = [tensor for name in match.unnamed for tensor in groups[name].tensors.values()] + list(strays)
    findings += diagnose.unexplained_findings(unexplained, match.family)
    findings += diagnose.partner_findings(groups) + diagnose.misfit_findings(groups, match, header)
    findings += diagnose.duplicate_findings(match, groups) + diagnose.variant_findings(match)
    used = [tensor for module in payload for tensor in module.values.values()]
    findings += diagnose.dtype_findings(header, used) + diagnose.alpha_findings(payload, header.metadata)
    if read_alphas and configs is not None:
        findings += diagnose.config_findings(payload, configs)
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
