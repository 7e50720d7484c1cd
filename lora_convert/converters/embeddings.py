"""Embeddings: what they are called, which file each text encoder's vectors go to, and the record beside them.

Diffusers takes one token per file and one file per text encoder (`load_textual_inversion`); ComfyUI, A1111 and Kohya's
scripts take one file with all text encoders, named as the token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lora_convert._version import __version__
from lora_convert.containers import Source
from lora_convert.containers.dtypes import KEPT_AS, numpy_dtype
from lora_convert.containers.folder import embedding_files
from lora_convert.converters.metadata import PROVENANCE, Hashes, with_hashes
from lora_convert.converters.plan import DTYPES, EmbeddingStep, Options, OutputFile, OutputTensor, Plan
from lora_convert.converters.writer import header_bytes
from lora_convert.families.encoders import EMBEDDING_FAMILIES, TextEncoder, title_of
from lora_convert.hashes import content_hashes
from lora_convert.inspect.detection import Detection, Embedding
from lora_convert.report import SCHEMA, Finding, counted, listed, printable, severest, shown

__all__ = [
    "embedding_files",
    "embedding_paths",
    "embedding_plan",
    "read_vectors",
    "record_of",
    "record_path",
    "with_embeddings",
    "write_embeddings",
]

Array = NDArray[Any]

_STEM = "learned_embeds"
_MOST_READ = 75
"""Vectors that a prompt has room for, beside the tokens that begin and end it."""

_UNFIT = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
"""Characters that file names cannot have on some system."""

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_KEPT_EXTRAS = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")
_WITHOUT_LOADER = ("sd3",)
"""Base models whose Diffusers pipeline has no `load_textual_inversion`."""


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
    return with_embeddings(_judged(Plan(detection.file, "planned", detection, options, findings=findings)))


_NOT_DOABLE = frozenset({"unsupported-kind", "unknown-width"})
"""Errors of files that are sound, but of a kind that has no form as an embedding."""

_GRAVE = frozenset({"not-finite", "unknown-width"})
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
    named, findings = _named(planned.detection, options)
    steps, outputs = [], list(planned.outputs)
    for number, (embedding, token) in enumerate(named):
        files = _files(planned, token, len(named) > 1, {output.path.lower() for output in outputs}, number)
        tensors: dict[str, OutputTensor] = {}
        for name, encoders in _arranged(planned.detection, embedding, options).items():
            held = {key: _tensor(embedding, key, called, token, len(outputs), options) for key, called in encoders}
            tensors |= held
            outputs.append(OutputFile(files(name), tuple(sorted(held.values(), key=lambda tensor: tensor.name))))
        steps.append(EmbeddingStep(embedding, token, tensors))
    findings += _remarks(planned.detection, options, steps, outputs)
    status = "failed" if severest(findings) == "error" else planned.status
    found = (*planned.findings, *findings)
    return replace(planned, status=status, outputs=tuple(outputs), embeddings=tuple(steps), findings=found)


def _is_single(options: Options) -> bool:
    """Whether all text encoders go into one file."""
    return options.to not in ("diffusers", "peft")


def _encoder(detection: Detection, embedding: Embedding, key: str) -> TextEncoder | None:
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
    if _is_single(options):
        alone = len(EMBEDDING_FAMILIES.get(detection.family or "", ())) == 1
        return {"": [(keys[0], "emb_params")] if len(keys) == 1 and alone else [(key, key) for key in keys]}
    arranged = {}
    for key in sorted(keys, key=lambda key: _suffix(detection, embedding, key)):
        arranged[_suffix(detection, embedding, key)] = [(key, "")]
    return arranged


def _suffix(detection: Detection, embedding: Embedding, key: str) -> str:
    encoder = _encoder(detection, embedding, key)
    return encoder.suffix if encoder else ""


def _tensor(embedding: Embedding, key: str, called: str, token: str, file: int, options: Options) -> OutputTensor:
    part = embedding.vectors[key]
    dtype = DTYPES[options.dtype] if options.dtype else KEPT_AS.get(part.dtype, part.dtype)
    return OutputTensor(called or token, dtype, (part.count, part.width), key, file)


def _files(planned: Plan, token: str, several: bool, taken: set[str], number: int) -> Any:
    """A function from the suffix of a text encoder to the name of its file."""
    slug = _slug(token) or f"{number + 1}"
    if _is_single(planned.options):
        name = f"{slug}.safetensors"
        return lambda suffix: name if name.lower() not in taken else f"{slug}_embedding.safetensors"
    return lambda suffix: f"{_STEM}{suffix}{f'-{slug}' if several else ''}.safetensors"


def _slug(token: str) -> str:
    """A token as a part of a file's name; never a path, and a name on every system."""
    text = _UNFIT.sub("", printable(token)).strip(". ")[:100]
    return f"_{text}" if _RESERVED.fullmatch(text) else text


def embedding_paths(planned: Plan, out: Path) -> list[Path]:
    """The places of the embeddings' files where `out` names a file: that one if there is no other, or beside it."""
    outputs = planned.outputs[planned.module_files :]
    if not planned.module_files and len(outputs) == 1:
        return [out]
    if not planned.module_files and not _is_single(planned.options):
        return [out.with_name(output.path.replace(_STEM, out.stem, 1)) for output in outputs]
    return [out.with_name(f"{out.stem}_{output.path}") for output in outputs]


# --- tokens -----------------------------------------------------------------------------------------------------------


def _named(detection: Detection, options: Options) -> tuple[list[tuple[Embedding, str]], list[Finding]]:
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
        token, remarks = _token(embedding, given_token, not _is_single(options))
        findings += remarks
        named.append((embedding, token))
    twice = sorted({token for _, token in named if [other.lower() for _, other in named].count(token.lower()) > 1})
    if twice and severest(findings) != "error":
        message = f"Several embeddings have the name {shown(twice[0])}."
        findings.append(Finding("duplicate-module", "error", "", message, "Name them with --token, once for each."))
    return named, findings


def _token(embedding: Embedding, given: str | None, lowers: bool) -> tuple[str, list[Finding]]:
    findings = []
    token = embedding.token if given is None else given
    subject = next(iter(embedding.tensors), "")
    if given is None and not embedding.stated and token:
        message = f"The file names no token, so it gets the file's own name: {shown(token)}."
        findings.append(Finding("token-from-name", "note", subject, message, "--token gives it another."))
    typed = "".join(character for character in token if printable(character) == character and character not in "/\\")
    typed = typed.strip(". ") if typed != token else token
    if not typed.strip():
        message = "Neither the file nor its name gives a token."
        return "", [Finding("token-missing", "error", subject, message, "Name it: --token WORD.")]
    if typed != token:
        message = (
            f"The token {shown(repr(token))} cannot be typed into a prompt, or looks like a path: {typed!r} it is."
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


def _other_name(detection: Detection, embedding: Embedding) -> Finding | None:
    """The note that A1111 calls a file of its own by the file's name, not by the name inside it."""
    path = PurePath(detection.file)
    called = detection.file.startswith("<") or path.suffix.lower() in (
        ".png",
        ".webp",
    )  # pictures go by the name inside
    if called or detection.trainer != "a1111" or path.stem.lower() == embedding.token.lower():
        return None
    message = f"A1111 calls it by the file's name, {shown(path.stem)}, and not by the {shown(embedding.token)} inside."
    return Finding("token-differs", "note", "", message, f"--token {shown(path.stem)} keeps that name.")


def _remarks(
    detection: Detection, options: Options, steps: Sequence[EmbeddingStep], outputs: Sequence[OutputFile]
) -> list[Finding]:
    """What is to be said of the files as they are written."""
    findings = []
    for step in steps:
        embedding, subject = step.source, next(iter(step.source.tensors), "")
        if not _is_single(options) and any(_encoder(detection, embedding, key) is None for key in embedding.vectors):
            families = " or ".join(rival.family for rival in detection.rivals) or "FAMILY"
            message = "Which text encoder the vectors are for depends on the base model, which the file does not name."
            findings.append(Finding("ambiguous-family", "error", subject, message, f"Name it: --family {families}."))
        name = PurePath(outputs[next(iter(step.outputs.values())).file].path).stem
        if _is_single(options) and name != step.token:
            message = f"Files cannot have the name {shown(step.token)}; it is {name}, which is then the word to prompt."
            findings.append(Finding("token-renamed", "warning", subject, message))
        if embedding.count > _MOST_READ:
            message = f"A prompt has room for {_MOST_READ} of its {embedding.count} vectors; the others have no effect."
            findings.append(Finding("prompt-truncated", "warning", subject, message))
        retyped = {(embedding.vectors[key].dtype, tensor.dtype) for key, tensor in step.outputs.items()}
        for before, after in sorted(pair for pair in retyped if pair[0] != pair[1]):
            why = "as asked" if options.dtype else f"because Diffusers has no use for {before}"
            message = f"Its vectors go from {before} to {after}, {why}."
            findings.append(Finding("dtype-changed", "note", subject, message))
    if detection.family in _WITHOUT_LOADER and not _is_single(options):
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


def write_embeddings(planned: Plan, source: Source, files: Sequence[BinaryIO], sha256: str) -> list[Finding]:
    """Write the embeddings' files; `files` are those of the plan, open. Returns errors of the values."""
    findings: list[Finding] = []
    for content in _contents(planned, source, findings):
        metadata = _metadata(planned, content, source)
        data = b"".join(values.tobytes() for values in content.values)
        tensors, legacy = content_hashes(header_bytes(content.output.tensors, {}), data)
        final = with_hashes(metadata, Hashes(tensors, legacy, sha256))
        file = files[next(iter(content.step.outputs[key] for key in content.keys)).file]
        file.write(header_bytes(content.output.tensors, final))
        file.write(data)
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
    return dict(sorted(kept.items()))


# --- the record -------------------------------------------------------------------------------------------------------


def record_path(planned: Plan) -> Path | None:
    """Where the record of the embeddings goes: beside their files; None if there is none."""
    if not planned.embeddings or _is_single(planned.options):
        return None
    first = next(iter(planned.embeddings[0].outputs.values())).file
    path = Path(planned.outputs[first].path)
    stem = _STEM if path.name.startswith(_STEM) else path.stem
    return path.with_name(f"{stem}.json")


def record_of(planned: Plan, sha256: str) -> dict[str, Any]:
    """What the record says: which file goes to which text encoder, and how to load them."""
    entries, lines = [], ['folder = "."  # where this record is']
    for step in planned.embeddings:
        files = []
        for key, tensor in step.outputs.items():
            encoder = _encoder(planned.detection, step.source, key)
            assert encoder is not None
            name = PurePath(planned.outputs[tensor.file].path).name
            files.append(
                {
                    "file": name,
                    "encoder": key,
                    "component": encoder.component,
                    "tokenizer": encoder.tokenizer,
                    "vectors": step.source.count,
                    "width": encoder.width,
                }
            )
            lines.append(_loading(name, step.token, encoder))
        entries.append({"token": step.token, "vectors": step.source.count, "files": files})
    lines.append(f"image = pipe({_prompt(planned)}).images[0]")
    loads = planned.detection.family not in _WITHOUT_LOADER
    return {
        "schema": SCHEMA,
        "source": PurePath(planned.file).name,
        "sha256": sha256,
        "family": planned.detection.family,
        "embeddings": entries,
        "snippet": "\n".join(lines) if loads else None,
    }


def _loading(name: str, token: str, encoder: TextEncoder) -> str:
    """A line of Python that loads one file onto `pipe`."""
    where = json.dumps(name, ensure_ascii=False)[1:-1].replace("{", "{{").replace("}", "}}")
    line = f'pipe.load_textual_inversion(f"{{folder}}/{where}", token={json.dumps(token, ensure_ascii=False)}'
    if encoder.suffix:
        line += f", text_encoder=pipe.{encoder.component}, tokenizer=pipe.{encoder.tokenizer}"
    return f"{line})"


def _prompt(planned: Plan) -> str:
    return json.dumps(f"a picture of {', '.join(step.token for step in planned.embeddings)}", ensure_ascii=False)
