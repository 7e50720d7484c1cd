"""What embeddings are called: the tokens that are written, and what is to be said where they are not the source's."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import PurePath

from lora_convert.converters.plan import Options
from lora_convert.families.vocabulary import is_known
from lora_convert.inspect.detection import Detection, Embedding
from lora_convert.report import Finding, counted, listed, printable, severest, shown

__all__ = ["named_embeddings"]


def named_embeddings(detection: Detection, options: Options) -> tuple[list[tuple[Embedding, str]], list[Finding]]:
    """Every embedding with the token that is written, and what is to be said of it."""
    embeddings = detection.embeddings
    findings: list[Finding] = []
    if options.token and len(options.token) != len(embeddings):
        given, there = counted(len(options.token), "name"), counted(len(embeddings), "embedding")
        message = f"--token gives {given}, and the file has {there}: {listed([e.token for e in embeddings])}."
        findings.append(Finding("token-missing", "error", "", message, "Give a --token for each, in this order."))
    named = []
    if len(embeddings) == 1 and not options.token and (said := _other_name(detection, embeddings[0])):
        findings.append(said)
    for number, embedding in enumerate(embeddings):
        given_token = options.token[number] if number < len(options.token) else None
        token, remarks = _token(embedding, given_token, not options.joins)
        if not options.joins and is_known(token, detection.family):
            remarks.append(_known(embedding, token, given_token is not None))
            token = token if given_token is not None else _bracketed(token, embeddings)
        findings += remarks
        named.append((embedding, token))
    if not options.joins:
        findings += _numbered(named)
    twice = sorted({token for _, token in named if [other.lower() for _, other in named].count(token.lower()) > 1})
    if twice and severest(findings) != "error":
        message = f"Several embeddings have the name {shown(twice[0])}."
        findings.append(Finding("duplicate-module", "error", "", message, "Name them with --token, once for each."))
    return named, findings


def _numbered(named: Sequence[tuple[Embedding, str]]) -> list[Finding]:
    """What is wrong with tokens like `sks_1`, which Diffusers gives to the later vectors of another, `sks`."""
    tokens = {token for _, token in named}
    findings = []
    for embedding, token in named:
        same = sorted(tokens & {f"{token}_{number}" for number in range(1, embedding.count)})
        if same:
            message = (
                f"Diffusers calls a vector of {shown(token)} {shown(same[0])}, which is another embedding's token."
            )
            fix = "Name them with --token, once for each."
            findings.append(Finding("duplicate-module", "error", embedding.tensors[0], message, fix))
    return findings


def _token(embedding: Embedding, given: str | None, lowers: bool) -> tuple[str, list[Finding]]:
    findings = []
    token = embedding.token if given is None else given
    subject = next(iter(embedding.tensors), "")
    if given is None and not embedding.stated and token:
        message = f"The file names no token, so it gets the file's own name: {shown(token)}."
        findings.append(Finding("token-from-name", "note", subject, message, "--token gives it another."))
    typed = _typed(token)
    if not typed.strip():
        message = "Neither the file nor its name gives a token."
        return "", [Finding("token-missing", "error", subject, message, "Name it: --token WORD.")]
    if typed != token:
        message = (
            f"The token {shown(repr(token))} has signs or blanks that a prompt cannot have, or looks like a path: "
            f"{typed!r} it is."
        )
        findings.append(Finding("token-renamed", "warning", subject, message, "--token gives it another."))
    if lowers and embedding.count > 1 and typed != typed.lower():
        message = (
            f"{shown(typed)} is written as {shown(typed.lower())}, and so it is to be spelt in prompts: of a token "
            f"with capitals Diffusers uses the first of {embedding.count} vectors alone."
        )
        findings.append(Finding("token-lowercased", "warning", subject, message))
        typed = typed.lower()
    return typed, findings


def _typed(token: str) -> str:
    """The token as it can stand in a prompt: tokenizers bring texts to NFC and make one blank of any white space."""
    signs = (sign for sign in token if sign.isspace() or (printable(sign) == sign and sign not in "/\\"))
    typed = " ".join(unicodedata.normalize("NFC", "".join(signs)).split())
    return typed.strip(". ") if typed != token else token


def _bracketed(token: str, others: Sequence[Embedding]) -> str:
    taken = {embedding.token.lower() for embedding in others}
    token = f"<{token}>"
    while token.lower() in taken:
        token = f"<{token}>"
    return token


def _known(embedding: Embedding, token: str, given: bool) -> Finding:
    """What is said of a token that is in the vocabulary: it is put into brackets, unless the user wants it so."""
    subject = next(iter(embedding.tensors), "")
    message = f"{shown(token)} is a token of the base model's vocabulary, which Diffusers' own loader refuses."
    if given:
        fix = f"--token '<{shown(token)}>' gives one that it takes; lora_convert.apply takes this one."
        return Finding("token-known", "warning", subject, message, fix)
    message += f" It is written as <{shown(token)}>, and so it is to be spelt in prompts."
    return Finding("token-renamed", "warning", subject, message, "--token gives it another.")


_PICTURES = (".png", ".webp")


def _other_name(detection: Detection, embedding: Embedding) -> Finding | None:
    """The note that A1111 calls a file of its own by the file's name (a picture by the name inside it)."""
    path = PurePath(detection.file)
    own = detection.trainer == "a1111" and "lora_convert.version" not in (detection.metadata or {})
    named = not detection.file.startswith("<") and path.suffix.lower() not in _PICTURES
    if not (own and named) or path.stem.lower() == embedding.token.lower():
        return None
    message = f"A1111 calls it by the file's name, {shown(path.stem)}, and not by the {shown(embedding.token)} inside."
    return Finding("token-differs", "note", "", message, f"--token {shown(path.stem)} keeps that name.")
