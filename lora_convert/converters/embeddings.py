"""Embeddings: which file the vectors of each text encoder go to, and how the files are written.

Diffusers takes one token per file and one file per text encoder (`load_textual_inversion`); ComfyUI, A1111 and Kohya's
scripts take one file with all text encoders, named as the token.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lora_convert._version import __version__
from lora_convert.containers import Source
from lora_convert.containers.dtypes import numpy_dtype
from lora_convert.containers.folder import embedding_files
from lora_convert.converters.metadata import PROVENANCE, UNKNOWN, with_hashes, write_final_header
from lora_convert.converters.plan import EmbeddingStep, Options, OutputFile, OutputTensor, Plan, written_dtype
from lora_convert.converters.tokens import named_embeddings
from lora_convert.converters.writer import RESERVED, header_bytes
from lora_convert.families.encoders import EMBEDDING_FAMILIES, WITHOUT_LOADER, TextEncoder, title_of
from lora_convert.inspect.detection import Detection, Embedding
from lora_convert.inspect.embedding_forms import MOST_READ
from lora_convert.report import Finding, counted, printable, severest, shown

__all__ = [
    "STEM",
    "called_by_files",
    "embedding_files",
    "embedding_paths",
    "embedding_plan",
    "encoder_of",
    "misplaced",
    "read_vectors",
    "slug_of",
    "with_embeddings",
    "write_embeddings",
]

Array = NDArray[Any]

STEM = "learned_embeds"
"""How the names of files for Diffusers begin."""

_MOST_BYTES = 100
"""Of a token in a file's name; names have at most 255 bytes, some of which are others'."""

_UNFIT = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
"""Characters that file names cannot have on some system."""

_KEPT_EXTRAS = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")


def read_vectors(source: Source, embedding: Embedding) -> dict[str, Array]:
    """The vectors of an embedding by text encoder, each (count, width) in the file's dtype. Raises FileError."""
    return {key: source.read(part.tensor).reshape(part.count, part.width) for key, part in embedding.vectors.items()}


# --- the plan ---------------------------------------------------------------------------------------------------------


def embedding_plan(detection: Detection, options: Options) -> Plan:
    """The plan of an embedding file."""
    findings = detection.findings
    if options.to == "peft":
        said = Finding("unsupported-kind", "error", "", "peft has no form for embeddings.", "Leave --to peft out.")
        findings = (*findings, said)
    if options.truncates:
        message = "An embedding has no rank that could be cut."
        said = Finding("unsupported-kind", "error", "", message, "Leave --rank and --max-error out.")
        findings = (*findings, said)
    return with_embeddings(_judged(Plan(detection.file, "planned", detection, options, findings=findings)))


_NOT_DOABLE = frozenset({"unsupported-kind", "unknown-width"})
"""Errors of files that are sound, but of a kind that has no form as an embedding."""

_GRAVE = frozenset({"not-finite", "unknown-width", "unsupported-kind"})
"""What `inspect` warns of and what cannot be converted."""


def _judged(planned: Plan) -> Plan:
    """The plan, refused or failed for what `inspect` found."""
    findings = tuple(
        replace(finding, severity="error") if finding.name in _GRAVE else finding for finding in planned.findings
    )
    wrong = {finding.name for finding in findings if finding.severity == "error"}
    status = ("refused" if wrong <= _NOT_DOABLE else "failed") if wrong else planned.status
    return replace(planned, status=status, findings=findings)


def with_embeddings(planned: Plan) -> Plan:
    """The plan with the embeddings of its file: their files come behind those of the modules."""
    if not planned.detection.embeddings or not (planned := _judged(planned)).ok:
        return planned
    options = planned.options
    named, findings = named_embeddings(planned.detection, options)
    steps, outputs = [], list(planned.outputs)
    for number, (embedding, token) in enumerate(named):
        arranged = _arranged(planned.detection, embedding, options)
        slug, taken = slug_of(token) or f"{number + 1}", {_on_disk(output.path) for output in outputs}
        files = _files(planned, slug, len(named) > 1, arranged, taken)
        tensors: dict[str, OutputTensor] = {}
        for suffix, encoders in arranged.items():
            held = {key: _tensor(embedding, key, called, token, len(outputs), options) for key, called in encoders}
            tensors |= held
            outputs.append(OutputFile(files[suffix], tuple(sorted(held.values(), key=lambda tensor: tensor.name))))
        steps.append(EmbeddingStep(embedding, token, tensors))
    findings += _remarks(planned.detection, options, steps)
    status = "failed" if severest(findings) == "error" else planned.status
    found = (*planned.findings, *findings)
    return replace(planned, status=status, outputs=tuple(outputs), embeddings=tuple(steps), findings=found)


def encoder_of(detection: Detection, embedding: Embedding, key: str) -> TextEncoder | None:
    """Where a pipeline has the text encoder; None if that depends on a base model that is not known."""
    width = embedding.vectors[key].width
    families = [detection.family] if detection.family in EMBEDDING_FAMILIES else list(EMBEDDING_FAMILIES)
    if detection.family is None and detection.rivals:
        families = [rival.family for rival in detection.rivals]
    found = {
        (encoder.key, encoder.component): encoder
        for family in families
        for encoder in EMBEDDING_FAMILIES[family or ""]
        if encoder.width == width and (encoder.key == key or detection.family is None)
    }
    return next(iter(found.values())) if len(found) == 1 else None


def _arranged(detection: Detection, embedding: Embedding, options: Options) -> dict[str, list[tuple[str, str]]]:
    """For every file, by the suffix of its name: keys of text encoders, and what their tensors are called ("" for the
    token).
    """
    keys = list(embedding.vectors)
    if options.joins:
        alone = len(EMBEDDING_FAMILIES.get(detection.family or "", ())) == 1
        return {"": [(keys[0], "emb_params")] if len(keys) == 1 and alone else [(key, key) for key in keys]}
    arranged = {}
    for key in sorted(keys, key=lambda key: _suffix(detection, embedding, key)):
        arranged[_suffix(detection, embedding, key)] = [(key, "")]
    return arranged


def misplaced(detection: Detection, embedding: Embedding) -> list[str]:
    """The text encoders whose vectors the file has, though by its name for Diffusers it is another one's."""
    named = re.match(rf"{STEM}(_\d)?[-.]", PurePath(detection.file).name)
    if named is None:
        return []
    own = [key for key, part in embedding.vectors.items() if part.tensor == embedding.token]  # not ComfyUI's `clip_g`
    encoders = {key: encoder_of(detection, embedding, key) for key in own}
    return [key for key, encoder in encoders.items() if encoder and encoder.suffix != (named[1] or "")]


def _suffix(detection: Detection, embedding: Embedding, key: str) -> str:
    encoder = encoder_of(detection, embedding, key)
    return encoder.suffix if encoder else ""


def _tensor(embedding: Embedding, key: str, called: str, token: str, file: int, options: Options) -> OutputTensor:
    part = embedding.vectors[key]
    dtype = written_dtype(part.dtype, options.dtype)
    return OutputTensor(called or token, dtype, (part.count, part.width), key, file)


def _files(planned: Plan, slug: str, several: bool, suffixes: Iterable[str], taken: set[str]) -> dict[str, str]:
    """By the suffix of a text encoder, the name of its file: the first that no other file has."""
    beside_modules = [f"{slug}_embedding"] if planned.steps else []
    for name in chain([slug], beside_modules, (f"{slug}_{number}" for number in count(2))):
        if planned.options.joins:
            files = dict.fromkeys(suffixes, f"{name}.safetensors")
        else:
            files = {suffix: f"{STEM}{suffix}{f'-{name}' if several else ''}.safetensors" for suffix in suffixes}
        if taken.isdisjoint(map(_on_disk, files.values())):
            return files
    raise AssertionError("unreachable")


def _on_disk(name: str) -> str:
    """What names of files have in common that are one file on some system."""
    return unicodedata.normalize("NFC", name).casefold()


def slug_of(token: str) -> str:
    """A token as a part of a file's name; never a path, and a name on every system."""
    text = _UNFIT.sub("", printable(token)).strip(". ").encode()[:_MOST_BYTES].decode(errors="ignore").rstrip(". ")
    return f"_{text}" if RESERVED.fullmatch(text) else text


def embedding_paths(planned: Plan, out: Path) -> list[Path]:
    """The places of the embeddings' files where `out` names a file: that one if there is no other, or beside it."""
    outputs = planned.outputs[planned.module_files :]
    if not planned.module_files and len(outputs) == 1:
        return [out]
    if not planned.module_files and not planned.options.joins:
        return [out.with_name(output.path.replace(STEM, out.stem, 1)) for output in outputs]
    return [out.with_name(f"{out.stem}_{output.path}") for output in outputs]


def called_by_files(planned: Plan, *, asked: bool) -> Plan:
    """The plan with what is to be said where files have other names than tokens, since their readers go by the names;
    `asked` if a user gave the names.
    """
    findings = []
    for step in planned.embeddings if planned.options.joins else ():
        file = planned.outputs[next(iter(step.outputs.values())).file]
        name, subject = PurePath(file.path).stem, step.source.tensors[0]
        if name == step.token:
            continue
        if asked:
            message = f"A1111 and ComfyUI call it by the file's name, {shown(name)}, and not {shown(step.token)}."
            findings.append(Finding("token-differs", "note", subject, message))
        else:
            message = f"No file here can have the name {shown(step.token)}; {shown(name)} is then the word to prompt."
            findings.append(Finding("token-renamed", "warning", subject, message))
    return replace(planned, findings=(*planned.findings, *findings))


def _remarks(detection: Detection, options: Options, steps: Sequence[EmbeddingStep]) -> list[Finding]:
    """What is to be said of the vectors as they are written."""
    findings = []
    for step in steps:
        embedding, subject = step.source, next(iter(step.source.tensors), "")
        if not options.joins and any(encoder_of(detection, embedding, key) is None for key in embedding.vectors):
            families = " or ".join(rival.family for rival in detection.rivals) or "FAMILY"
            message = "Which text encoder the vectors are for depends on the base model, which the file does not name."
            findings.append(Finding("ambiguous-family", "error", subject, message, f"Name it: --family {families}."))
        if embedding.count > MOST_READ:
            message = f"A prompt has room for {MOST_READ} of its {embedding.count} vectors; the others have no effect."
            findings.append(Finding("prompt-truncated", "warning", subject, message))
        retyped = {(embedding.vectors[key].dtype, tensor.dtype) for key, tensor in step.outputs.items()}
        for before, after in sorted(pair for pair in retyped if pair[0] != pair[1]):
            why = "as asked" if options.dtype else f"because Diffusers has no use for {before}"
            message = f"Its vectors go from {before} to {after}, {why}."
            findings.append(Finding("dtype-changed", "note", subject, message))
    if detection.family in WITHOUT_LOADER and not options.joins:
        message = f"The pipeline of {title_of(detection.family or '')} in Diffusers has no load_textual_inversion."
        findings.append(Finding("not-for-diffusers", "warning", "", message, "--to comfy writes the file for ComfyUI."))
    return findings


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Content:
    """An output file's tensors in file order, with their values."""

    output: OutputFile
    values: tuple[Array, ...]
    step: EmbeddingStep
    keys: tuple[str, ...]


def write_embeddings(
    planned: Plan, source: Source, files: Sequence[BinaryIO], source_sha256: Callable[[], str]
) -> list[Finding]:
    """Write the embeddings' files; `files` are those of the plan, open. Returns errors of the values."""
    findings: list[Finding] = []
    for content in _contents(planned, source, findings):
        file = files[content.step.outputs[content.keys[0]].file]
        metadata = with_hashes(_metadata(planned, content, source), UNKNOWN)
        file.seek(len(header_bytes(content.output.tensors, metadata)))
        for values in content.values:
            file.write(values.tobytes())
        write_final_header(file, content.output.tensors, metadata, source_sha256)
    return findings


def _contents(planned: Plan, source: Source, findings: list[Finding]) -> Iterator[_Content]:
    for step in planned.embeddings:
        vectors = read_vectors(source, step.source)
        by_file: dict[int, list[str]] = {}
        for key, tensor in step.outputs.items():
            by_file.setdefault(tensor.file, []).append(key)
        for number, keys in by_file.items():
            keys.sort(key=lambda key: step.outputs[key].name)
            arrays = tuple(_cast(vectors[key], step.outputs[key], step, findings) for key in keys)
            yield _Content(planned.outputs[number], arrays, step, tuple(keys))


def _cast(values: Array, tensor: OutputTensor, step: EmbeddingStep, findings: list[Finding]) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.ascontiguousarray(values.astype(numpy_dtype(tensor.dtype)))
    lost = int(np.count_nonzero(np.isfinite(values.astype(np.float64)) & ~np.isfinite(cast.astype(np.float64))))
    if lost:
        message = f"{counted(lost, 'value')} of {shown(step.token)} do not fit {tensor.dtype}."
        name = step.source.vectors[tensor.role].tensor
        findings.append(Finding("overflow", "error", name, message, "--dtype fp32 or bf16 holds them."))
    return cast


def _metadata(planned: Plan, content: _Content, source: Source) -> dict[str, str]:
    """The header's metadata: what the source says, and what this file is. Hashes are filled in later."""
    detection, step = planned.detection, content.step
    own = (*(f"{PROVENANCE}{name}" for name in ("token", "encoder", "family", "trainer")), "lora_adapter_metadata")
    kept = {key: text for key, text in source.header.metadata.items() if key not in own}
    kept = {key: text for key, text in kept.items() if not key.startswith(PROVENANCE)}
    kept |= {name: source.header.extras[name] for name in _KEPT_EXTRAS if name in source.header.extras}
    kept["format"] = "pt"
    kept[f"{PROVENANCE}version"] = __version__
    kept[f"{PROVENANCE}source_sha256"] = ""
    kept[f"{PROVENANCE}token"] = step.token
    kept[f"{PROVENANCE}encoder"] = ",".join(content.keys)
    if step.token != step.source.token:
        kept[f"{PROVENANCE}source_token"] = step.source.token
    for name, text in (("family", detection.family), ("trainer", detection.trainer)):
        if text:
            kept[f"{PROVENANCE}{name}"] = text
    # names in pickles and pictures may hold halves of surrogate pairs, which safetensors cannot
    return {key: text.encode(errors="backslashreplace").decode() for key, text in sorted(kept.items())}
