"""The proof of converted embeddings with torch: through diffusers' own loader, vector by vector and in pictures.

The reference of the pictures uses neither that loader nor `apply`: it puts ids and vectors together itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_convert.containers import Source, opened
from lora_convert.containers.dtypes import numpy_dtype
from lora_convert.converters.embedding_record import RECORD_NAME, read_record
from lora_convert.converters.embeddings import embedding_files, read_vectors
from lora_convert.converters.fidelity import Rung
from lora_convert.converters.metadata import PROVENANCE
from lora_convert.errors import FileError
from lora_convert.families.encoders import EMBEDDING_FAMILIES, TextEncoder
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import Detection
from lora_convert.report import MOST_FINDINGS, Finding, counted, shown
from lora_convert.runtime import bases
from lora_convert.runtime.embedding import Word
from lora_convert.runtime.loading import LoadingError, collected_warnings, not_loaded
from lora_convert.runtime.picture import Drawn, PictureProof
from lora_convert.runtime.rendering import Settings

__all__ = ["EmbeddingProof", "Placement", "check_loaded", "loaded", "placements", "spelled_out", "words_of"]

Array = NDArray[Any]
Opened = tuple[Source, Detection]

_MIDDLE = "a {} b"
_OLD_END = 2
"""`eos_token_id` of encoders published before transformers 4.31, whatever the id is."""


@dataclass(frozen=True)
class Placement:
    """One file as the record's snippet loads it: the token, and the pipeline's text encoder that gets its vectors."""

    file: Path
    token: str
    encoder: TextEncoder


def placements(path: Path, family: str | None) -> tuple[Placement, ...]:
    """How the files of a folder that `convert` wrote, or one of them, are loaded: as the record beside them says, or
    without one as they say themselves. None for files in another layout than Diffusers'. Raises FileError.
    """
    files = embedding_files(path) if path.is_dir() else (path,)
    record = (path if path.is_dir() else path.parent) / RECORD_NAME
    if record.is_file():
        recorded = list(_recorded(record, {file.name: file for file in files}))
        if path.is_dir() or recorded:
            return tuple(recorded)
    found = [_placement(file, family) for file in files]
    return tuple(one for one in found if one is not None) if all(found) else ()


def _recorded(record: Path, files: Mapping[str, Path]) -> Iterator[Placement]:
    """What the record says of these files. It is data: its snippet is not run."""
    try:
        for embedding in read_record(record)["embeddings"]:
            for entry in embedding["files"]:
                encoder = TextEncoder(entry["encoder"], entry["component"], entry["width"])
                if not any(encoder in encoders for encoders in EMBEDDING_FAMILIES.values()):
                    raise ValueError(f"there is no encoder {shown(str(entry))}")
                if entry["file"] in files:
                    yield Placement(files[entry["file"]], str(embedding["token"]), encoder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"It does not say how the files are loaded: {shown(str(error), 200)}."
        raise FileError([Finding("module-not-loaded", "error", record.name, said)]) from None


def _placement(file: Path, family: str | None) -> Placement | None:
    """What a file says itself. None where Diffusers' loader takes it for something else or would unpickle it, or its
    encoder is open.
    """
    if not _is_safe(file):
        return None
    with opened(file) as source:
        found = detect(source, family=family)
        if len(found.embeddings) != 1 or len(source.header.tensors) != 1:
            return None
        (embedding,) = found.embeddings
        (key, vectors), *more = embedding.vectors.items()
    families = [found.family] if found.family else [rival.family for rival in found.rivals]
    encoders = {
        encoder
        for name in families
        for encoder in EMBEDDING_FAMILIES[name]
        if (encoder.key, encoder.width) == (key, vectors.width)
    }
    if more or len(encoders) != 1 or vectors.tensor.rpartition("string_to_param.")[2] != embedding.token:
        return None
    return Placement(file, embedding.token, encoders.pop())


def _is_safe(file: Path) -> bool:
    """Whether Diffusers reads a file by the safetensors library: by its name; all others it gives to torch.load."""
    return file.name.endswith(".safetensors")


def load_one(pipeline: Any, placement: Placement) -> None:
    """Load one file as the record's snippet does. Raises LoadingError with the loader's own words."""
    if not _is_safe(placement.file):
        raise LoadingError("Diffusers would unpickle it, since its name does not end in .safetensors")
    encoder = placement.encoder
    parts = {"text_encoder": getattr(pipeline, encoder.component), "tokenizer": getattr(pipeline, encoder.tokenizer)}
    try:
        pipeline.load_textual_inversion(str(placement.file), token=placement.token, **parts)
    except Exception as error:
        raise LoadingError(f"{type(error).__name__}: {shown(str(error), 300)}") from error


def words_of(outputs: Sequence[Opened], sources: Sequence[Opened]) -> tuple[Word, ...]:
    """The sources' embeddings by the tokens of the output: what the output says that its token was before, or one alike
    but for capitals, or else the next in order.
    """
    vectors: dict[str, dict[str, Array]] = {}
    for source, found in sources:
        for embedding in found.embeddings:
            vectors.setdefault(embedding.token, {}).update(read_vectors(source, embedding))
    tokens = {
        embedding.token: (found.metadata or {}).get(f"{PROVENANCE}source_token", embedding.token).lower()
        for _, found in outputs
        for embedding in found.embeddings
    }
    alike = {before: token for token, before in tokens.items()}
    named = {token.lower() for token in vectors}
    others = iter([token for token, before in tokens.items() if before not in named])
    return tuple(Word(alike.get(token.lower()) or next(others, token), held) for token, held in vectors.items())


# --- the rung `load` --------------------------------------------------------------------------------------------------


def check_loaded(path: Path, family: str | None, words: Sequence[Word]) -> Rung:
    """The rung `load`: every file through diffusers' `load_textual_inversion`, onto tables of the real widths.

    Where a prompt has the token, the vectors must then be there: all of them, in order, bit for bit in float32 but for
    rounding to the file's dtype, which is the rung `vectors`' matter. The tables belong to encoders of one layer and
    have the embedded models' vocabulary, no real weights.
    """
    try:
        places = placements(path, family)
        if not places:
            return Rung("skipped", "only safetensors files in the Diffusers layout are loaded")
        with collected_warnings() as messages:
            host = _host(places)
            for place in places:
                load_one(host, place)
    except LoadingError as error:
        return Rung("fail", "the loader raised", findings=(not_loaded("", f"The loader failed: {error}."),))
    except FileError as error:
        return Rung("fail", findings=error.findings)
    by_token = {word.token: word for word in words}
    findings, read = [], 0
    for place in places:
        wanted = by_token[place.token].vectors.get(place.encoder.key) if place.token in by_token else None
        said = _wrong(host, place, None if wanted is None else _as_stored(place.file, wanted))
        findings += [not_loaded(f"{place.token} ({place.encoder.key})", said)] if said else []
        read += 0 if said or wanted is None else len(wanted)
    placed = {(place.token, place.encoder.key) for place in places}
    for word in words:
        for key in word.vectors:
            if (word.token, key) not in placed:
                findings.append(not_loaded(f"{word.token} ({key})", "No file of the output has its vectors."))
    vectors = sum(len(vectors) for word in words for vectors in word.vectors.values())
    figures = {"vectors": vectors, "loaded_vectors": read, "files": len(places), "warnings": list(messages)}
    return Rung("fail" if findings else "pass", figures=figures, findings=tuple(findings[:MOST_FINDINGS]))


def _host(places: Sequence[Placement]) -> Any:
    """What diffusers' loader needs of a pipeline, and no more: the text encoders' tables, and tokenizers."""
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    class Host(TextualInversionLoaderMixin):  # type: ignore[misc]
        hf_device_map = None
        components: Mapping[str, Any] = {}

    host = Host()
    vocabulary = bases.folder("tiny-sd15") / "tokenizer"
    for encoder in {place.encoder.component: place.encoder for place in places}.values():
        tokenizer = CLIPTokenizer.from_pretrained(str(vocabulary))
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=encoder.width,
            intermediate_size=1,
            projection_dim=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            setattr(host, encoder.component, CLIPTextModel(config))
        setattr(host, encoder.tokenizer, tokenizer)
    return host


def _as_stored(file: Path, wanted: Array) -> Array:
    """The source's vectors in the dtype of the file, to which `convert` may have rounded them."""
    with opened(file) as source:
        dtypes = {tensor.dtype for tensor in source.header.tensors.values()}
    with np.errstate(over="ignore"):
        return wanted.astype(numpy_dtype(dtypes.pop())) if len(dtypes) == 1 else wanted


def _wrong(host: Any, place: Placement, wanted: Array | None) -> str | None:
    """What is wrong with the vectors that a prompt with the token gets; None if nothing is."""
    if wanted is None:
        return "It is in the output, but not in the source."
    tokenizer, model = getattr(host, place.encoder.tokenizer), getattr(host, place.encoder.component)
    before, after = (len(tokenizer(text).input_ids) - 1 for text in _MIDDLE.split("{}"))
    ids = tokenizer(host.maybe_convert_prompt(_MIDDLE.format(place.token), tokenizer)).input_ids[before:-after]
    found = model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long)).detach()
    if len(ids) != len(wanted):
        return f"A prompt with its token reads {counted(len(ids), 'vector')}; there are {len(wanted)}."
    expected = torch.from_numpy(wanted.astype(np.float64)).to(found.dtype)
    if found.shape != expected.shape:
        return f"Its vectors have {expected.shape[-1]} numbers, and the encoder takes {found.shape[-1]}."
    off = [number for number, (one, other) in enumerate(zip(found, expected, strict=True), 1) if not one.equal(other)]
    if off:
        return f"Of {counted(len(wanted), 'vector')} that arrived {len(off)} are others, the first number {off[0]}."
    return None


# --- the rung `picture` -----------------------------------------------------------------------------------------------


class EmbeddingProof(PictureProof):
    """What is drawn for a source of embeddings. A prompt without any of their tokens has one in its negative prompt."""

    def __init__(self, *arguments: Any, words: Sequence[Word], family: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.words, self.family = tuple(words), family

    def settings_of(self, k: int) -> Settings:
        """How picture k is drawn. Tokens stand in prompts as the output spells them: in other capitals the pipeline's
        loader reads one vector of several.
        """
        settings = super().settings_of(k)
        for word in self.words:
            pieces = _standing(word.token).split(settings.prompt)
            settings = replace(settings, prompt=word.token.join(pieces))
        if any(_standing(word.token).search(settings.prompt) for word in self.words):
            return settings
        return replace(settings, negative_prompt=self.words[k % len(self.words)].token)

    def with_source(
        self, *, disturbance: float = 0.0, roundoff: float = 0.0, seed: int = 0
    ) -> AbstractContextManager[Any]:
        """The base reading the source's vectors by their definition."""
        random = np.random.default_rng(seed)
        noise = max(disturbance, roundoff)
        return spelled_out(self.pipeline, self.family, [_noisy(word, noise, random) for word in self.words])

    def converted(self, output: str | Path) -> Drawn:
        """Draw with files as the pipeline's own loader loads them."""
        with loaded(self.pipeline, placements(Path(output), self.family)):
            return self.draw()


def _noisy(word: Word, noise: float, random: np.random.Generator) -> Word:
    """The vectors with noise of that relative norm each."""

    def disturbed(vectors: Array) -> Array:
        wide = vectors.astype(np.float64)
        norms = np.linalg.norm(wide, axis=-1, keepdims=True) / np.sqrt(max(wide.shape[-1], 1))
        disturbed_vectors: Array = wide + noise * norms * random.standard_normal(wide.shape)
        return disturbed_vectors

    return Word(word.token, {key: disturbed(vectors) for key, vectors in word.vectors.items()}) if noise else word


@contextlib.contextmanager
def loaded(pipeline: Any, places: Sequence[Placement]) -> Iterator[Any]:
    """The pipeline with files loaded by its own loader, for the length of a block; afterwards it is what it was.

    Raises FileError where the loader raises.
    """
    encoders = {place.encoder.component: place.encoder for place in places}.values()
    tokenizers = {encoder.tokenizer: getattr(pipeline, encoder.tokenizer) for encoder in encoders}
    tables = [_Table(getattr(pipeline, encoder.component)) for encoder in encoders]
    try:
        for name, tokenizer in tokenizers.items():
            setattr(pipeline, name, copy.deepcopy(tokenizer))
        with collected_warnings(), torch.random.fork_rng(devices=[]):  # the loader fills new rows with noise first
            for place in places:
                load_one(pipeline, place)
        for encoder in encoders:
            _find_ends(getattr(pipeline, encoder.component), tokenizers[encoder.tokenizer])
        yield pipeline
    except LoadingError as error:
        raise FileError([not_loaded("", f"The loader failed: {error}.")]) from error
    finally:
        for name, tokenizer in tokenizers.items():
            setattr(pipeline, name, tokenizer)
        for table in tables:
            table.restore()


class _Table:
    """A text encoder's table of tokens, in whose place a copy is, for the loader to write into."""

    def __init__(self, model: Any) -> None:
        self._model, self._own = model, model.get_input_embeddings()
        self._size, self._told = model.config.vocab_size, "vocab_size" in vars(model)
        self._end = getattr(_pooling(model), "eos_token_id", None)
        model.set_input_embeddings(copy.deepcopy(self._own))

    def restore(self) -> None:
        """Put it back, and the size that the model has it down as."""
        self._model.set_input_embeddings(self._own)
        self._model.config.vocab_size = self._size
        if self._end is not None:
            _pooling(self._model).eos_token_id = self._end
        if self._told:
            self._model.vocab_size = self._size
        else:
            vars(self._model).pop("vocab_size", None)


def _pooling(model: Any) -> Any:
    """The part of a text encoder that takes the pooled output."""
    return getattr(model, "text_model", model)


def _find_ends(model: Any, tokenizer: Any) -> None:
    """Have the pooled output taken at the end of the text, as the record's snippet does for SDXL.

    With the old configuration that its encoders have, transformers takes it at the largest id, which is a token's that
    the loader has added (https://github.com/huggingface/transformers/issues/24650).
    """
    if getattr(_pooling(model), "eos_token_id", None) == _OLD_END:
        _pooling(model).eos_token_id = tokenizer.eos_token_id


@contextlib.contextmanager
def spelled_out(pipeline: Any, family: str, words: Sequence[Word]) -> Iterator[Any]:
    """The pipeline with prompts encoded by the definition of textual inversion (Gal et al. 2022, arXiv:2208.01618): in
    the place of a token its vectors go into the text encoder, as if they stood in its table.

    Pieces of a prompt are tokenized one by one with the untouched tokenizer. Which hidden state counts is as the
    pipeline's own `encode_prompt` has it.
    """
    pipeline.encode_prompt = functools.partial(_encode_prompts, pipeline, EMBEDDING_FAMILIES[family], tuple(words))
    try:
        yield pipeline
    finally:
        del pipeline.encode_prompt


def _encode_prompts(
    pipeline: Any, encoders: Sequence[TextEncoder], words: Sequence[Word], *arguments: Any, **options: Any
) -> tuple[torch.Tensor, ...]:
    """In the place of `encode_prompt`: embeddings of prompt and negative prompt; for two encoders the pooled ones."""
    asked = inspect.signature(type(pipeline).encode_prompt).bind(pipeline, *arguments, **options).arguments
    texts = [asked["prompt"], asked.get("negative_prompt")]
    prompt, negative = (encode(pipeline, encoders, words, text) for text in texts)
    if len(encoders) == 1:
        return prompt[0], negative[0]
    return prompt[0], negative[0], prompt[1], negative[1]


def encode(
    pipeline: Any, encoders: Sequence[TextEncoder], words: Sequence[Word], texts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of some prompts, (prompts, 77, width of all encoders), and the last encoder's pooled output."""
    states = []
    for encoder in encoders:
        model, tokenizer = getattr(pipeline, encoder.component), getattr(pipeline, encoder.tokenizer)
        rows = [_pieces(text, tokenizer, words, encoder.key) for text in texts]
        ids = torch.tensor([[token if isinstance(token, int) else 0 for token in row] for row in rows])

        def insert(table: Any, given: Any, output: torch.Tensor, rows: Sequence[Sequence[Any]] = rows) -> torch.Tensor:
            changed = output.clone()
            for row, tokens in zip(changed, rows, strict=True):
                for place, token in enumerate(tokens):
                    if not isinstance(token, int):
                        row[place] = torch.from_numpy(token).to(output.dtype).to(output.device)
            return changed

        hook = model.get_input_embeddings().register_forward_hook(insert)
        try:
            out = model(ids.to(model.device), output_hidden_states=True)
        finally:
            hook.remove()
        states.append((out[0] if len(encoders) == 1 else out.hidden_states[-2], out[0]))
    return torch.cat([state for state, _ in states], dim=-1), states[-1][1]


def _pieces(text: str, tokenizer: Any, words: Sequence[Word], key: str) -> list[Any]:
    """The prompt as ids and vectors, as many as the encoder reads."""
    known = {word.token.lower(): word.vectors[key].astype(np.float64) for word in words if key in word.vectors}
    inside: list[Any] = []
    pattern = "|".join(_standing(token).pattern for token in sorted(known, key=len, reverse=True))
    for piece in re.split(f"({pattern})", text, flags=re.IGNORECASE) if known else [text]:
        vectors = known.get(piece.lower())
        inside += tokenizer(piece, add_special_tokens=False).input_ids if vectors is None else list(vectors)
    longest = int(tokenizer.model_max_length)
    row = [tokenizer.bos_token_id, *inside[: longest - 2], tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (longest - len(row))


def _standing(token: str) -> re.Pattern[str]:
    """A token that is no part of a longer word."""
    letters = [sign for sign in token if not unicodedata.category(sign).startswith("M")] or token
    before, after = (
        # scripts without blanks have no words to be whole
        ("(?!)" if unicodedata.east_asian_width(sign) in "WF" else r"\w") if re.match(r"\w", sign) else re.escape(sign)
        for sign in (letters[0], letters[-1])
    )
    return re.compile(f"(?<!{before}){re.escape(token)}(?!{after})", re.IGNORECASE)
