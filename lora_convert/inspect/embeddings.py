"""Embedding files, and the embeddings that LoRA files carry: tokens, vectors, and what is wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePath

from lora_convert.containers import Header, Source
from lora_convert.families.encoders import usual_norm
from lora_convert.inspect.detection import Detection, Embedding, Vectors
from lora_convert.inspect.diagnose import capped
from lora_convert.inspect.embedding_family import Choice, choose
from lora_convert.inspect.embedding_forms import LAYERS, NAMELESS, NamedVectors, is_own, named, names_inside, widths
from lora_convert.inspect.trainers import trainer_of
from lora_convert.report import Finding, counted, listed, shown

__all__ = ["carried", "describe"]

_ABSURD = 100.0
"""Times the usual norm, or its inverse: what no training ends at, though norms ten times the usual one are common."""

_GENERIC = re.compile(r"learned_embeds.*|embeddings?|pytorch_model|model|data", re.IGNORECASE)
"""File names that are of a kind of file, not of this one; then its folder has the name."""


def describe(source: Source, base: Detection, family: str | None, *, read_values: bool = True) -> Detection:
    """The detection of an embedding file: its tokens and vectors, the base model if it can be known, what is wrong."""
    header = source.header
    if all(LAYERS.fullmatch(name) for name in header.tensors) and not is_own(header):
        message = (
            "This is an extended textual inversion (XTI), with vectors for every layer of the UNet: it has no form as "
            "an embedding of a text encoder."
        )
        layers = Finding("unsupported-kind", "warning", "", message)
        return replace(base, kind="embedding", findings=(*base.findings, layers))
    tensors = {tensor: named(header, tensor, name) for tensor, name in names_inside(header).items()}
    unexplained = tuple(name for name, one in tensors.items() if one is None)
    found = [one for one in tensors.values() if one is not None]
    findings = capped([_unexplained(name) for name in unexplained], "tensors are unexplained")
    if not all(one.vectors.count for one in found) or not found:
        findings.append(Finding("empty-file", "error", "", "The embedding has no vectors."))
        return replace(base, kind="embedding", findings=(*base.findings, *findings))
    choice = choose(found, header, family)
    embeddings, said = _collected(found, choice, header)
    findings += [*choice.findings, *said]
    if read_values:
        embeddings, said = _with_norms(embeddings, source)
        findings += said
    trainer, evidence = _trainer(found, header)
    return replace(
        base,
        kind="embedding",
        family=choice.family,
        trainer=trainer,
        embeddings=embeddings,
        trigger_words=tuple(embedding.token for embedding in embeddings),
        evidence=(*_evidence(found), *choice.evidence, *evidence),
        rivals=choice.rivals,
        unexplained=unexplained,
        findings=(*base.findings, *findings),
    )


def carried(
    source: Source, found: Sequence[NamedVectors], family: str | None, *, read_values: bool = True
) -> tuple[tuple[Embedding, ...], list[Finding]]:
    """The embeddings that a LoRA file for a base model carries, and what is wrong with them."""
    choice = choose(found, source.header, family)
    embeddings, findings = _collected(found, choice, source.header)
    findings = [*choice.findings, *findings]
    if read_values:
        embeddings, said = _with_norms(embeddings, source)
        findings += said
    return embeddings, findings


def _unexplained(name: str) -> Finding:
    message = "It is not a tensor of vectors (rows as wide as a text encoder's, in floating point)."
    return Finding("unexplained-tensor", "error", name, message, "--skip PATTERN leaves tensors out.")


def _collected(
    found: Sequence[NamedVectors], choice: Choice, header: Header
) -> tuple[tuple[Embedding, ...], list[Finding]]:
    """Tensors put together by token."""
    groups: dict[tuple[str | None, str | None], list[NamedVectors]] = {}
    for one in found:
        groups.setdefault((one.bundle, one.token or one.placeholder), []).append(one)
    embeddings, findings = [], []
    several = len({placeholder for _, placeholder in groups}) > 1
    for members in groups.values():
        token, stated = _token(members[0], header, several)
        parts: tuple[dict[str, Vectors], dict[str, Vectors]] = ({}, {})
        for one in members:
            key = choice.encoders.get(one.vectors.tensor, one.encoder or f"width {one.vectors.width}")
            if key in parts[one.out]:
                message = f"{shown(parts[one.out][key].tensor)} gives vectors of the same encoder for the same token."
                findings.append(Finding("duplicate-module", "error", one.vectors.tensor, message))
            parts[one.out][key] = one.vectors
        embeddings.append(Embedding(token, *parts, stated=stated))
    findings += [said for embedding in embeddings for said in _said_of(embedding)]
    return tuple(embeddings), findings


def _token(one: NamedVectors, header: Header, several: bool) -> tuple[str, bool]:
    """What the file calls the embedding, and whether it says so itself."""
    if one.bundle is not None:
        return one.bundle, True
    if one.token is not None and one.token not in NAMELESS:
        return one.token, True
    if several and one.placeholder is not None:
        # trained side by side under these; symbols are words of the vocabulary already
        return (one.placeholder if re.search(r"\w{2}", one.placeholder) else f"<{one.placeholder}>"), True
    for text in (header.metadata.get("lora_convert.token"), header.extras.get("name"), _json_text(header, "name")):
        if text and text.strip():
            return text.strip(), True
    phrase = header.metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase and not re.search(r"[\s,]", phrase):
        return phrase, True
    path = PurePath(header.path)
    stem = "" if header.path.startswith("<") else path.stem
    return (path.parent.name if _GENERIC.fullmatch(stem) and path.parent.name else stem), False


def _json_text(header: Header, key: str) -> str | None:
    """A metadata entry that ai-toolkit writes as JSON."""
    try:
        value = json.loads(header.metadata.get(key, ""))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def _said_of(embedding: Embedding) -> Iterator[Finding]:
    subject = next(iter(embedding.tensors))
    counts = {part.count for part in embedding.vectors.values()}
    if len(counts) > 1:
        sizes = ", ".join(f"{key} {part.count}" for key, part in embedding.vectors.items())
        message = f"Its text encoders have different numbers of vectors ({sizes}), so that no prompt fits both."
        yield Finding("shape-misfit", "error", subject, message)
    if embedding.outputs:
        number = sum(part.count for part in embedding.outputs.values())
        message = (
            f"{counted(number, 'vector')} of OneTrainer ({listed([p.tensor for p in embedding.outputs.values()])}) "
            "belong behind the text encoder, where no other program puts any."
        )
        if not embedding.vectors:
            yield Finding("unsupported-kind", "error", subject, message, "There are no vectors for its input.")
        else:
            fix = "They are left out; the vectors for its input are kept."
            yield Finding("output-vectors", "warning", next(iter(embedding.outputs.values())).tensor, message, fix)


def _with_norms(embeddings: Sequence[Embedding], source: Source) -> tuple[tuple[Embedding, ...], list[Finding]]:
    """The embeddings with the norms of their vectors, and what is wrong with their values."""
    measured: list[Embedding] = []
    findings: list[Finding] = []
    for embedding in embeddings:
        # a width that is not known may be any, and there is nothing to compare with
        parts = {
            key: _measured(part, source) if part.width in widths() else part for key, part in embedding.vectors.items()
        }
        measured.append(replace(embedding, vectors=parts))
        for key, part in parts.items():
            findings += _norm_findings(part, usual_norm(key, part.width))
    return tuple(measured), findings


def _measured(part: Vectors, source: Source) -> Vectors:
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        values = source.read(part.tensor).astype(np.float64).reshape(part.count, part.width)
        return replace(part, norms=tuple(float(norm) for norm in np.linalg.norm(values, axis=1)))


def _norm_findings(part: Vectors, usual: float | None) -> Iterator[Finding]:
    norms = part.norms
    if norms is None:
        return
    broken = sum(norm != norm or norm == float("inf") for norm in norms)
    if broken:
        message = f"{broken} of {counted(part.count, 'vector')} have NaN or infinity in them."
        yield Finding("not-finite", "warning", part.tensor, message, "Ask the author for a sound file.")
    elif not any(norms):
        yield Finding("no-effect", "warning", part.tensor, "All its numbers are zero.")
    elif usual is not None:
        odd = [norm for norm in norms if not usual / _ABSURD <= norm <= usual * _ABSURD]
        if odd:
            message = (
                f"{len(odd)} of {counted(part.count, 'vector')} have norms like {max(odd):.3g}; those of words are "
                f"about {usual:.2g}. Such an embedding draws noise, or nothing."
            )
            yield Finding("odd-norms", "warning", part.tensor, message)


def _evidence(found: Sequence[NamedVectors]) -> Iterator[str]:
    rows: dict[tuple[str, str | None, int], int] = {}
    for one in found:
        row = (one.form.title, one.encoder, one.vectors.width)
        rows[row] = rows.get(row, 0) + one.vectors.count
    for (title, encoder, width), count in rows.items():
        yield f"{counted(count, 'vector')} of {width} numbers{f' for {encoder}' if encoder else ''}, {title}"


def _trainer(found: Sequence[NamedVectors], header: Header) -> tuple[str | None, tuple[str, ...]]:
    """Who trained it, and how the file tells."""
    told = trainer_of((), header.metadata)
    if told:
        return told[0], (told[1],)
    own = next((one.form for one in found if one.form.trainer), None)
    if own is not None:
        return own.trainer, (f"only {own.trainer} names its tensors so",)
    if any(one.out for one in found):
        return "onetrainer", ("only onetrainer has vectors behind the text encoder",)
    if any(one.placeholder for one in found) and any(name.startswith("string_to_token.") for name in _names(header)):
        if "name" in header.extras:
            return "a1111", ("it has AUTOMATIC1111's fields name and string_to_token",)
        return "ldm", ("it has the two tables of LDM's textual inversion, and no name",)
    return None, ()


def _names(header: Header) -> Iterator[str]:
    yield from header.tensors
    yield from header.extras
