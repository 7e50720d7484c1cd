"""`lora-convert demo`: the main job on a real file, told step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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
    """Inspect, convert, validate and convert back the sample; the files stay in `folder`. Returns the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    sample = folder / SAMPLE
    sample.write_bytes(resources.files("lora_convert.samples").joinpath(SAMPLE).read_bytes())

    _heading(1, f"What is it?   lora-convert inspect {sample}")
    found = identify(sample)
    _say(detection_lines(found))
    click.echo(f"  Its scales (alpha/rank) differ between modules: {_scales(found)}.")
    click.echo("  diffusers applies one of them to all attention modules when it reads this file directly.")

    _heading(2, f"Convert it.   lora-convert convert {sample} -o {folder / 'diffusers'}")
    result = convert(sample, folder / "diffusers", force=True)
    _say(conversion_lines(result))
    output = folder / "diffusers" / "pytorch_lora_weights.safetensors"

    _heading(3, f"Check it again, from the files.   lora-convert validate {output} --against {sample}")
    proof = validate(output, against=sample)
    _say(validation_lines(proof))

    _heading(4, f"And back, for ComfyUI and A1111.   lora-convert convert {output} --to kohya -o {folder / 'kohya'}")
    back = convert(output, folder / "kohya", to="kohya", force=True)
    _say(conversion_lines(back))

    if not (result.ok and proof.ok and back.ok):
        return 1
    modules = len(found.payload)
    click.echo(f"\nFound {modules} modules, converted {modules}, proved {modules}: there and back. To load the result:")
    click.echo(_SNIPPET.format(folder=(folder / "diffusers").as_posix()))
    return 0


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)
