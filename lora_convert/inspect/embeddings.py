"""Textual-inversion embeddings: which tensors are vectors, of which token and which text encoder.

A form is a row of `FORMS`: how a writer names a tensor of vectors. Sources: the saving code of the writers, and what
AUTOMATIC1111, ComfyUI and Diffusers read. Containers hand over names of one kind: dictionaries of pickles and pictures
are joined by dots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import PurePath

from lora_convert.containers import Header, Source
from lora_convert.containers.dtypes import WEIGHTS
from lora_convert.families.encoders import EMBEDDING_FAMILIES, title_of, usual_norm
from lora_convert.inspect.detection import Detection, Embedding, Rival, Vectors
from lora_convert.inspect.trainers import family_hints, trainer_of
from lora_convert.report import MOST_FINDINGS, Finding, counted, listed, shown

__all__ = [
    "FORMS",
    "MOST_READ",
    "MOST_VECTORS",
    "Form",
    "bundled",
    "carried",
    "describe",
    "family_of",
    "is_own",
    "looks_like_embedding",
    "widths",
]

MOST_VECTORS = 1024
"""More vectors than this are no embedding but a table."""

MOST_READ = 75
"""Vectors that a prompt has room for, beside the tokens that begin and end it. What has more, and only a name that may
be anything, is another kind of table."""

_ABSURD = 100.0
"""Times the usual norm, or its inverse: what no training ends at, though norms ten times the usual one are common."""

_SD12 = ("sd15", "sd21", "tiny-sd15")
"""Base models with one text encoder."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a writer names a tensor of vectors: the pattern of the whole name, the writer if no other does it, and the
    base models that it trains for if not all.

    Groups of the pattern: `token`; `placeholder`, which stood for the token while training; `encoder`, a key of
    `TextEncoder` or of `_ENCODERS`; `out`, if the vectors belong behind the encoder.
    """

    pattern: re.Pattern[str]
    title: str
    trainer: str | None = None
    families: tuple[str, ...] | None = None


def _form(pattern: str, title: str, trainer: str | None = None, families: tuple[str, ...] | None = None) -> Form:
    return Form(re.compile(pattern, re.DOTALL), title, trainer, families)


FORMS: Sequence[Form] = (
    _form(r"string_to_param\.(?P<placeholder>.+)", "the form of LDM and AUTOMATIC1111", None, _SD12),
    _form(r"emb_params(?P<out>_out)?", "Kohya's form", "kohya", _SD12),
    _form(r"emp_params(?P<out>_out)?", "OneTrainer's form", "onetrainer", _SD12),
    _form(r"(?P<encoder>clip_l|clip_g|clip_h|t5xxl|t5|llama|gemma)(?P<out>_out)?", "named by text encoder"),
    _form(r"text_encoders_(?P<encoder>[01])", "cog-sdxl's form", "cog-sdxl", ("sdxl", "tiny-sdxl")),
)
"""Tried in this order; what none of them names is a token of Diffusers' form."""

_DIFFUSERS = _form(r"(?P<token>.+)", "Diffusers' form")
_NAMELESS = ("*", "tensor")
"""LyCORIS' name for every embedding, and the container's for a pickle that is one tensor."""

_ENCODERS = {"t5": "t5xxl", "0": "clip_l", "1": "clip_g"}
"""Other names of text encoders."""

_BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<rest>string_to_(?:param|token)\..+|[^.]+)", re.DOTALL)
_ITEM = re.compile(r"(?P<number>\d+)\.(?P<rest>.+)", re.DOTALL)
_TOKEN_NUMBER = re.compile(r"(bundle_emb\..+\.)?string_to_token\..+", re.DOTALL)
"""The number that stood for the token while training; it means nothing elsewhere."""

_LAYERS = re.compile(r"(IN|OUT)\d\d|MID")
_GENERIC = re.compile(r"learned_embeds.*|embeddings?|pytorch_model|model|data", re.IGNORECASE)
"""File names that are of a kind of file, not of this one; then its folder has the name."""


@dataclass(frozen=True, slots=True)
class _Named:
    """One tensor of vectors, and what its name tells."""

    vectors: Vectors
    form: Form
    bundle: str | None
    token: str | None
    placeholder: str | None
    encoder: str | None
    out: bool


def widths() -> tuple[int, ...]:
    """The widths of the text encoders that are known."""
    return tuple(sorted({encoder.width for encoders in EMBEDDING_FAMILIES.values() for encoder in encoders}))


def _vectors(header: Header, name: str) -> Vectors | None:
    """The tensor as vectors: one, or several in rows; leading axes of one element count for nothing."""
    tensor = header.tensors[name]
    if tensor.dtype not in WEIGHTS or not tensor.shape or prod(tensor.shape[:-2]) != 1:
        return None
    if (count := prod(tensor.shape[:-1])) > MOST_VECTORS:
        return None
    return Vectors(name, count, tensor.shape[-1], tensor.dtype)


def _named(header: Header, tensor: str, name: str, bundle: str | None = None) -> _Named | None:
    """What a tensor's name tells: as one of `FORMS`, or as a token."""
    vectors = _vectors(header, tensor)
    if vectors is None:
        return None
    for form in (_DIFFUSERS,) if _is_own(header, tensor, name) else (*FORMS, _DIFFUSERS):
        if found := form.pattern.fullmatch(name):
            said = found.groupdict()
            encoder = said.get("encoder")
            encoder = _ENCODERS.get(encoder, encoder) if encoder else None
            token, placeholder = said.get("token"), said.get("placeholder")
            return _Named(vectors, form, bundle, token, placeholder, encoder, bool(said.get("out")))
    return None


def _names_inside(header: Header) -> dict[str, str]:
    """By tensor, its name without the number of its dictionary in a list, or of its file in a folder; without the
    numbers of tokens.
    """
    found = {name: _ITEM.fullmatch(name) for name in header.tensors}
    numbers = {item["number"] for item in found.values() if item}
    # names of safetensors are not joined: there `2.5d` is a token
    listed_ones = not header.data_start and all(found.values()) and numbers == set(map(str, range(len(numbers))))
    names = {tensor: item["rest"] if item and listed_ones else tensor for tensor, item in found.items()}
    return {
        tensor: name
        for tensor, name in names.items()
        if _is_own(header, tensor, name) or not _TOKEN_NUMBER.fullmatch(name)
    }


def _is_own(header: Header, tensor: str, name: str) -> bool:
    """Whether the name is the token of a file of ours for Diffusers, whatever else it may look like."""
    prefix = tensor.removesuffix(name)
    said = header.extras if prefix else header.metadata
    alone = "," not in said.get(f"{prefix}lora_convert.encoder", "")  # else it is one of several text encoders
    return alone and said.get(f"{prefix}lora_convert.token") == name


def is_own(header: Header) -> bool:
    """Whether all tensors of a file or folder are of embeddings that `convert` wrote for Diffusers."""
    names = _names_inside(header)
    return bool(names) and all(_is_own(header, tensor, names.get(tensor, "")) for tensor in header.tensors)


def looks_like_embedding(header: Header) -> bool:
    """Whether all tensors of a file are vectors as wide as a text encoder's, or are named as embeddings are."""
    known, most = set(widths()), 64
    names = _names_inside(header)
    found = [_named(header, tensor, name) for tensor, name in names.items()]
    if not names or len(names) > most:
        return False
    if any(one is not None and one.form is not _DIFFUSERS for one in found):
        return True
    return all(
        one is not None
        and one.vectors.width in known
        and one.vectors.count <= MOST_READ
        and name.rpartition(".")[2] not in ("weight", "bias")
        for name, one in zip(names.values(), found, strict=True)
    )


def bundled(header: Header) -> tuple[list[_Named], list[str]]:
    """The vectors that a LoRA file carries beside its modules, and the names of tensors that belong to them.

    LyCORIS' and OneTrainer's bundles begin with `bundle_emb.`; cloneofsimo's files say `<embed>` of a token in the
    metadata, and others keep tokens in angle brackets.
    """
    found, numbers = [], []
    for name in header.tensors:
        one = None
        if _TOKEN_NUMBER.fullmatch(name):
            numbers.append(name)
        elif inside := _BUNDLED.fullmatch(name):
            one = _named(header, name, inside["rest"], inside["name"])
        elif header.metadata.get(name) == "<embed>" or re.fullmatch(r"<[^<>]+>", name):
            one = _named(header, name, name)
        found += [one] if one else []
    return found, numbers if found else []


def describe(source: Source, base: Detection, family: str | None, *, read_values: bool = True) -> Detection:
    """The detection of an embedding file: its tokens and vectors, the base model if it can be known, what is wrong."""
    header = source.header
    if all(_LAYERS.fullmatch(name) for name in header.tensors) and not is_own(header):
        message = (
            "This is an extended textual inversion (XTI), with vectors for every layer of the UNet: it has no form as "
            "an embedding of a text encoder."
        )
        return _refused(base, Finding("unsupported-kind", "error", "", message))
    tensors = {tensor: _named(header, tensor, name) for tensor, name in _names_inside(header).items()}
    unexplained = tuple(name for name, one in tensors.items() if one is None)
    found = [one for one in tensors.values() if one is not None]
    findings = [_unexplained(name) for name in unexplained[:MOST_FINDINGS]]
    if not all(one.vectors.count for one in found) or not found:
        findings.append(Finding("empty-file", "error", "", "The embedding has no vectors."))
        return replace(base, kind="embedding", findings=(*base.findings, *findings))
    choice = _choose(found, header, family)
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
    source: Source, found: Sequence[_Named], family: str | None, *, read_values: bool = True
) -> tuple[tuple[Embedding, ...], list[Finding]]:
    """The embeddings that a LoRA file for a base model carries, and what is wrong with them."""
    choice = _choose(found, source.header, family)
    embeddings, findings = _collected(found, choice, source.header)
    findings = [*choice.findings, *findings]
    if read_values:
        embeddings, said = _with_norms(embeddings, source)
        findings += said
    return embeddings, findings


def family_of(found: Sequence[_Named], header: Header) -> str | None:
    """The base model that vectors are for, if they alone tell."""
    return _choose(found, header, None).family


def _refused(base: Detection, finding: Finding) -> Detection:
    return replace(base, kind="embedding", findings=(*base.findings, finding))


def _unexplained(name: str) -> Finding:
    message = "It is not a tensor of vectors (rows as wide as a text encoder's, in floating point)."
    return Finding("unexplained-tensor", "error", name, message, "--skip PATTERN leaves tensors out.")


@dataclass(frozen=True, slots=True)
class _Choice:
    """The base model that the vectors are for, if it can be known, and the encoder of every tensor."""

    family: str | None
    encoders: Mapping[str, str]
    evidence: tuple[str, ...] = ()
    rivals: tuple[Rival, ...] = ()
    findings: tuple[Finding, ...] = ()


def _fit(found: Sequence[_Named], family: str) -> dict[str, str] | None:
    """The encoder of every tensor, if the family has encoders of these names and widths."""
    encoders = EMBEDDING_FAMILIES[family]
    placed: dict[str, str] = {}
    for one in found:
        keys = [e.key for e in encoders if e.width == one.vectors.width and one.encoder in (None, e.key)]
        if not keys:
            return None
        placed[one.vectors.tensor] = keys[0]
    return placed


def _candidates(found: Sequence[_Named], header: Header, family: str | None) -> tuple[Sequence[str], tuple[str, ...]]:
    """The base models to try, and why not all of them."""
    if family is not None:
        return (family,), (f"the family {family} was given or is the LoRA's",)
    hints = family_hints(header.metadata)
    hinted = [name for name in EMBEDDING_FAMILIES if name in hints and _fit(found, name) is not None]
    if hinted:
        return hinted[:1], (hints[hinted[0]],)
    limits = [one.form for one in found if one.form.families is not None]
    if limits:
        known = set(limits[0].families or ()).intersection(*(form.families or () for form in limits))
        names = [name for name in EMBEDDING_FAMILIES if name in known]
        if any(_fit(found, name) is not None for name in names):
            titles = "one text encoder" if "sd15" in names else "Stable Diffusion XL"
            return names, (f"{limits[0].title} is written for base models with {titles}",)
    return tuple(EMBEDDING_FAMILIES), ()


def _choose(found: Sequence[_Named], header: Header, family: str | None) -> _Choice:
    names, evidence = _candidates(found, header, family)
    fits = {name: placed for name in names if (placed := _fit(found, name)) is not None}
    if not fits:
        elsewhere = (placed for name in EMBEDDING_FAMILIES if (placed := _fit(found, name)) is not None)
        return _Choice(family, next(elsewhere, {}), findings=(_misfit(found, family),))
    whole = [name for name, placed in fits.items() if _is_whole(placed, name)]
    if len(fits) == 1 or (len(whole) == 1 and len(set(fits[whole[0]].values())) > 1):
        chosen = whole[0] if whole else next(iter(fits))
        rivals = tuple(Rival(name, 0, _half(name, fits[name])) for name in fits if name != chosen)
        return _Choice(chosen, fits[chosen], evidence, rivals)
    rivals = tuple(Rival(name, 0, _half(name, fits[name])) for name in fits)
    return _Choice(None, fits[(whole or list(fits))[0]], evidence, rivals, (_open(found[0].vectors.width, fits),))


def _is_whole(placed: Mapping[str, str], family: str) -> bool:
    return set(placed.values()) == {encoder.key for encoder in EMBEDDING_FAMILIES[family]}


def _half(family: str, placed: Mapping[str, str]) -> str:
    """What it would be to that family."""
    lacking = [encoder.key for encoder in EMBEDDING_FAMILIES[family] if encoder.key not in placed.values()]
    title = title_of(family)
    return f"without vectors for {', '.join(lacking)} of {title}" if lacking else f"an embedding for {title}"


def _open(width: int, fits: Mapping[str, Mapping[str, str]]) -> Finding:
    """The note that several base models have an encoder of this width."""
    places = {
        (encoder.key, encoder.component)
        for name, placed in fits.items()
        for encoder in EMBEDDING_FAMILIES[name]
        if encoder.key in placed.values()
    }
    message = f"Vectors of {width} numbers are for {listed([title_of(name) for name in fits])}; the file does not say."
    if len(places) == 1:
        fix = "The converted file is the same for all of them; --family names the one that is meant."
        return Finding("ambiguous-family", "note", "", message, fix)
    fix = f"Name it: --family {' or '.join(fits)}."
    return Finding("ambiguous-family", "warning", "", message, fix)


def _misfit(found: Sequence[_Named], family: str | None) -> Finding:
    known = set(widths())
    odd = next((one for one in found if one.vectors.width not in known), None)
    if odd is not None:
        message = f"Its vectors have {odd.vectors.width} numbers; text encoders that are known take {_listed_widths()}."
        return Finding("unknown-width", "warning", odd.vectors.tensor, message)
    sizes = " and ".join(sorted({f"{one.encoder or 'vectors'} of {one.vectors.width}" for one in found}))
    if family is not None:
        takes = ", ".join(f"{encoder.key} of {encoder.width}" for encoder in EMBEDDING_FAMILIES[family])
        message = f"It has {sizes}, and {title_of(family)} takes {takes}."
        return Finding("shape-misfit", "error", found[0].vectors.tensor, message, "Is it for another base model?")
    message = f"No base model that is known has text encoders for {sizes} together."
    return Finding("shape-misfit", "error", found[0].vectors.tensor, message)


def _listed_widths() -> str:
    rows: dict[int, list[str]] = {}
    for encoders in EMBEDDING_FAMILIES.values():
        for encoder in encoders:
            if encoder.key not in rows.setdefault(encoder.width, []):
                rows[encoder.width].append(encoder.key)
    return ", ".join(f"{width} ({' or '.join(keys)})" for width, keys in sorted(rows.items()))


def _collected(found: Sequence[_Named], choice: _Choice, header: Header) -> tuple[tuple[Embedding, ...], list[Finding]]:
    """Tensors put together by token."""
    groups: dict[tuple[str | None, str | None], list[_Named]] = {}
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


def _token(one: _Named, header: Header, several: bool) -> tuple[str, bool]:
    """What the file calls the embedding, and whether it says so itself."""
    if one.bundle is not None:
        return one.bundle, True
    if one.token is not None and one.token not in _NAMELESS:
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


def _evidence(found: Sequence[_Named]) -> Iterator[str]:
    rows: dict[tuple[str, str | None, int], int] = {}
    for one in found:
        row = (one.form.title, one.encoder, one.vectors.width)
        rows[row] = rows.get(row, 0) + one.vectors.count
    for (title, encoder, width), count in rows.items():
        yield f"{counted(count, 'vector')} of {width} numbers{f' for {encoder}' if encoder else ''}, {title}"


def _trainer(found: Sequence[_Named], header: Header) -> tuple[str | None, tuple[str, ...]]:
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
