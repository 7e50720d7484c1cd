"""What cannot be written as asked, and the ways out: findings by algorithm, with the number of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_convert.converters.adapters import ALGORITHMS, Form
from lora_convert.inspect.detection import AdaptedModule, example_of
from lora_convert.report import MOST_FINDINGS, Finding, counted

if TYPE_CHECKING:
    from lora_convert.converters.plan import Options

__all__ = ["LOSES_TOO_MUCH", "not_native", "refusals", "title_of"]

LOSES_TOO_MUCH = 0.3
"""The relative error of a module's ΔW above which a truncation is refused unless `--max-error` allows it."""

_MERGE = "lora-convert merge bakes it into the model's weights, exactly"


def title_of(algorithm: str) -> str:
    """An algorithm's name as people write it: `LoHa with DoRA`."""
    titles = {
        "dora": "DoRA",
        **{name: row.title.partition(" (")[0].partition(",")[0] for name, row in ALGORITHMS.items()},
    }
    first, *others = (titles.get(part, part) for part in algorithm.split("+"))
    return f"{first} with {' and '.join(others)}" if others else first


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A row: modules of which `when` is true are refused by a finding of this name, with this reason and way out."""

    name: str
    when: Callable[[AdaptedModule, Form, Options], bool]
    reason: str
    fix: str


def _on_norm(module: AdaptedModule, form: Form, options: Options) -> bool:
    return len(module.modules[0].shape) == 1


def _on_embedding(module: AdaptedModule, form: Form, options: Options) -> bool:
    return module.modules[0].mark == "embedding"


def _is_biased_dora(module: AdaptedModule, form: Form, options: Options) -> bool:
    return options.to == "diffusers" and form.magnitude and form.bias


def _lacks_base(module: AdaptedModule, form: Form, options: Options) -> bool:
    return form.needs_base and options.base is None


def _lacks_rank(module: AdaptedModule, form: Form, options: Options) -> bool:
    return form.weight and form.rank is None and not options.truncates


_REFUSALS = (
    _Refusal(
        "unsupported-kind",
        _on_norm,
        "changes a norm, for which no Diffusers loader has a place",
        f"{_MERGE}; --skip PATTERN leaves its tensors out.",
    ),
    _Refusal(
        "unsupported-kind",
        _on_embedding,
        "changes an embedding table; no Diffusers loader takes a LoRA there",
        f"{_MERGE}; --skip PATTERN leaves its tensors out.",
    ),
    _Refusal(
        "unsupported-kind",
        _is_biased_dora,
        "changes a bias beside a magnitude per output, and peft loads no DoRA with biases",
        f"{_MERGE}; --to kohya writes it for readers that take both; --skip PATTERN leaves the biases out.",
    ),
    _Refusal(
        "base-needed",
        _lacks_base,
        "changes a weight by what the base model's weight is",
        "lora-convert convert --base MODEL (with --rank N or --max-error E where the change has no low rank) makes a "
        f"LoRA of it; {_MERGE}.",
    ),
    _Refusal(
        "rank-needed",
        _lacks_rank,
        "has a weight change of full rank, so that no LoRA is exactly the same",
        f"--rank N or --max-error E writes the closest LoRA and says how close; {_MERGE}; --to peft keeps what peft "
        "has a form for.",
    ),
)
"""Of several that apply to a module the first is said."""


def refusals(payload: Sequence[tuple[AdaptedModule, Form]], options: Options) -> list[Finding]:
    """A finding of severity error for every algorithm and reason for which modules cannot be written."""
    found: dict[tuple[_Refusal, str], list[AdaptedModule]] = {}
    for module, form in payload:
        row = next((row for row in _REFUSALS if row.when(module, form, options)), None)
        if row is not None:
            found.setdefault((row, module.algorithm), []).append(module)
    return [_finding(row, algorithm, modules, len(payload)) for (row, algorithm), modules in found.items()]


def _finding(row: _Refusal, algorithm: str, modules: Sequence[AdaptedModule], total: int) -> Finding:
    first = modules[0]
    message = f"{len(modules)} of {counted(total, 'module')} ({title_of(algorithm)}): each {row.reason}, for example "
    return Finding(row.name, "error", example_of(first.tensors), f"{message}{first.modules[0].name}.", row.fix)


def not_native(reasons: Mapping[str, str]) -> list[Finding]:
    """Findings for modules that peft has no form for: name -> why."""
    findings = [
        Finding("unsupported-kind", "error", name, why, f"{_MERGE}.")
        for name, why in list(reasons.items())[:MOST_FINDINGS]
    ]
    if len(reasons) > MOST_FINDINGS:
        message = f"{len(reasons) - MOST_FINDINGS} more modules have no form in peft."
        findings.append(Finding("unsupported-kind", "error", "", message, f"{_MERGE}."))
    return findings
