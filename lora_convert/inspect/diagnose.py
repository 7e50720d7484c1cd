"""What is wrong or odd with a file whose family is known, as findings that name the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

from lora_convert.containers import Header
from lora_convert.containers.dtypes import WEIGHTS
from lora_convert.families import Family
from lora_convert.inspect import shapes
from lora_convert.inspect.config import AdapterConfig
from lora_convert.inspect.detection import AdaptedModule, example_of
from lora_convert.inspect.match import Group, Match, shapes_of
from lora_convert.inspect.spelling import SUFFIXES
from lora_convert.report import MOST_FINDINGS, Finding, shown

__all__ = [
    "alpha_findings",
    "config_findings",
    "dtype_findings",
    "duplicate_findings",
    "misfit_findings",
    "partner_findings",
    "unexplained_findings",
    "variant_findings",
]


_CUT = "The file was cut or merged wrongly. --skip PATTERN leaves tensors out."
_SCALED = frozenset({"lora", "loha", "lokr", "glora", "tlora"})
"""Algorithms whose products have a scale."""

_PARTS = {"down": "down (A)", "up": "up (B)"}


def capped(findings: list[Finding], what: str) -> list[Finding]:
    """At most `MOST_FINDINGS`, the last one counting the others."""
    more = len(findings) - MOST_FINDINGS
    if more <= 0:
        return findings
    last = findings[-1]
    return [*findings[:MOST_FINDINGS], Finding(last.name, last.severity, "", f"{more} more {what}.", last.fix)]


_COMPANIONS: Mapping[str, tuple[str, str]] = {
    r"bundle_emb\.": ("It is in a bundled embedding's place, but holds no vectors.", "--skip 'bundle_emb.*'"),
    r".*position_ids$": ("It is a counter of positions, not a trained weight.", "--skip '*position_ids'"),
}
"""Tensors of other kinds that real files carry beside a LoRA: what they are, and how to leave them out."""


def unexplained_findings(names: Sequence[str], family: Family) -> list[Finding]:
    """Findings for tensors that belong to no module or parameter of the family."""
    findings = []
    for name in names:
        message = f"No module or parameter of {family.title} has this name."
        fix = "Is it misspelt, or made for another base model? --skip PATTERN leaves tensors out."
        for pattern, (what, skip) in _COMPANIONS.items():
            if re.match(pattern, name):
                message, fix = f"{what}", f"{skip} leaves it out."
        findings.append(Finding("unexplained-tensor", "error", name, message, fix))
    return capped(findings, "tensors are unexplained")


def misfit_findings(groups: Mapping[str, Group], match: Match, header: Header) -> list[Finding]:
    """Findings for tensors whose names are known and whose shapes do not fit the module."""
    findings = []
    for name, place in match.misfits.items():
        group, sizes = groups[name], shapes_of(groups[name], header)
        module = place.modules[-1]
        fix = "The file is damaged, or was made for another base model."
        wrong = []
        if {"down", "up"} <= sizes.keys() and group.algorithm(header).startswith("lora"):
            wrong = [(group.tensors[part], said) for part, said in shapes.lora_misfits(sizes, place.rows, module)]
        elif parts := _wrong_parts(group, header):
            findings += parts
        elif not {"down", "up"} & sizes.keys():
            size = "x".join(map(str, module.shape))
            wrong = [(example_of(group.tensors), f"its shapes do not make a weight of {size}")]
        findings += [
            Finding("shape-misfit", "error", tensor, f"It does not fit {module.name}: {said}.", fix)
            for tensor, said in wrong
        ]
    return capped(findings, "tensors do not fit their modules")


def _wrong_parts(group: Group, header: Header) -> list[Finding]:
    """Findings for the parameters that a module lacks, and for those that do not go with the others."""
    sizes, findings = shapes_of(group, header), []
    for algorithm in group.algorithm(header).split("+"):
        lacking, extra = shapes.wrong_parts(algorithm, sizes)
        if lacking:
            known = [suffix for suffix in SUFFIXES if suffix.algorithm in group.algorithms]
            names = {suffix.field: suffix.text[1:] for suffix in reversed(known)}
            message = f"The module has no {' and no '.join(names[part] for part in lacking)} beside it."
            findings.append(Finding("missing-partner", "error", example_of(group.tensors), message, _CUT))
        for part in extra if not lacking else ():
            message = "It does not go with the module's other tensors, which make a module without it."
            findings.append(Finding("unexplained-tensor", "error", group.tensors[part], message, _CUT))
    return findings


def partner_findings(groups: Mapping[str, Group]) -> list[Finding]:
    """Findings for LoRA halves without the other half, alphas without matrices and parameters given twice."""
    findings = []
    for group in groups.values():
        present = example_of(group.tensors)
        lacking = [part for part in ("down", "up") if part not in group.tensors]
        if "lora" in group.algorithms and lacking and not (group.algorithms & {"full"} and len(lacking) == 2):
            message = f"The module has no {_PARTS[lacking[0]]} matrix beside it."
            findings.append(Finding("missing-partner", "error", present, message, _CUT))
        elif not group.algorithms or group.algorithms == {"dora"}:
            message = "There are no matrices that it could belong to."
            findings.append(Finding("missing-partner", "error", present, message, _CUT))
        elif "scalar" in group.tensors and not group.algorithms & _SCALED:
            message = "No trainer multiplies a change of this kind by a scalar, so what it means is not known."
            findings.append(Finding("unexplained-tensor", "error", group.tensors["scalar"], message, _CUT))
        for first, second in group.doubles:
            message = f"{shown(first)} gives the same parameter of the same module."
            findings.append(Finding("duplicate-module", "error", second, message, "Leave one out with --skip."))
    return capped(findings, "tensors lack their partner")


def duplicate_findings(match: Match, groups: Mapping[str, Group]) -> list[Finding]:
    """Findings for modules that are given under two names."""
    seen: dict[str, str] = {}
    findings = []
    for name, place in {**match.fitted, **match.misfits}.items():
        for module in place.modules:
            other = seen.setdefault(module.name, name)
            if other != name:
                first, second = (example_of(groups[part].tensors) for part in (other, name))
                message = f"{module.name} is changed by it and by {shown(first)}: two names of one module."
                fix = "Readers would take one of them or both; leave one out with --skip."
                findings.append(Finding("duplicate-module", "error", second, message, fix))
    return capped(findings, "modules are given twice")


def variant_findings(match: Match) -> list[Finding]:
    """Findings for a first convolution that only a variant of the base model has."""
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


def dtype_findings(header: Header, names: Iterable[str]) -> list[Finding]:
    """Findings for matrices stored as something else than floats."""
    return [
        Finding("unsupported-kind", "error", name, f"Its dtype {header.tensors[name].dtype} is not one for weights.")
        for name in names
        if header.tensors[name].dtype not in WEIGHTS
    ]


def _broken_scalar(module: AdaptedModule) -> str | None:
    """Which of a module's scalars makes its scale NaN or infinite, if one does."""
    if module.alpha is not None and not isfinite(module.alpha):
        return "alpha"
    return "scalar" if module.scale is not None and not isfinite(module.scale) else None


def alpha_findings(payload: Sequence[AdaptedModule], metadata: Mapping[str, str]) -> list[Finding]:
    """Findings for alphas that are no numbers, unusual, or understood differently by trainer and readers."""
    findings = []
    for module in payload:
        if module.rank is None and "oft" not in module.algorithm:
            continue  # nothing uses its alpha
        name = module.modules[0].name
        alpha, tensor = module.alpha, module.tensors.get("alpha", name)
        broken = _broken_scalar(module)
        if broken:
            message = f"{broken} is not a finite number, so the strength of {name} is unknown."
            fix = "Leave it out with --skip (it then counts as 1), or ask the author for a sound file."
            findings.append(Finding("not-finite", "error", module.tensors.get(broken, name), message, fix))
        elif alpha is not None and alpha <= 0 and module.rank is not None:
            effect = "switches the module off" if alpha == 0 else "turns the module's effect around"
            findings.append(
                Finding("odd-alpha", "warning", tensor, f"alpha is {alpha:g}, which {effect}; kept as it is.")
            )
    findings = capped(findings, "alphas are unusual")
    if '"algo": "dylora"' in metadata.get("ss_network_args", "") and "lycoris" in metadata.get("ss_network_module", ""):
        message = (
            "LyCORIS' DyLoRA trains with alpha/block_count, but every reader applies alpha/rank; "
            "the readers' scale is what users saw and is kept."
        )
        findings.append(Finding("alpha-convention", "note", "", message))
    return findings


def config_findings(payload: Sequence[AdaptedModule], configs: Mapping[str, AdapterConfig]) -> list[Finding]:
    """Findings for a scale that the file's spelling keeps elsewhere and that is not there, and for a lost DoRA."""
    findings = []
    if any(config.dora for config in configs.values()) and not any("dora" in module.algorithm for module in payload):
        message = "The configuration says DoRA (use_dora), but no module has a magnitude: plain LoRA is assumed."
        findings.append(Finding("missing-partner", "warning", "", message, "Was the file saved by a broken tool?"))
    without = [module for module in payload if module.alpha is None and "alpha" not in module.tensors]
    spellings = {module.spelling for module in without}
    modern = any(tensor.endswith("lora_A.weight") for module in without for tensor in module.tensors.values())
    fix = "Put adapter_config.json beside the file or name it with --config."
    if "peft" in spellings:
        message = "peft keeps alpha and rs-LoRA in adapter_config.json, which is not here: alpha = rank is assumed."
        findings.append(Finding("alpha-unknown", "warning", "", message, fix))
    elif "diffusers" in spellings and modern:
        message = "The file states no alpha; as every reader does, alpha = rank is assumed."
        findings.append(Finding("alpha-unknown", "note", "", message, "--config names peft's configuration, if any."))
    return findings
