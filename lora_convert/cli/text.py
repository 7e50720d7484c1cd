"""Results as text for people. Whatever came from a file goes through `printable`; nothing is markup."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lora_convert.families.encoders import title_of, usual_norm
from lora_convert.inspect.detection import Detection, Embedding
from lora_convert.report import Finding, counted, printable, shown

if TYPE_CHECKING:
    from lora_convert.converters.adapters import Kind
    from lora_convert.converters.convert import ConvertResult, ValidateResult
    from lora_convert.converters.plan import EmbeddingStep, Plan, Step

__all__ = [
    "conversion_lines",
    "detection_lines",
    "finding_lines",
    "kind_lines",
    "kinds_table",
    "plan_lines",
    "size",
    "validation_lines",
]

_COLOURS = {"note": "blue", "warning": "yellow", "error": "red"}
_LABEL = 15
_WIDTH = 110
_MOST_VALUES = 6


def size(number: int) -> str:
    """Bytes in decimal units, as disks and download pages count them."""
    amount = float(number)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{number} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")


def _row(label: str, value: str) -> str:
    return f"  {label:{_LABEL}}{value}"


def finding_lines(findings: Sequence[Finding], indent: str = "  ") -> Iterator[str]:
    """One line per finding: severity, name, subject, message, what to do."""
    for finding in findings:
        head = click.style(f"{finding.severity} {finding.name}", fg=_COLOURS[finding.severity])
        subject = f" {shown(finding.subject)}:" if finding.subject else ""
        message = printable(finding.message)
        message = message if subject else message[:1].upper() + message[1:]
        fix = f" {printable(finding.fix)}" if finding.fix else ""
        yield f"{indent}{head}{subject} {message}{fix}"


def _distribution(values: Mapping[str, int]) -> str:
    """`16 (700), 32 (22)`; only the value where there is one."""
    if len(values) == 1:
        return next(iter(values))
    common = sorted(values.items(), key=lambda item: -item[1])
    named = ", ".join(f"{value} ({number})" for value, number in common[:_MOST_VALUES])
    return named + (f" and {len(values) - _MOST_VALUES} others" if len(values) > _MOST_VALUES else "")


def _what(detection: Detection) -> str:
    """One phrase: kind, family, trainer."""
    family = f"{title_of(detection.family)} ({detection.family})" if detection.family else "an undecided base model"
    trainer = f", by {detection.trainer}" if detection.trainer else ""
    if detection.kind == "embedding" and detection.embeddings:
        tokens = len(detection.embeddings)
        return f"{'an embedding' if tokens == 1 else f'{tokens} embeddings'} for {family}{trainer}"
    if detection.kind != "lora":
        return {"unknown": "not a file that this version knows"}.get(detection.kind, detection.kind)
    names = [name.split("+") for name in detection.algorithms] or [["lora"]]
    kinds = ", ".join("+".join("LoRA" if part == "lora" else part for part in parts) for parts in names)
    with_them = f" and {counted(len(detection.embeddings), 'embedding')}" if detection.embeddings else ""
    return f"{kinds}{with_them} for {family}{trainer}"


def _embedding_lines(embedding: Embedding) -> Iterator[str]:
    """A token, and the vectors of every text encoder with their norms."""
    yield _row("token", shown(embedding.token) + ("" if embedding.stated else " (the file's name)"))
    for key, part in embedding.vectors.items():
        line = f"{counted(part.count, 'vector')} of {part.width} numbers for {key}"
        if part.norms:
            extent = " to ".join(dict.fromkeys(f"{norm:.3g}" for norm in (min(part.norms), max(part.norms))))
            line += f"; norms {extent} (of words about {usual_norm(key, part.width):.2g})"
        yield _row("vectors", line)
    for key, part in embedding.outputs.items():
        yield _row("", f"{counted(part.count, 'vector')} for behind {key}, which only OneTrainer uses")


def _module_line(entry: Mapping[str, Any]) -> str:
    facts = [entry["algorithm"]]
    facts += [f"{label} {entry[label]:g}" for label in ("rank", "alpha") if isinstance(entry[label], int | float)]
    return f"  {' + '.join(entry['modules'])}  {', '.join(facts)}"


def detection_lines(detection: Detection, modules: bool = False) -> Iterator[str]:
    """What `inspect` prints of one file; with `modules` also a line for each of them."""
    yield click.style(printable(detection.file), bold=True)
    if detection.kind != "unknown" or detection.ok:
        yield f"  {_what(detection)}"
    if detection.payload:
        parts = ", ".join(f"{name} {number}" for name, number in detection.components.items())
        yield _row("modules", f"{len(detection.payload)} ({parts})")
        yield _row("rank", _distribution(detection.ranks)) if detection.ranks else _row("rank", "none")
        yield _row("alpha", _distribution(detection.alphas))
        yield _row("spelling", str(detection.spelling))
    for embedding in detection.embeddings:
        yield from _embedding_lines(embedding)
    if detection.dtypes:
        yield _row("tensors", f"{detection.tensors} as {_distribution(detection.dtypes)}, {size(detection.bytes)}")
    if detection.trigger_words and detection.kind != "embedding":
        yield _row("trigger words", ", ".join(shown(word) for word in detection.trigger_words))
    facts = "; ".join(f"{label} {shown(value)}" for label, value in (detection.training or {}).items())
    for number, line in enumerate(textwrap.wrap(facts, _WIDTH - _LABEL, break_on_hyphens=False)):
        yield _row("" if number else "training", line)
    for number, reason in enumerate(detection.evidence):
        yield _row("" if number else "because", printable(reason))
    for number, rival in enumerate(detection.rivals):
        fit = f" ({rival.modules} modules fit)" if detection.kind == "lora" else ""
        label = "not" if detection.family or detection.kind == "lora" else "may be"
        yield _row("" if number else label, f"{rival.family}{fit}: {printable(rival.reason)}")
    for name, value in (detection.hashes or {}).items():
        yield _row(name, value)
    yield from map(_module_line, detection.module_list() if modules else ())
    yield from finding_lines(detection.findings)


def _step_line(step: Step, resolved: bool) -> str:
    names = " + ".join(module.name for module in step.source.modules)
    if not step.outputs:
        return f"  {names}  left out (rank 0)"
    dtype = step.outputs[0][0].dtype
    if step.native:
        return f"  {names}  {step.native[0].peft_type} of peft, as {dtype}"
    if step.truncated:
        return f"  {names}  cut to rank {step.rank}{'' if resolved else ' or less'}, as {dtype}"
    if step.fold is None:
        return f"  {names}  {step.source.algorithm} as LoRA of rank {step.rank}, as {dtype}"
    done = "copied" if step.copies else f"times {step.fold:g}, as {dtype}"
    return f"  {names}  rank {step.rank}, {done}"


def plan_lines(plan: Plan) -> Iterator[str]:
    """What `convert --dry-run` prints of one file."""
    from lora_convert.converters.embedding_record import record_path

    yield click.style(printable(plan.file), bold=True) + f"  {_what(plan.detection)}"
    if plan.ok:
        yield from (_step_line(step, plan.resolved) for step in plan.steps)
        copied = sum(step.copies for step in plan.steps)
        bound = "" if plan.resolved else "at most "
        for output in plan.outputs:
            tensors = counted(len(output.tensors), "tensor")
            yield f"  would write {output.path}: {tensors}, {bound}{size(output.bytes)}"
        if (record := record_path(plan)) is not None:
            yield f"  would write {record}: which file goes to which text encoder"
        if plan.steps:
            yield f"  {counted(len(plan.steps), 'module')}, {copied} of them copied byte for byte"
        yield from map(_token_line, plan.embeddings)
    else:
        yield f"  {click.style(plan.status, fg='red')}: nothing would be written"
    yield from finding_lines(plan.findings)


def _token_line(step: EmbeddingStep) -> str:
    return f"  {shown(step.token)}: {counted(step.source.count, 'vector')} for {', '.join(step.outputs)}"


def _vectors_line(proof: ValidateResult) -> str:
    rung = proof.rungs["vectors"]
    if rung.status == "skipped":
        return f"not proved: {rung.reason}"
    vectors, exact, worst = (rung.figures.get(name, 0) for name in ("vectors", "exact_vectors", "worst"))
    every = "the vector is" if vectors == 1 else f"all {vectors} vectors are"
    if not worst:
        return f"proved: {every} the source's, bit for bit"
    return f"proved: {every} the source's, {exact} exactly; worst error {worst:.1e}"


def _proof_line(proof: ValidateResult) -> str:
    delta = proof.rungs["delta"].figures if "delta" in proof.rungs else {}
    modules, exact, worst = delta.get("modules", 0), delta.get("exact_modules", 0), delta.get("worst")
    if "delta" in proof.rungs and proof.rungs["delta"].status == "skipped":
        return f"not proved: {proof.rungs['delta'].reason}"
    every = "the weight change is" if modules == 1 else f"all {modules} weight changes are"
    if not worst:
        return f"proved: {every} exactly the source's"
    cut = delta.get("truncated_modules", 0)
    if cut == modules:
        return f"proved: {every} the closest of {'its' if modules == 1 else 'their'} rank"
    if cut:
        return f"proved: of {modules} weight changes {cut} are the closest of their rank, the others are the source's"
    where = delta["worst_modules"][0]["module"] if delta["worst_modules"] else ""
    exactly = f", {exact} exactly" if modules > 1 else ""
    return f"proved: {every} the source's{exactly}; worst error {worst:.1e} ({where})"


def _cut_lines(result: ConvertResult) -> Iterator[str]:
    """What truncating left of the modules that lost most."""
    lossy = sorted((item for item in result.truncations if item.error), key=lambda item: (-item.error, item.module))
    for item in lossy[:_MOST_VALUES]:
        yield _row("cut", f"{item.module}: rank {item.rank} keeps {item.kept:.1%} (error {item.error:.2e})")
    if len(lossy) > _MOST_VALUES:
        yield _row("", f"and {len(lossy) - _MOST_VALUES} more modules, which lost less (--json lists all)")


def conversion_lines(result: ConvertResult) -> Iterator[str]:
    """What `convert` prints of one file."""
    name = click.style(printable(result.file), bold=True)
    if not result.ok:
        yield f"{name}: {click.style(result.status, fg='red')}, nothing was written"
        yield from _cut_lines(result)
        yield from finding_lines(result.findings)
        return
    assert result.plan is not None
    yield f"{name} → {click.style(printable(result.outputs[0].path), bold=True)}"
    for output in result.outputs[1:]:
        yield f"{' ' * len(printable(result.file))} → {click.style(printable(output.path), bold=True)}"
    written = size(sum(output.bytes for output in result.outputs))
    modules = f"{counted(len(result.plan.steps), 'module')}, " if result.plan.steps else ""
    yield f"  {_what(result.plan.detection)}: {modules}{written}"
    yield from map(_token_line, result.plan.embeddings)
    for output in result.outputs:
        yield f"  sha256 {output.sha256}"
    proofs = []
    if result.proof and "delta" in result.proof.rungs:
        proofs.append(_proof_line(result.proof))
    if result.proof and "vectors" in result.proof.rungs:
        proofs.append(_vectors_line(result.proof))
    for proof in proofs or ["not proved (--no-validate)"]:
        yield "  " + click.style(proof, fg="green" if proofs else None)
    yield from _cut_lines(result)
    yield from finding_lines(result.findings)


def validation_lines(result: ValidateResult) -> Iterator[str]:
    """What `validate` prints of one file."""
    verdict = click.style(result.status, fg="green" if result.ok else "red")
    against = f" against {printable(result.against)}" if result.against else ""
    yield f"{click.style(printable(result.file), bold=True)}{against}: {verdict}"
    for name, rung in result.rungs.items():
        yield _row(name, f"{rung.status}{f' ({rung.reason})' if rung.reason else ''}")
        plain = {key: value for key, value in rung.figures.items() if not isinstance(value, list)}
        if plain:
            yield _row("", ", ".join(f"{key.replace('_', ' ')} {_figure(value)}" for key, value in plain.items()))
        for entry in rung.figures.get("worst_modules", []):
            yield _row("", f"{_figure(entry['error'])}  {entry['module']}")
    yield from finding_lines(result.findings)


def kind_lines(kind: Kind) -> Iterator[str]:
    """What `kinds` prints of one of them."""
    yield click.style(kind.title, bold=True)
    yield _row("as a LoRA", kind.lora)
    yield _row("--to peft", kind.peft or "no")
    yield _row("tested against", kind.tested)


def kinds_table(kinds: Sequence[Kind]) -> Iterator[str]:
    """The table of kinds in README.md."""
    yield "| kind | as a LoRA file | `--to peft` | tested against |"
    yield "|---|---|---|---|"
    for kind in kinds:
        yield f"| {kind.title} | {kind.lora} | {kind.peft or '–'} | {kind.tested} |"


def _figure(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) and value else str(0 if value == 0.0 else value)
