"""How embeddings are written: which tensors hold vectors, and what their names tell.

A form is a row of `FORMS`. Sources: the saving code of the writers, and what AUTOMATIC1111, ComfyUI and Diffusers read.
Containers hand over names of one kind: dictionaries of pickles and pictures are joined by dots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from lora_convert.containers import Header
from lora_convert.containers.dtypes import WEIGHTS
from lora_convert.families.encoders import EMBEDDING_FAMILIES
from lora_convert.inspect.detection import Vectors

__all__ = [
    "FORMS",
    "LAYERS",
    "MOST_READ",
    "MOST_VECTORS",
    "NAMELESS",
    "Form",
    "NamedVectors",
    "bundled",
    "is_own",
    "looks_like_embedding",
    "named",
    "names_inside",
    "widths",
]

MOST_VECTORS = 1024
"""More vectors than this are no embedding but a table."""

MOST_READ = 75
"""Vectors that a prompt has room for, beside the tokens that begin and end it. What has more, and only a name that may
be anything, is another kind of table."""

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

DIFFUSERS = _form(r"(?P<token>.+)", "Diffusers' form")
NAMELESS = ("*", "tensor")
"""LyCORIS' name for every embedding, and the container's for a pickle that is one tensor."""

_ENCODERS = {"t5": "t5xxl", "0": "clip_l", "1": "clip_g"}
"""Other names of text encoders."""

_BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<rest>string_to_(?:param|token)\..+|[^.]+)", re.DOTALL)
_ITEM = re.compile(r"(?P<number>\d+)\.(?P<rest>.+)", re.DOTALL)
TOKEN_NUMBER = re.compile(r"(bundle_emb\..+\.)?string_to_token\..+", re.DOTALL)
"""The number that stood for the token while training; it means nothing elsewhere."""

LAYERS = re.compile(r"(IN|OUT)\d\d|MID")


@dataclass(frozen=True, slots=True)
class NamedVectors:
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


def named(header: Header, tensor: str, name: str, bundle: str | None = None) -> NamedVectors | None:
    """What a tensor's name tells: as one of `FORMS`, or as a token."""
    vectors = _vectors(header, tensor)
    if vectors is None:
        return None
    for form in (DIFFUSERS,) if _is_own(header, tensor, name) else (*FORMS, DIFFUSERS):
        if found := form.pattern.fullmatch(name):
            said = found.groupdict()
            encoder = said.get("encoder")
            encoder = _ENCODERS.get(encoder, encoder) if encoder else None
            token, placeholder = said.get("token"), said.get("placeholder")
            return NamedVectors(vectors, form, bundle, token, placeholder, encoder, bool(said.get("out")))
    return None


def names_inside(header: Header) -> dict[str, str]:
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
        if _is_own(header, tensor, name) or not TOKEN_NUMBER.fullmatch(name)
    }


def _is_own(header: Header, tensor: str, name: str) -> bool:
    """Whether the name is the token of a file of ours for Diffusers, whatever else it may look like."""
    prefix = tensor.removesuffix(name)
    said = header.extras if prefix else header.metadata
    alone = "," not in said.get(f"{prefix}lora_convert.encoder", "")  # else it is one of several text encoders
    return alone and said.get(f"{prefix}lora_convert.token") == name


def is_own(header: Header) -> bool:
    """Whether all tensors of a file or folder are of embeddings that `convert` wrote for Diffusers."""
    if not any(key.endswith("lora_convert.token") for key in (*header.metadata, *header.extras)):
        return False
    names = names_inside(header)
    return bool(names) and all(_is_own(header, tensor, names.get(tensor, "")) for tensor in header.tensors)


def looks_like_embedding(header: Header) -> bool:
    """Whether all tensors of a file are vectors as wide as a text encoder's, or are named as embeddings are."""
    known, most = set(widths()), 64
    names = names_inside(header)
    found = [named(header, tensor, name) for tensor, name in names.items()]
    if not names or len(names) > most:
        return False
    if any(one is not None and one.form is not DIFFUSERS for one in found):
        return True
    return all(
        one is not None
        and one.vectors.width in known
        and one.vectors.count <= MOST_READ
        and name.rpartition(".")[2] not in ("weight", "bias")
        for name, one in zip(names.values(), found, strict=True)
    )


def bundled(header: Header) -> tuple[list[NamedVectors], list[str]]:
    """The vectors that a LoRA file carries beside its modules, and the names of tensors that belong to them.

    LyCORIS' and OneTrainer's bundles begin with `bundle_emb.`; cloneofsimo's files say `<embed>` of a token in the
    metadata, and others keep tokens in angle brackets.
    """
    found, numbers = [], []
    for name in header.tensors:
        one = None
        if TOKEN_NUMBER.fullmatch(name):
            numbers.append(name)
        elif inside := _BUNDLED.fullmatch(name):
            one = named(header, name, inside["rest"], inside["name"])
        elif header.metadata.get(name) == "<embed>" or re.fullmatch(r"<[^<>]+>", name):
            one = named(header, name, name)
        found += [one] if one else []
    return found, numbers if found else []
