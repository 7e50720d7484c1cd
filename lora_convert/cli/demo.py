"""`lora-convert demo`: the main job on a real file, told step by step."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from pathlib import Path

import click

from lora_convert.cli.text import conversion_lines, detection_lines, validation_lines
from lora_convert.converters.convert import convert, validate
from lora_convert.inspect.detection import Detection
from lora_convert.inspect.identify import identify

__all__ = ["SAMPLE", "run_demo"]

SAMPLE = "kohya_sd15.safetensors"
"""Made by sd-scripts' own network code; its provenance is in samples/README.md."""

_SNIPPET = """\
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipe.load_lora_weights("{folder}")"""


def _heading(number: int, text: str) -> None:
    click.echo(f"\n{click.style(f'{number}. {text}', bold=True)}")


def _scales(found: Detection) -> str:
    counts = Counter(module.scale for module in found.payload)
    return ", ".join(f"{scale:g} ({number} modules)" for scale, number in counts.most_common() if scale is not None)


def run_demo(folder: Path) -> int:
    """Inspect, convert, validate and convert back the sample; the outputs stay in `folder`. Returns the exit status."""
    with resources.as_file(resources.files("lora_convert.samples").joinpath(SAMPLE)) as sample:
        _heading(1, f"What is it?   lora-convert inspect {SAMPLE}")
        found = identify(sample)
        for line in detection_lines(found):
            click.echo(line)
        click.echo(f"  Its scales (alpha/rank) differ between modules: {_scales(found)}.")
        click.echo("  diffusers applies one of them to all attention modules when it reads this file directly.")

        _heading(2, f"Convert it.   lora-convert convert {SAMPLE} -o {folder}/diffusers")
        result = convert(sample, folder / "diffusers", force=True)
        for line in conversion_lines(result):
            click.echo(line)

        _heading(3, f"Check it again, from the files.   lora-convert validate … --against {SAMPLE}")
        proof = validate(result.outputs[0].path, against=sample) if result.ok else None
        for line in validation_lines(proof) if proof else ():
            click.echo(line)

        _heading(4, "And back, for ComfyUI and A1111.   lora-convert convert … --to kohya")
        back = convert(result.outputs[0].path, folder / "kohya", to="kohya", force=True) if result.ok else None
        for line in conversion_lines(back) if back else ():
            click.echo(line)
    if not (proof and proof.ok and back and back.ok):
        return 1
    click.echo(f"\nLoad the result with diffusers:\n{_SNIPPET.format(folder=(folder / 'diffusers').as_posix())}")
    return 0
