"""Embeddings on a live pipeline: where a prompt has their word, every one of their vectors is read; and off again.

The tokenizer is given, for the time, a backend that turns the word into one token of its own for each vector. The text
encoder's table stays as it is: a hook before the encoder puts a common token in the place of those, and a hook behind
the table the vectors. So no id that the encoder sees is above that of the end of text, where CLIP's encoders with the
old configuration (SDXL's, `eos_token_id` 2: transformers' `CLIPTextTransformer.forward`) look for their pooled output,
and no weight is changed that would have to be put back bit for bit.
"""

from __future__ import annotations

import copy
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_convert.containers import MAX_HEADER, Source
from lora_convert.converters.convert import opened_whole
from lora_convert.converters.embeddings import read_vectors
from lora_convert.errors import FileError, UsageError
from lora_convert.families.encoders import EMBEDDING_FAMILIES, TextEncoder, title_of
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import Detection
from lora_convert.report import Finding, counted, listed, shown

__all__ = ["FoundWords", "Word", "is_placed", "place", "read_words", "take_off", "tokens_of", "unused"]

Array = NDArray[Any]

_FIRST, _MOST = 0x100000, 0xFFFE
"""Vectors are called by characters of the second private use plane, which no prompt has and no rule changes."""

_FIRST_KEPT = 0xF0000
"""The first private use plane: what stands, meanwhile, for tokens that others have added."""

_PLAIN = 0
"""The id that the encoder is given in a vector's place; any below that of the end of text will do."""

_READERS = "_lora_convert_readers"
"""Where a pipeline keeps its readers, for the case that it is given other encoders meanwhile."""


@dataclass(frozen=True, eq=False)
class Word:
    """A token, and the vectors that are read in its place: by the encoder's key, (count, width), any float dtype."""

    token: str
    vectors: Mapping[str, Array]


class _Reader:
    """What one text encoder and its tokenizer read besides their vocabulary.

    The encoder's hooks are its own methods, so that a deep copy of a pipeline has readers of its own. What they hand on
    to each other is each thread's own, since pipelines that are used at once may share an encoder.
    """

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        self.encoder, self.tokenizer = encoder, tokenizer
        self.words: tuple[tuple[Word, Array], ...] = ()
        self._own = tokenizer.backend_tokenizer
        self._first = 0
        self._vectors = torch.empty(0)
        self._ids: dict[int, torch.Tensor] = {}
        self._table = encoder.get_input_embeddings()
        self._hooks = [
            encoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self._table.register_forward_hook(self._behind),
        ]

    def read(self, words: Sequence[tuple[Word, Array]]) -> None:
        """Read these words, and nothing else besides the vocabulary; without any, all is as it was."""
        self.words = tuple(words)
        if not self.words:
            self.tokenizer._tokenizer = self._own
            for hook in self._hooks:
                hook.remove()
            return
        counts = [len(vectors) for _, vectors in self.words]
        if sum(counts) > _MOST:
            raise UsageError(f"{sum(counts):,} vectors are more than a tokenizer can be given ({_MOST:,})")
        names = [chr(_FIRST + number) for number in range(sum(counts))]
        backend = copy.deepcopy(self._own)
        starts = np.cumsum([0, *counts])
        spelled = [
            (word.token, "".join(names[start : start + count]))
            for (word, _), start, count in zip(self.words, starts, counts, strict=False)
        ]
        backend.normalizer = _normalizer(backend, spelled)
        backend.add_tokens(_added(names))
        self._first = backend.token_to_id(names[0])
        self._vectors = torch.from_numpy(np.concatenate([vectors.astype(np.float64) for _, vectors in self.words]))
        self.tokenizer._tokenizer = backend

    def _ours(self, ids: torch.Tensor) -> torch.Tensor:
        return (ids >= self._first) & (ids < self._first + len(self._vectors))

    def _follow(self) -> None:
        """Peft and others put another table in the place of the one that the encoder had, or around it."""
        table = self.encoder.get_input_embeddings()
        if table is not self._table:
            self._hooks.pop().remove()
            self._hooks.append(table.register_forward_hook(self._behind))
            self._table = table

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, encoder: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """In front of the encoder: remember where our tokens are, and put a plain one in their place."""
        ids = options.get("input_ids", arguments[0] if arguments else None)
        self._ids.pop(threading.get_ident(), None)
        if not isinstance(ids, torch.Tensor) or not (ours := self._ours(ids)).any():
            return None
        self._follow()
        self._ids[threading.get_ident()] = ids
        plain = ids.masked_fill(ours, _PLAIN)
        if "input_ids" in options:
            return arguments, {**options, "input_ids": plain}
        return (plain, *arguments[1:]), options

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _behind(self, table: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Behind the table: put the vectors in."""
        given = self._ids.pop(threading.get_ident(), None)
        if given is None:
            return None
        ids = given.reshape(output.shape[:-1]).cpu()
        ours = self._ours(ids)
        changed = output.clone()
        changed[ours.to(output.device)] = self._vectors[ids[ours] - self._first].to(output.dtype).to(output.device)
        return changed


def _added(names: Sequence[str]) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(name, normalized=True, special=False) for name in names]


def _normalizer(backend: Any, spelled: Sequence[tuple[str, str]]) -> Any:
    """The tokenizer's own rules for text, after ours that put tokens in the place of words.

    Longer words go first. The spelling that a prompt has goes before others that differ in capitals.
    """
    from tokenizers import Regex, normalizers

    def rule(pattern: str, content: str) -> Any:
        return normalizers.Replace(Regex(pattern), content)

    kept = sorted(_added_by_others(backend), key=len, reverse=True)
    held = [chr(_FIRST_KEPT + number) for number in range(len(kept))]
    rules: list[Any] = [normalizers.NFC()]
    rules += [rule(f"(?i:{_pattern(token)})", name) for token, name in zip(kept, held, strict=True)]
    by_length = sorted(spelled, key=lambda pair: -len(pair[0]))
    for _, same in groupby(by_length, key=lambda pair: len(pair[0])):
        alike = list(same)
        rules += [rule(_whole(token), names) for token, names in alike]
        rules += [rule(f"(?i:{_whole(token)})", names) for token, names in alike]
    rules += [normalizers.Replace(name, token) for token, name in zip(kept, held, strict=True)]
    own = backend.normalizer
    return normalizers.Sequence([*rules, *([own] if own is not None else [])])


def _pattern(token: str) -> str:
    """A regular expression for a token as it stands in a text; any white space is as good as another."""
    return r"\s+".join("".join(_literal(sign) for sign in word) for word in _nfc(token).split())


def _whole(token: str) -> str:
    """The same, where it is no part of a longer word, or of a row of the same sign."""
    signs = _nfc(token).strip()
    letters = [sign for sign in signs if not unicodedata.category(sign).startswith("M")] or signs  # no vowel signs
    before, after = (_edge(letters[place]) for place in (0, -1))
    return f"{f'(?<!{before})' if before else ''}{_pattern(token)}{f'(?!{after})' if after else ''}"


def _edge(sign: str) -> str:
    """What must not stand beside a token that begins or ends with this sign; nothing in scripts without blanks."""
    if sign.isalnum() and unicodedata.east_asian_width(sign) in ("W", "F"):
        return ""
    return r"\w" if sign.isalnum() or sign == "_" else _literal(sign)


def _literal(sign: str) -> str:
    return sign if sign.isalnum() else f"\\x{{{ord(sign):x}}}"


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _added_by_others(backend: Any) -> list[str]:
    """Tokens that `load_textual_inversion` or somebody else has added; those are read as before."""
    added = backend.get_added_tokens_decoder().values()
    return [token.content for token in added if not token.special and token.content.strip()]


def place(pipeline: Any, family: str, words: Sequence[Word]) -> tuple[Finding, ...]:
    """Put embeddings onto a pipeline of a family, beside those that it has: from now on a word in a prompt means them.

    The word counts where it stands whole, in any capitals; longer words go first. Each of the pipeline's text encoders
    reads the vectors that the embedding has for it, in its own dtype; one without any reads the word as such, which the
    finding `half-embedding` says. Raises UsageError for a token that cannot be used or is in use, and for a tokenizer
    that cannot be extended; FileError with `overflow` or `not-finite` for vectors that the encoder cannot take. Then
    the pipeline is as before.
    """
    encoders = [
        encoder for encoder in EMBEDDING_FAMILIES[family] if getattr(pipeline, encoder.component, None) is not None
    ]
    _check_tokens(pipeline, encoders, words)
    _check_tokenizers(pipeline, encoders)
    findings = [finding for word in words for finding in _unfit(pipeline, encoders, word)]
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        raise FileError(errors)
    try:
        for encoder in encoders:
            own = [(word, word.vectors[encoder.key]) for word in words if encoder.key in word.vectors]
            if own:
                reader = _reader(pipeline, encoder)
                if reader is None:
                    reader = _Reader(*_parts(pipeline, encoder))
                    vars(pipeline).setdefault(_READERS, []).append(reader)
                reader.read([*reader.words, *own])
    except BaseException:
        take_off(pipeline, words)
        raise
    for name in ("load_textual_inversion", "unload_textual_inversion"):
        setattr(pipeline, name, _refuse_loading)
    return tuple(findings)


def take_off(pipeline: Any, words: Sequence[Word]) -> None:
    """Take embeddings off. Without any that are left, the pipeline is what it was before. Harmless if they are off."""
    readers = list(_readers(pipeline))
    for reader in readers:
        left = [(word, vectors) for word, vectors in reader.words if not any(word is other for other in words)]
        if len(left) < len(reader.words) or not left:
            reader.read(left)
    if not any(reader.words for reader in readers):
        for name in ("load_textual_inversion", "unload_textual_inversion"):
            vars(pipeline).pop(name, None)
        vars(pipeline).pop(_READERS, None)


def is_placed(pipeline: Any, word: Word) -> bool:
    """Whether an embedding is on the pipeline."""
    return any(word is other for reader in _readers(pipeline) for other, _ in reader.words)


def tokens_of(pipeline: Any) -> tuple[str, ...]:
    """The tokens of all embeddings that are on the pipeline."""
    return tuple(dict.fromkeys(word.token for reader in _readers(pipeline) for word, _ in reader.words))


def unused(pipeline: Any, words: Sequence[Word], texts: Sequence[str]) -> bool:
    """Whether none of some embeddings stands in any of the texts that a pipeline will read."""
    for reader in _readers(pipeline):
        found = {sign for text in texts for sign in reader.tokenizer.tokenize(text)}
        start = _FIRST
        for word, vectors in reader.words:
            if any(word is other for other in words) and chr(start) in found:
                return False
            start += len(vectors)
    return True


def _model(pipeline: Any, component: str) -> Any:
    """A text encoder; of a compiled one the module that was compiled, for `torch.compile` has no hooks of its own."""
    model = getattr(pipeline, component, None)
    return getattr(model, "_orig_mod", model)


def _parts(pipeline: Any, encoder: TextEncoder) -> tuple[Any, Any]:
    return _model(pipeline, encoder.component), getattr(pipeline, encoder.tokenizer)


def _readers(pipeline: Any) -> Iterator[_Reader]:
    """The readers of the pipeline's encoders, also of those that another pipeline shares or that it has no longer."""
    models = [_model(pipeline, name) for name in ("text_encoder", "text_encoder_2")]
    hooks = [hook for model in models for hook in getattr(model, "_forward_pre_hooks", {}).values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    found = [owner for owner in owners if isinstance(owner, _Reader)]
    yield from found
    yield from (reader for reader in vars(pipeline).get(_READERS, ()) if reader.words and reader not in found)


def _reader(pipeline: Any, encoder: TextEncoder) -> _Reader | None:
    model = _model(pipeline, encoder.component)
    return next((reader for reader in _readers(pipeline) if reader.encoder is model), None)


def _check_tokens(pipeline: Any, encoders: Sequence[TextEncoder], words: Sequence[Word]) -> None:
    taken = {_nfc(token): "of another embedding that is applied" for token in tokens_of(pipeline)}
    for encoder in encoders:
        tokenizer = _parts(pipeline, encoder)[1]
        added = tokenizer.get_added_vocab()
        special = set(tokenizer.all_special_tokens)
        taken |= dict.fromkeys(special, "a sign of the tokenizer")
        taken |= {token: "loaded by load_textual_inversion" for token in added.keys() - special if token not in taken}
    for word in words:
        token = _nfc(word.token)
        if not token.strip() or any(ord(sign) >= _FIRST_KEPT or unicodedata.category(sign) == "Cs" for sign in token):
            raise UsageError(f"{shown(repr(word.token))} cannot be a token; give another with token=…")
        if token in taken:
            said = f"the token {shown(token)} is in use: it is {taken[token]}"
            raise UsageError(f"{said}; give this one another with token=…, or remove the other first")
        taken[token] = "of this file, too"


def _check_tokenizers(pipeline: Any, encoders: Sequence[TextEncoder]) -> None:
    tokenizers = [_parts(pipeline, encoder)[1] for encoder in encoders]
    for tokenizer in tokenizers:
        if not hasattr(tokenizer, "backend_tokenizer"):
            said = f"the pipeline's {type(tokenizer).__name__} cannot be given tokens for every vector"
            raise UsageError(f"{said}; install transformers 5 or later, or open the base model with CLIPTokenizerFast")
    for encoder, tokenizer in zip(encoders, tokenizers, strict=True):
        exchanged = tokenizer.backend_tokenizer.token_to_id(chr(_FIRST)) is not None
        if exchanged and _reader(pipeline, encoder) is None:
            said = f"embeddings were applied to another {encoder.component} that has the same {encoder.tokenizer}"
            raise UsageError(f"{said}; remove those first, or give the pipeline a copy of the tokenizer")
    if len({id(tokenizer) for tokenizer in tokenizers}) < len(tokenizers):
        raise UsageError("the pipeline's text encoders share one tokenizer; give it a copy for the second one")


def _unfit(pipeline: Any, encoders: Sequence[TextEncoder], word: Word) -> Iterator[Finding]:
    """What is wrong with an embedding for these encoders."""
    for encoder in encoders:
        if encoder.key in word.vectors:
            model = _parts(pipeline, encoder)[0]
            yield from _unfit_vectors(word.token, encoder.key, word.vectors[encoder.key], model.dtype)
    lacking = [encoder.key for encoder in encoders if encoder.key not in word.vectors]
    if lacking:
        said = f"It has vectors for {listed(list(word.vectors))} and none for {listed(lacking)}, which reads the word."
        yield Finding("half-embedding", "warning", word.token, said, "Apply the folder or file that has both.")


def _unfit_vectors(token: str, key: str, vectors: Array, dtype: torch.dtype) -> Iterator[Finding]:
    wide = torch.from_numpy(vectors.astype(np.float64))
    kept, precision = wide.to(dtype), str(dtype).removeprefix("torch.")
    if not wide.isfinite().all():
        yield Finding("not-finite", "error", token, f"Its vectors for {key} have NaN or infinity in them.")
    elif not kept.isfinite().all():
        fix = "Open the pipeline with dtype bfloat16 or float32."
        yield Finding("overflow", "error", token, f"Values of it do not fit the pipeline's {precision}.", fix)
    elif ((kept == 0).all(-1) & (wide != 0).any(-1)).any():
        yield Finding("underflow", "warning", token, f"All values of a vector became zero in {precision}.")


def _refuse_loading(*arguments: Any, **options: Any) -> Any:
    """In the place of the pipeline's own loader, which would lose its tokens when ours go."""
    said = "embeddings were applied to the pipeline, beside which load_textual_inversion cannot be used"
    raise UsageError(f"{said}; apply the others too, or remove these first")


# --- from files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundWords:
    """The embeddings of some files; `files` are those that hold nothing else."""

    words: tuple[Word, ...] = ()
    files: tuple[Path, ...] = ()
    findings: tuple[Finding, ...] = ()


def read_words(
    files: Sequence[Path],
    called: str,
    base: str | None,
    token: str | Sequence[str] | None = None,
    *,
    family: str | None = None,
    config: str | Path | None = None,
    max_header: int = MAX_HEADER,
    skip: str | Sequence[str] = (),
) -> FoundWords:
    """Read the embeddings that are in files, for a base model of a family. Where a file fits several, the base decides.

    Files that give the same token are the parts of one embedding. `called` is what the user called the files; `token`
    are other names, one for each embedding. Raises UsageError for another base model than the file's and for a wrong
    number of names, FileError for an embedding that cannot be used.
    """
    parts: dict[str, dict[str, Array]] = {}
    alone: list[Path] = []
    findings: list[Finding] = []
    skipped = (skip,) if isinstance(skip, str) else tuple(skip)
    for file in files:
        with opened_whole(called if called.startswith("hf://") else file, max_header, skipped) as source:
            found = _detected(source, family, base, config)
            if found.kind == "embedding":
                _refuse_unfit(found, called, base)
                alone.append(file)
                findings += found.findings
            elif not found.ok:
                continue
            for embedding in found.embeddings:
                vectors, held = read_vectors(source, embedding), parts.setdefault(embedding.token, {})
                if twice := sorted(held.keys() & vectors.keys()):
                    said = f"{shown(called)} gives vectors of {twice[0]} for the token {shown(embedding.token)} twice"
                    raise UsageError(said)
                held |= vectors
    names = _names(list(parts), token, called)
    words = tuple(Word(name, vectors) for name, vectors in zip(names, parts.values(), strict=True))
    return FoundWords(words, tuple(alone), tuple(dict.fromkeys(findings)))


def _detected(source: Source, family: str | None, base: str | None, config: str | Path | None) -> Detection:
    found = detect(source, family=family, config=config)
    if found.kind == "embedding" and found.family is None and base in {rival.family for rival in found.rivals}:
        return detect(source, family=base, config=config)
    return found


def _refuse_unfit(found: Detection, called: str, base: str | None) -> None:
    errors = [finding for finding in found.findings if finding.severity == "error"]
    if errors:
        raise FileError(errors)
    families = [found.family] if found.family else [rival.family for rival in found.rivals]
    if base in families:
        return
    said = f"{shown(called)} is for {' or '.join(f'{title_of(family)} ({family})' for family in families)}"
    opens = f"open a base model of the family {' or '.join(families)}"
    if base is None:
        raise UsageError(f"{said}, and the pipeline is of no family that is known; {opens}")
    raise UsageError(f"{said}, and the base model is {title_of(base)} ({base}); {opens}")


def _names(tokens: Sequence[str], given: str | Sequence[str] | None, called: str) -> Sequence[str]:
    """What the embeddings are to be called."""
    if given is None:
        return tokens
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else [given]
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"token must be text; it is {shown(repr(given))}")
    if len(names) != len(tokens):
        there = counted(len(tokens), "embedding") + (f" ({listed(tokens)})" if tokens else "")
        raise UsageError(f"token gives {counted(len(names), 'name')}, and {shown(called)} has {there}")
    return names
