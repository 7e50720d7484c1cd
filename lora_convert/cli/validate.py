"""`lora-convert validate`: the climb from a file's structure to its pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lora_convert
from lora_convert.cli.options import device_options, reading_options, runtime
from lora_convert.cli.outcome import exit_status, say
from lora_convert.errors import UsageError

if TYPE_CHECKING:
    from lora_convert.converters.convert import ValidateResult

__all__ = ["validate"]


@click.command()
@click.argument("file")
@click.option(
    "--against", metavar="SOURCE", help="The file it was converted from: compares every module's weight change."
)
@click.option(
    "--load",
    is_flag=True,
    help="Also load it with diffusers into the real architecture, without weights (needs lora-convert[runtime]).",
)
@click.option(
    "--base",
    metavar="MODEL",
    help="Also draw with this base model: tiny-sd15, tiny-sdxl, a folder, a checkpoint or a hub id. Implies --load.",
)
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Draw this instead of the usual eight prompts."
)
@click.option("--steps", type=click.IntRange(1), help="Steps of the sampler (default 10).")
@click.option("--seed", type=click.IntRange(0), help="Seed of the first picture (default 0).")
@click.option("--scale", type=float, help="How strongly the adapter is applied in the pictures (default 1).")
@device_options
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="HTML",
    help="Write the proof as one HTML page.",
)
@click.option(
    "--sheet",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PNG",
    help="Write what was drawn: base, reference and converted side by side.",
)
@click.option("--force", is_flag=True, help="Replace a report or sheet that exists.")
@reading_options
def validate(
    file: str,
    against: str | None,
    load: bool,
    base: str | None,
    prompts: tuple[str, ...],
    steps: int | None,
    seed: int | None,
    scale: float | None,
    device: str,
    dtype: str,
    report: Path | None,
    sheet: Path | None,
    force: bool,
    reading: dict[str, Any],
    as_json: bool,
    fail_on: str,
) -> int:
    """Check a file of adapters, alone or against its source. FILE may be a folder that convert or merge wrote.

    Looks at its structure, its numbers, and the weight change of every module; with --load at what diffusers' own
    loader makes of it, and with --base at the pictures. Those are drawn by the base alone, by the base with the
    source's weight changes added by their definition, and with the file loaded; the last two must agree within
    rounding.

    \b
    Examples:
      lora-convert validate out/pytorch_lora_weights.safetensors
      lora-convert validate out/pytorch_lora_weights.safetensors --against style.safetensors --load
      lora-convert validate out/pytorch_lora_weights.safetensors --against style.safetensors \\
          --base stabilityai/stable-diffusion-xl-base-1.0 --report proof.html
      lora-convert validate merged/ --against style.safetensors --base tiny-sd15
    """
    from lora_convert.cli.progress import progress_bar
    from lora_convert.cli.text import validation_lines
    from lora_convert.converters.convert import refuse_overwrite

    if reading["skip"] and against is None:
        raise UsageError("--skip leaves out tensors of the source; name that with --against")
    drawing = _drawing(prompts, steps, seed, scale, device, dtype)
    if base is None and (drawing or sheet):
        option = next(iter(drawing), "sheet")
        raise UsageError(f"--{'prompt' if option == 'prompts' else option} is about pictures; name a base with --base")
    for path in filter(None, (report, sheet)):
        refuse_overwrite([target for target in (file, against) if target], path, force)
    with progress_bar(not as_json) as progress:
        if base or report:
            result = _climbing(file, against, base, drawing, report, sheet, progress=progress, **reading)
        else:
            check: Callable[..., ValidateResult] = runtime("climb", "--load").climb if load else lora_convert.validate
            result = check(file, against, progress=progress, **reading)
    say(as_json, result.as_dict(), validation_lines(result))
    return exit_status(result.findings, fail_on) if result.ok else 1


def _drawing(
    prompts: tuple[str, ...], steps: int | None, seed: int | None, scale: float | None, device: str, dtype: str
) -> dict[str, Any]:
    """What was said about the pictures; what was not keeps the library's defaults."""
    asked = {"prompts": prompts or None, "steps": steps, "seed": seed, "scale": scale, "device": device, "dtype": dtype}
    return {name: value for name, value in asked.items() if value not in (None, "auto")}


def _climbing(
    file: str,
    against: str | None,
    base: str | None,
    drawing: dict[str, Any],
    report: Path | None,
    sheet: Path | None,
    **options: Any,
) -> ValidateResult:
    """All rungs, and what is written about them."""
    climb = runtime("climb", "--base" if base else "--report").climb
    drawn = runtime("picture", "--base").Drawing(**drawing) if base else None
    result: ValidateResult = climb(file, against, base=base, drawing=drawn, report=report, sheet=sheet, **options)
    return result
