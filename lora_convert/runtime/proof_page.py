"""A proof's report: what the rungs said, the pictures and every module, put together for the page."""

from __future__ import annotations

import contextlib
import math
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_convert._version import __version__
from lora_convert.converters.adapters import Form, form_of
from lora_convert.converters.base import open_base
from lora_convert.converters.convert import ValidateResult
from lora_convert.converters.embeddings import read_vectors
from lora_convert.converters.fidelity import module_figures
from lora_convert.converters.writer import atomic_file
from lora_convert.families.encoders import title_of, usual_norm
from lora_convert.hashes import sha256_of
from lora_convert.report import counted
from lora_convert.runtime.comparing import AMPLIFICATION, compare, difference_map
from lora_convert.runtime.embedding_proof import words_of
from lora_convert.runtime.page import (
    EmbeddingRow,
    FileRecord,
    ModuleRow,
    PromptPictures,
    ReportPage,
    verdict,
    write_page,
)

if TYPE_CHECKING:
    from lora_convert.runtime.baked import Baked
    from lora_convert.runtime.climb import ProofFiles
    from lora_convert.runtime.picture import Gallery

__all__ = ["write_proof", "write_sheet"]

_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def write_proof(
    path: Path,
    result: ValidateResult,
    files: ProofFiles,
    gallery: Gallery | None,
    asked: Mapping[str, Any],
    *,
    baked: Baked | None = None,
    base: str | Path | None = None,
) -> None:
    """Write the report of a proof as one HTML page. Without a source the output was checked alone.

    `asked` are the options of `lora-convert validate` that say how it was made; `baked` is what was found of a merged
    model; `base` the model whose weights decide what some modules change.
    """
    proved = "merged model" if baked else "converted file"
    status, said = verdict(result.rungs, proved)
    records = list(_records(result, files))
    modules = tuple(_baked_rows(baked) if baked else _rows(result, files, gallery, base))
    embeddings = tuple(_embedding_rows(result, files))
    page = ReportPage(
        title=" → ".join(Path(name).name for name in (result.against, result.file) if name),
        status=status,
        verdict=said,
        summary=_summary(result, len(modules) or sum(len(found.payload) for _, found in files.outputs), embeddings),
        rungs=result.rungs,
        pictures=tuple(_pictures(gallery)) if gallery else (),
        modules=modules,
        embeddings=embeddings,
        findings=result.findings,
        files=records,
        provenance=tuple(_provenance(gallery)),
        command=_command(result, asked, path),
        family=result.family,
        amplification=AMPLIFICATION,
        proved=proved,
    )
    write_page(path, page)


def _records(result: ValidateResult, files: ProofFiles) -> Iterator[FileRecord]:
    """The source, and the output's files by their paths in it if it is a folder."""
    if result.against is not None:
        source = files.source
        yield FileRecord("source", Path(result.against).name, source.reader.size, sha256_of(source.chunks()))
    name = Path(result.file).name
    if not files.outputs:
        yield FileRecord("merged model", name)
    for output, _ in files.outputs:
        path = Path(output.header.path)
        called = name if path.name == name else f"{name}/{path.relative_to(result.file).as_posix()}"
        yield FileRecord("converted", called, output.reader.size, sha256_of(output.chunks()))


def _rows(
    result: ValidateResult, files: ProofFiles, gallery: Gallery | None, base: str | Path | None
) -> Iterator[ModuleRow]:
    """The modules of files that can be read, compared with the source's where there is one."""
    if result.rungs["structure"].status != "pass":
        return
    norms = gallery.base_norms if gallery else {}
    compared = result.against is not None
    headers = {id(module): output.header for output, found in files.outputs for module in found.payload}
    before = {target.name: module for module in files.truth.payload for target in module.modules}
    with contextlib.ExitStack() as opens:
        weights = opens.enter_context(open_base(base)) if base is not None else None
        figures = module_figures(files.outputs, [(files.source, files.truth)] if compared else [], weights)
        for name, module, norm, error in figures:
            kind = module.algorithm
            if name in before and before[name].algorithm != kind:
                kind = f"{before[name].algorithm} → {kind}"
            parts = _parts(form_of(module, headers[id(module)]))
            yield ModuleRow(name, kind, module.rank, module.alpha, norm, error, norms.get(name), parts)


def _embedding_rows(result: ValidateResult, files: ProofFiles) -> Iterator[EmbeddingRow]:
    """The vectors of the outputs' embeddings, compared with the source's where there is one."""
    outputs = [output for output in files.outputs if output[1].embeddings]
    against = [(files.source, files.truth)] if result.against is not None else outputs
    truth = {word.token: word.vectors for word in words_of(outputs, against)}
    for source, found in outputs:
        for embedding in found.embeddings:
            for key, vectors in read_vectors(source, embedding).items():
                wide = vectors.astype(np.float64)
                error = None
                if result.against is not None and key in truth.get(embedding.token, {}):
                    error = _vector_error(truth[embedding.token][key].astype(np.float64), wide)
                yield EmbeddingRow(
                    embedding.token,
                    key,
                    wide.shape[-1],
                    embedding.vectors[key].dtype,
                    tuple(float(norm) for norm in np.linalg.norm(wide, axis=-1)),
                    usual_norm(key, wide.shape[-1]),
                    error,
                )


def _vector_error(theirs: NDArray[Any], ours: NDArray[Any]) -> float:
    """The largest relative error of a vector; infinite where there are not as many."""
    if theirs.shape != ours.shape:
        return math.inf
    norms, distances = np.linalg.norm(theirs, axis=-1), np.linalg.norm(theirs - ours, axis=-1)
    return float(max(np.where(distances == 0, 0.0, distances / np.where(norms == 0, 1.0, norms)), default=0.0))


def _parts(form: Form) -> tuple[str, ...]:
    """What an adapter changes of a module, in words."""
    return tuple(part for part in ("weight", "magnitude", "bias") if getattr(form, part))


def _baked_rows(baked: Baked) -> Iterator[ModuleRow]:
    for row in baked.modules:
        source = row.source
        yield ModuleRow(
            row.name, source.algorithm, source.rank, source.alpha, row.norm, row.error, row.base_norm, row.parts
        )


def write_sheet(path: Path, gallery: Gallery) -> None:
    """Write base alone, reference and converted file side by side as one PNG, a row for every prompt."""
    from lora_convert.runtime.sheets import sheet

    rows = list(zip(*(drawn.images for drawn in gallery.pictures), strict=True))
    prompts = [comparison.prompt for comparison in gallery.comparisons]
    image = sheet(rows, prompts, ("base alone", f"reference: {gallery.reference}", "converted file, loaded"))
    with atomic_file(path) as file:
        image.save(file, "PNG")


def _summary(result: ValidateResult, modules: int, embeddings: Sequence[EmbeddingRow]) -> str:
    passed = [name for name, rung in result.rungs.items() if rung.status == "pass"]
    parts = [counted(modules, "module")] if modules or not embeddings else []
    parts += [counted(sum(len(row.norms) for row in embeddings), "vector")] if embeddings else []
    if result.family:
        parts.append(title_of(result.family))
    if result.worst_delta_error is not None:
        worst, what = result.worst_delta_error, "ΔW" if modules or not embeddings else "vector"
        parts.append(f"worst relative error of a {what} {worst:.1e}" if worst else f"every {what} exact")
    return f"{', '.join(parts)}. Passed: {', '.join(passed) or 'nothing'}."


def _pictures(gallery: Gallery) -> Iterator[PromptPictures]:
    for k, found in enumerate(gallery.comparisons):
        base, reference, converted = (drawn.images[k] for drawn in gallery.pictures)
        yield PromptPictures(
            found.prompt,
            found.seed,
            base,
            reference,
            converted,
            difference_map(reference, converted),
            figures={"latents": found.latents, **asdict(found.pixels), "excess": found.excess},
            passed=found.excess <= 1,
            floor=found.allowed,
            effect={"latents": found.effect, **asdict(compare(base, converted))},
        )


def _provenance(gallery: Gallery | None) -> Iterator[tuple[str, str]]:
    if gallery:
        for name, value in gallery.base.items():
            yield f"base {name}", str(value)
        settings = gallery.settings
        yield "drawn on", f"{gallery.device}, {gallery.dtype}"
        yield "steps", str(settings.steps)
        yield "guidance", f"{settings.guidance:g}"
        yield "first seed", str(settings.seed)
    yield "lora-convert", __version__
    yield "Python", platform.python_version()
    for library in _LIBRARIES:
        yield library, version(library)


def _command(result: ValidateResult, asked: Mapping[str, Any], report: Path) -> str:
    """What repeats the proof; of paths the last part, for where they are is nobody else's business."""
    parts = ["lora-convert validate", shlex.quote(Path(result.file).name)]
    if result.against:
        parts += ["--against", shlex.quote(Path(result.against).name)]
    for name, value in asked.items():
        for said in value if isinstance(value, tuple | list) else [value]:
            if said is not None:
                parts += [f"--{name}", shlex.quote(Path(said).name if isinstance(said, Path) else f"{said}")]
    return " ".join([*parts, "--report", shlex.quote(report.name)])
