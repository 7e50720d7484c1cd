"""`lora-convert demo`: the main job on a real file, told step by step."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import click

from lora_convert.cli.options import runtime
from lora_convert.cli.progress import progress_bar
from lora_convert.cli.text import conversion_lines, detection_lines, validation_lines
from lora_convert.converters.convert import ValidateResult, convert, validate
from lora_convert.errors import UsageError
from lora_convert.inspect.identify import identify

__all__ = ["SAMPLE", "run_demo"]

SAMPLE = "neon_kohya.safetensors"
"""A style for the embedded tiny-sd15, trained with peft, in Kohya's layout; its provenance is in samples/README.md."""

_BASE = "tiny-sd15"
_LAST = """
To load it anywhere:
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("{base}")
    pipe.load_lora_weights("{folder}")"""


def _heading(number: int, text: str) -> None:
    click.echo(f"\n{click.style(f'{number}. {text}', bold=True)}")


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def run_demo(folder: Path) -> int:
    """Inspect, convert, convert back and prove the sample; the files stay in `folder`. Returns the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    sample = folder / SAMPLE
    sample.write_bytes(resources.files("lora_convert.samples").joinpath(SAMPLE).read_bytes())

    _heading(1, f"What is it?   lora-convert inspect {sample}")
    found = identify(sample)
    _say(detection_lines(found))
    one = found.payload[0]
    click.echo(
        f"  Its alpha is {one.alpha:g} and its rank {one.rank}: every change is to be taken {one.scale:g} times."
    )

    _heading(2, f"Convert it.   lora-convert convert {sample} -o {folder / 'diffusers'}")
    result = convert(sample, folder / "diffusers", force=True)
    _say(conversion_lines(result))
    output = folder / "diffusers" / "pytorch_lora_weights.safetensors"

    _heading(3, f"And back, for ComfyUI and A1111.   lora-convert convert {output} --to kohya -o {folder / 'kohya'}")
    back = convert(output, folder / "kohya", to="kohya", force=True)
    _say(conversion_lines(back))

    report, sheet = folder / "report.html", folder / "sheet.png"
    command = f"lora-convert validate {output} --against {sample} --base {_BASE} --report {report} --sheet {sheet}"
    _heading(4, f"Prove it, by weights and by pictures.   {command}")
    proof, drawn = _prove(output, sample, report, sheet)
    _say(validation_lines(proof))
    if not (result.ok and proof.ok and back.ok):
        return 1
    modules = len(found.payload)
    click.echo(f"\nFound {modules} modules, converted {modules}, proved {modules}.")
    if drawn:
        click.echo(f"Look at {sheet} (base, reference, converted file) and {report} (the whole proof).")
    click.echo(_LAST.format(folder=(folder / "diffusers").as_posix(), base="…"))
    return 0


def _prove(output: Path, sample: Path, report: Path, sheet: Path) -> tuple[ValidateResult, bool]:
    """The proof, and whether it has pictures: the light core proves by weights alone."""
    try:
        climb = runtime("climb", "the proof by pictures").climb
        runtime("picture", "the proof by pictures")
    except UsageError as error:
        click.echo(f"  {str(error)[:1].upper()}{str(error)[1:]}")
        return validate(output, against=sample), False
    with progress_bar(True) as progress:
        return climb(output, sample, base=_BASE, report=report, sheet=sheet, progress=progress), True
