"""A proof's report: what the rungs said, the pictures and every module, put together for the page."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lora_convert._version import __version__
from lora_convert.containers import Source
from lora_convert.converters.convert import ValidateResult
from lora_convert.converters.fidelity import module_figures
from lora_convert.converters.writer import atomic_file
from lora_convert.families import FAMILIES
from lora_convert.hashes import sha256_of
from lora_convert.inspect.detection import Detection
from lora_convert.report import counted
from lora_convert.runtime.comparing import AMPLIFICATION, compare, difference_map
from lora_convert.runtime.page import FileRecord, ModuleRow, PromptPictures, ReportPage, verdict, write_page

if TYPE_CHECKING:
    from lora_convert.runtime.picture import Gallery

__all__ = ["write_proof", "write_sheet"]

_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def write_proof(
    path: Path,
    result: ValidateResult,
    output: Source,
    found: Detection,
    source: Source,
    truth: Detection,
    gallery: Gallery | None,
) -> None:
    """Write the report of a proof as one HTML page. `source` is `output` itself where the file was checked alone."""
    status, said = verdict(result.rungs)
    compared = result.against is not None
    files = [FileRecord("converted", Path(result.file).name, output.reader.size, sha256_of(output.chunks()))]
    if compared:
        assert result.against is not None
        files.insert(0, FileRecord("source", Path(result.against).name, source.reader.size, sha256_of(source.chunks())))
    modules: tuple[ModuleRow, ...] = ()
    if result.rungs["structure"].status == "pass":
        figures = module_figures(output, found, *((source, truth) if compared else ()))
        norms = gallery.base_norms if gallery else {}
        modules = tuple(
            ModuleRow(name, module.algorithm, module.rank, module.alpha, norm, error, norms.get(name))
            for name, module, norm, error in figures
        )
    page = ReportPage(
        title=" → ".join(file.name for file in files),
        status=status,
        verdict=said,
        summary=_summary(result, found),
        rungs=result.rungs,
        pictures=tuple(_pictures(gallery)) if gallery else (),
        modules=modules,
        findings=result.findings,
        files=files,
        provenance=tuple(_provenance(gallery)),
        command=_command(result, gallery, path),
        family=result.family,
        amplification=AMPLIFICATION,
    )
    write_page(path, page)


def write_sheet(path: Path, gallery: Gallery) -> None:
    """Write base alone, reference and converted file side by side as one PNG, a row for every prompt."""
    from lora_convert.runtime.sheets import sheet

    rows = list(zip(*(drawn.images for drawn in gallery.pictures), strict=True))
    prompts = [comparison.prompt for comparison in gallery.comparisons]
    image = sheet(rows, prompts, ("base alone", "reference: source merged", "converted file, loaded"))
    with atomic_file(path) as file:
        image.save(file, "PNG")


def _summary(result: ValidateResult, found: Detection) -> str:
    passed = [name for name, rung in result.rungs.items() if rung.status == "pass"]
    parts = [counted(len(found.payload), "module")]
    if result.family:
        parts.append(FAMILIES[result.family].title)
    if result.worst_delta_error is not None:
        worst = result.worst_delta_error
        parts.append(f"worst relative error of a ΔW {worst:.1e}" if worst else "every ΔW exact")
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


def _command(result: ValidateResult, gallery: Gallery | None, report: Path) -> str:
    parts = ["lora-convert validate", shlex.quote(Path(result.file).name)]
    if result.against:
        parts += ["--against", shlex.quote(Path(result.against).name)]
    if gallery:
        parts += ["--base", shlex.quote(str(gallery.base.get("name", "BASE")))]
        parts += ["--steps", str(gallery.settings.steps), "--seed", str(gallery.settings.seed)]
    return " ".join([*parts, "--report", shlex.quote(report.name)])
