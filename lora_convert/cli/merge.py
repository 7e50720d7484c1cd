"""`lora-convert merge`: adapters baked into a base model's own weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lora_convert
from lora_convert.cli.options import reading_options
from lora_convert.cli.outcome import exit_status, say
from lora_convert.errors import UsageError
from lora_convert.families import FAMILIES
from lora_convert.report import SCHEMA, counted, printable, to_json

if TYPE_CHECKING:
    from lora_convert.converters.merge import MergeResult

__all__ = ["merge"]


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--base",
    required=True,
    metavar="MODEL",
    help="The base model: tiny-sd15 or tiny-sdxl (which come with the package), a folder, a checkpoint or a hub id.",
)
@click.option(
    "--scale",
    "scales",
    multiple=True,
    type=float,
    metavar="W",
    help="How strongly the files are added (default 1): one number for all, or one for each FILE.",
)
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="The folder that becomes the merged model; with --single-file a name ending in .safetensors, or its folder.",
)
@click.option(
    "--single-file", is_flag=True, help="Write one checkpoint, in the base's own layout or that of Stable Diffusion."
)
@click.option(
    "--dtype",
    type=click.Choice(["fp16", "bf16", "fp32"]),
    help="The dtype of the merged UNet and text encoders (default: the base's own).",
)
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--no-validate", is_flag=True, help="Do not prove the result before it is put in place.")
@reading_options
def merge(
    files: tuple[str, ...],
    base: str,
    scales: tuple[float, ...],
    out: Path,
    single_file: bool,
    dtype: str | None,
    force: bool,
    no_validate: bool,
    reading: dict[str, Any],
    as_json: bool,
    fail_on: str,
) -> int:
    """Bake adapters of any kind into a base model: the exact way out for those that no LoRA file can hold.

    Every weight becomes W + the sum of scale times the file's own change, rounded once; the result is a whole model,
    which needs no loader for adapters. Tensors are read and written one by one.

    \b
    Examples:
      lora-convert merge style.safetensors --base tiny-sd15 -o merged/
      lora-convert merge a.safetensors b.safetensors --scale 0.8 --scale 0.5 --base folder/ -o merged/
      lora-convert merge style.safetensors --base model.safetensors --single-file -o merged.safetensors
    """
    from lora_convert.cli.progress import progress_bar

    call: dict[str, Any] = {"scales": scales or 1.0, "single_file": single_file, "dtype": dtype, "force": force}
    try:
        with progress_bar(not as_json) as progress:
            result = lora_convert.merge(
                list(files), base, out, validated=not no_validate, progress=progress, **call, **reading
            )
    except UsageError as error:
        if as_json:
            refused = {"schema": SCHEMA, "files": list(files), "base": base, "status": "refused", "error": str(error)}
            click.echo(to_json(refused))
        raise
    say(as_json, result.as_dict(), merge_lines(result, out))
    return exit_status(result.findings, fail_on) if result.ok else 1


def merge_lines(result: MergeResult, out: Path) -> Iterator[str]:
    """What `merge` prints."""
    from lora_convert.cli.text import finding_lines, size

    names = [
        click.style(printable(file), bold=True) + (f" × {scale:g}" if scale != 1 else "")
        for file, scale in zip(result.files, result.scales, strict=True)
    ]
    head = f"{' + '.join(names)} into {printable(result.base)}"
    if not result.ok:
        yield f"{head}: {click.style(result.status, fg='red')}, nothing was written"
        yield from finding_lines(result.findings)
        return
    weights = [output for output in result.outputs if output.path.endswith(".safetensors")]
    written = weights[0].path if len(result.outputs) == 1 else str(out)
    yield f"{head} → {click.style(printable(written), bold=True)}"
    total = size(sum(output.bytes for output in result.outputs))
    title = FAMILIES[result.family or ""].title
    yield f"  {title}: {counted(result.modules, 'module')}, {counted(len(result.outputs), 'file')}, {total}"
    for output in weights:
        yield f"  {output.sha256}  {printable(output.path)}"
    yield "  " + _proof(result)
    yield from finding_lines(result.findings)


def _proof(result: MergeResult) -> str:
    if result.worst_rounding is None:
        return "not proved (--no-validate)"
    said = f"proved: the changes are the files' within rounding; {counted(result.changed, 'tensor')} written anew"
    return click.style(f"{said}, {result.copied:,} byte for byte the base's", fg="green")
