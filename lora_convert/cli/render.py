"""`lora-convert render`: a picture, several, or a sheet of them over scales and seeds."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_convert.cli.grid import MOST_PICTURES, Axis, finite_number, grid_axes, places
from lora_convert.cli.options import device_options, reading_options
from lora_convert.cli.outcome import exit_status, say
from lora_convert.errors import FileError, UsageError
from lora_convert.report import SCHEMA, Finding, counted, listed, printable, shown, to_json

if TYPE_CHECKING:
    from PIL import Image

    from lora_convert.converters.convert import Progress
    from lora_convert.runtime.applying import Applied
    from lora_convert.runtime.rendering import Settings

__all__ = ["render"]

_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".bin")
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "PIL")


@click.command()
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option(
    "--base",
    required=True,
    metavar="MODEL",
    help="The base model: tiny-sd15 or tiny-sdxl (which come with the package), a folder, a checkpoint or a hub id.",
)
@click.option("--prompt", required=True, metavar="TEXT", help="What to draw.")
@click.option(
    "--negative-prompt",
    "--negative",
    default="",
    metavar="TEXT",
    help="What not to draw; needs a --guidance above 1.",
)
@click.option("--seed", type=int, help="Seed of the first picture (default 0); each further one has the next.")
@click.option("--steps", type=int, default=20, help="Steps of the sampler (default 20).")
@click.option("--guidance", type=float, default=4.0, help="How closely to follow the prompt (default 4; 1 is off).")
@click.option("--width", type=int, metavar="PIXELS", help="A multiple of 8 (default: the base model's own).")
@click.option("--height", type=int, metavar="PIXELS", help="A multiple of 8 (default: the base model's own).")
@click.option(
    "--scheduler",
    metavar="NAME",
    help="ddim, euler, euler-a, dpm++2m, unipc, lcm and others (default: the base model's own).",
)
@click.option(
    "--scale",
    "scales",
    multiple=True,
    metavar="W",
    help="How strongly a FILE is applied (default 1): a number, or JSON with numbers by component and block. "
    "One for each FILE.",
)
@click.option("--count", type=int, default=1, help="How many pictures to draw, with successive seeds (default 1).")
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="AXIS",
    help="Draw a sheet over scales=0,0.5,1 or seeds=0..3. Twice: rows and columns.",
)
@device_options
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PATH",
    help="A name ending in .png, or a folder. Of several pictures each has its seed in the name.",
)
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@reading_options
def render(as_json: bool, fail_on: str, **asked: Any) -> int:
    """Draw pictures with LoRA files and embeddings applied to a base model, or with the base model alone.

    FILE may be anything that `convert` reads. An embedding acts where its token stands in a prompt. A PNG carries as
    text everything that determined it; the same call draws the same bytes again on the same machine.

    \b
    Examples:
      lora-convert render style.safetensors --base tiny-sd15 --prompt "a red circle" -o out.png
      lora-convert render style.safetensors --base tiny-sd15 --prompt "a red circle" \\
          --grid seeds=0..3 --grid scales=0,0.5,1 -o sheet.png
      lora-convert render a.safetensors b.safetensors --scale 0.8 \\
          --scale '{"unet": {"down": 0.9}, "text_encoder": 0.5}' --base folder/ --prompt "a cat" -o out.png
      lora-convert render --base tiny-sdxl --prompt "a blue star" --count 4 -o pictures/
    """
    session = _Session(asked["files"], asked["base"])
    status = "rendered"
    try:
        session.run(_job(**asked), quiet=as_json)
    except UsageError as error:
        if as_json:
            click.echo(to_json(session.content("refused") | {"error": str(error)}))
        raise
    except FileError as error:
        session.findings += error.findings
        status = "failed"
    say(as_json, session.content(status), session.lines(status))
    return exit_status(session.findings, fail_on) if status == "rendered" else 1


@dataclass(frozen=True)
class _Job:
    """What was asked for, as far as it can be checked before anything is loaded."""

    files: tuple[str, ...]
    base: str
    settings: Settings
    scales: tuple[float | Mapping[str, Any], ...]
    """One per file."""
    axes: tuple[Axis, ...]
    """None: pictures of their own. One: a sheet's columns. Two: its rows, then its columns."""
    paths: tuple[Path, ...]
    """One per picture, or that of the sheet."""
    device: str
    dtype: str
    reading: Mapping[str, Any]
    """How to read the files."""


def _job(
    *,
    files: tuple[str, ...],
    base: str,
    seed: int | None,
    scales: tuple[str, ...],
    count: int,
    grids: tuple[str, ...],
    device: str,
    dtype: str,
    reading: dict[str, Any],
    out: Path,
    force: bool,
    **drawing: Any,
) -> _Job:
    """Raises UsageError for what cannot be done as asked."""
    from lora_convert.converters.convert import refuse_overwrite
    from lora_convert.runtime.rendering import Settings

    settings = Settings(seed=seed or 0, **drawing).checked()
    if not 1 <= count <= MOST_PICTURES:
        raise UsageError(f"--count is 1 to {MOST_PICTURES:,}")
    axes = grid_axes(grids)
    if axes and count != 1:
        raise UsageError("--count is for single pictures; a sheet of several takes --grid seeds=0..3")
    names = [axis.name for axis in axes]
    if "seeds" in names and seed is not None:
        raise UsageError("--grid seeds has the seeds; leave --seed out")
    if "scales" in names and not files:
        raise UsageError("--grid scales needs a FILE to scale")
    weights = _scales(scales, files)
    if "scales" in names and not all(isinstance(weight, float) for weight in weights):
        raise UsageError("--grid scales multiplies plain numbers; give no --scale by blocks with it")
    paths = _paths(out, _name((*files, base)[0]), range(settings.seed, settings.seed + count), bool(axes))
    for path in paths:
        refuse_overwrite(files, path, force)
    return _Job(files, base, settings, weights, axes, paths, device, dtype, reading)


def _scales(texts: Sequence[str], files: Sequence[str]) -> tuple[float | Mapping[str, Any], ...]:
    """One scale per file, each a number or a mapping."""
    if texts and len(texts) != len(files):
        raise UsageError(f"--scale is given {counted(len(texts), 'time')} for {counted(len(files), 'FILE')}")
    return tuple(_scale(text) for text in texts) or (1.0,) * len(files)


def _scale(text: str) -> float | Mapping[str, Any]:
    try:
        if not text.lstrip().startswith("{"):
            return finite_number(text)
        mapping: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        said = f"--scale {shown(text)} is neither a number nor JSON"
        raise UsageError(f'{said} such as {{"unet": {{"down": 0.9}}, "text_encoder": 0.5}}') from None
    return mapping


def _paths(out: Path, name: str, seeds: Sequence[int], is_sheet: bool) -> tuple[Path, ...]:
    """`out` itself for one picture or a sheet, else with the seed; in a folder the name is that of what was drawn."""
    suffix = out.suffix.lower()
    if suffix in _OTHER_PICTURES:
        raise UsageError(f"pictures are PNGs, which carry their record; name the output {shown(out.stem)}.png")
    if ".." in out.parts:  # `new/..` is another place once `new` is made
        out = Path(os.path.realpath(out))
    if suffix == ".png":
        if is_sheet or len(seeds) == 1:
            return (out,)
        return tuple(out.with_name(f"{out.stem}-{seed}.png") for seed in seeds)
    return tuple(out / f"{name}-{part}.png" for part in (["grid"] if is_sheet else seeds))


def _name(address: str) -> str:
    """The last part of a path, hub id or hub address, without the ending of a weight file."""
    name = Path(address).name
    stem = Path(name).stem if name.endswith(_WEIGHTS) else name
    return stem if stem not in ("", ".", "..") else "picture"


class _Session:
    """One call of `render`: what was applied and drawn so far, and what there is to say of it."""

    def __init__(self, files: Sequence[str], base: str) -> None:
        self.files, self.base = files, base
        self.family: str | None = None
        self.adapters: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []
        self.record: Mapping[str, Any] | None = None
        self.findings: list[Finding] = []

    def run(self, job: _Job, *, quiet: bool) -> None:
        """Draw everything. Raises UsageError and FileError; what was written before stays, and is told."""
        from lora_convert.cli.progress import progress_bar

        with _installed(), progress_bar(not quiet) as progress:
            for file in job.files:
                with self._about(file):
                    self.adapters.append({"file": file, "spelling": _spelling(file, job.reading, progress)})
            from lora_convert.runtime.applying import apply
            from lora_convert.runtime.pipelines import family_of, open_pipeline

            pipeline = open_pipeline(job.base, job.device, job.dtype, family=job.reading["family"])
            self.family = family_of(pipeline)
            applied = []
            for file, scale, content in zip(job.files, job.scales, self.adapters, strict=True):
                with self._about(file):
                    applied.append(apply(pipeline, file, scale, **job.reading))
                content |= _adapter_content(applied[-1])
                self.findings += self._named(applied[-1].findings, file)
            if job.axes:
                self._draw_sheet(pipeline, job, applied, progress)
            else:
                for number, path in enumerate(job.paths):
                    settings = replace(job.settings, seed=job.settings.seed + number)
                    self._save(path, *self._draw(pipeline, settings, progress, number, len(job.paths)))

    @contextlib.contextmanager
    def _about(self, file: str) -> Iterator[None]:
        """Of several files, say which one cannot be used."""
        try:
            yield
        except FileError as error:
            raise FileError(self._named(error.findings, file)) from None

    def _named(self, findings: Sequence[Finding], file: str) -> Sequence[Finding]:
        if len(self.files) == 1:
            return findings
        return [replace(finding, subject=": ".join(filter(None, (file, finding.subject)))) for finding in findings]

    def _draw(
        self, pipeline: Any, settings: Settings, progress: Progress | None, number: int, count: int
    ) -> tuple[Image.Image, Mapping[str, Any]]:
        """Picture `number` of `count`, and its record."""
        from lora_convert.runtime.rendering import render as render_one

        def step(done: int, total: int) -> None:
            if progress:
                progress("drawing", number * total + done, count * total)

        drawn = render_one(pipeline, settings, progress=step)
        self.findings += [finding for finding in drawn.findings if finding not in self.findings]
        return drawn.images[0], drawn.record

    def _draw_sheet(self, pipeline: Any, job: _Job, applied: Sequence[Applied], progress: Progress | None) -> None:
        from lora_convert.runtime.rendering import sheet

        drawn = []
        every = list(places(job.axes))
        for number, place in enumerate(every):
            for adapter, scale in zip(applied, job.scales if "scales" in place else (), strict=False):
                assert isinstance(scale, float)
                adapter.set_scale(scale * place["scales"])
            settings = replace(job.settings, seed=int(place.get("seeds", job.settings.seed)))
            drawn.append(self._draw(pipeline, settings, progress, number, len(every)))
        labels = [axis.labels(factors=any(scale != 1.0 for scale in job.scales)) for axis in job.axes]
        columns = len(job.axes[-1].values)
        rows = [[image for image, _ in drawn[start : start + columns]] for start in range(0, len(drawn), columns)]
        names = " + ".join(_name(file) for file in job.files)
        title = f"{names + ' on ' if names else ''}{_name(job.base)}: {job.settings.prompt}"
        whole = sheet(rows, labels[0] if len(labels) > 1 else (), labels[-1], title)
        grid = {axis.name: list(axis.values) for axis in job.axes}
        self._save(job.paths[0], whole, {**drawn[0][1], "grid": grid})

    def _save(self, path: Path, image: Image.Image, record: Mapping[str, Any]) -> None:
        from lora_convert.hashes import sha256_of
        from lora_convert.runtime.rendering import save_png

        save_png(path, image, record)
        written = path.read_bytes()
        self.record = self.record or record
        self.outputs.append(
            {
                "path": str(path),
                "bytes": len(written),
                "sha256": sha256_of([written]),
                "width": image.width,
                "height": image.height,
                "seed": record["seed"],
            }
        )

    def content(self, status: str) -> dict[str, Any]:
        """The content of `render --json`."""
        return {
            "schema": SCHEMA,
            "files": list(self.files),
            "base": self.base,
            "status": status,
            "family": self.family,
            "adapters": self.adapters,
            "outputs": self.outputs,
            "record": self.record,
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def lines(self, status: str) -> Iterator[str]:
        """What `render` prints."""
        from lora_convert.cli.text import finding_lines, size

        if status != "rendered":
            name = click.style(printable(", ".join(self.files) or self.base), bold=True)
            rest = "no further picture was written" if self.outputs else "nothing was written"
            yield f"{name}: {click.style(status, fg='red')}, {rest}"
        for adapter in self.adapters:
            if "modules" in adapter:  # it was applied
                yield _adapter_line(adapter, self.base, self.family)
        for output in self.outputs:
            name = click.style(printable(output["path"]), bold=True)
            seed = "" if "grid" in (self.record or {}) else f", seed {output['seed']}"
            yield f"{name}: {output['width']}×{output['height']} pixels{seed}, {size(output['bytes'])}"
            yield f"  sha256 {output['sha256']}"
        yield from finding_lines(self.findings)


def _spelling(file: str, reading: Mapping[str, Any], progress: Progress | None) -> str | None:
    """How a file spells its modules. Raises FileError for one that cannot be read, before anything is loaded.

    What else may be wrong with it is not judged here: beside a base model that is known it need not be.
    """
    from lora_convert.converters.convert import local_path, output_files
    from lora_convert.converters.embeddings import embedding_files
    from lora_convert.inspect.identify import identify

    path = Path(local_path(file, progress))
    embedded = embedding_files(path) if path.is_dir() else ()
    found = identify(next(iter((*output_files(path), *embedded)), path), **reading)
    if found.kind == "unknown" and not found.ok:
        raise FileError(found.findings)
    return found.spelling


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """UsageError where a library is missing that only drawing needs, whenever that is noticed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        said = f"render needs {error.name}, which is not installed"
        raise UsageError(f'{said}; install it with: pip install "lora-convert[runtime]"') from None


def _adapter_content(adapter: Applied) -> dict[str, Any]:
    return {
        "sha256": adapter.sha256,
        "modules": adapter.modules,
        "tokens": list(adapter.tokens),
        "scale": adapter.scale,
        "warnings": list(adapter.warnings),
    }


def _adapter_line(adapter: Mapping[str, Any], base: str, family: str | None) -> str:
    name = click.style(printable(adapter["file"]), bold=True)
    scale = json.dumps(adapter["scale"]) if isinstance(adapter["scale"], Mapping) else f"{adapter['scale']:g}"
    kind = f" ({family})" if family and family != base else ""
    foreign = adapter["spelling"] not in (None, "diffusers")
    how = f", converted from {adapter['spelling']}'s names" if foreign else ""
    what = [counted(adapter["modules"], "module")] if adapter["modules"] or not adapter["tokens"] else []
    what += [f"{counted(len(adapter['tokens']), 'token')} ({listed(adapter['tokens'])})"] if adapter["tokens"] else []
    strength = f", scale {scale}" if adapter["modules"] or not adapter["tokens"] else ""
    return f"{name}: {' and '.join(what)} applied to {printable(base)}{kind}{strength}{how}"
