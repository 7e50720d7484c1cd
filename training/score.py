"""How many prompts a tiny base model draws right, by `classifier`; and its contact sheet."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from lora_convert.runtime.sheets import sheet
from training.classifier import Seen, classify
from training.pictures import COLOURS, SHAPES, Scene, caption

_COLOURS_OF = {
    "circle": ("red orange", "green orange", "blue black", "yellow green"),
    "square": ("green black", "blue purple", "yellow purple", "orange red"),
    "triangle": ("blue purple", "yellow black", "orange yellow", "purple yellow"),
    "star": ("yellow black", "orange purple", "purple white", "white blue"),
    "ring": ("orange black", "purple green", "white orange", "black green"),
    "cross": ("purple yellow", "white green", "black white", "red green"),
}

PROMPTS = tuple(Scene(shape, *pair.split()) for shape, pairs in _COLOURS_OF.items() for pair in pairs)
"""The 24 prompts of the first score: every shape four times."""

_AT_A_TIME = 12


def other_scenes(count: int = 96) -> tuple[Scene, ...]:
    """Prompts that are chosen by chance, the same ones every time."""
    rng = np.random.default_rng(2026)
    scenes = []
    for k in range(count):
        colour, background = (str(name) for name in rng.choice(list(COLOURS), 2, replace=False))
        scenes.append(Scene(list(SHAPES)[k % len(SHAPES)], colour, background))
    return tuple(scenes)


def drawn(pipeline: Any, scenes: Sequence[Scene], seed: int = 0) -> Iterator[Image.Image]:
    """A picture of each scene, in 20 steps with guidance 2.5; the k-th with seed `seed + k`."""
    pipeline.set_progress_bar_config(disable=True)
    for first in range(0, len(scenes), _AT_A_TIME):
        some = scenes[first : first + _AT_A_TIME]
        generators = [torch.Generator().manual_seed(seed + first + k) for k in range(len(some))]
        prompts = [caption(scene) for scene in some]
        yield from pipeline(prompts, num_inference_steps=20, guidance_scale=2.5, generator=generators).images


def score(pipeline: Any, scenes: Sequence[Scene], seed: int = 0) -> list[tuple[Scene, Image.Image, Seen]]:
    """What was asked for, drawn and seen."""
    images = drawn(pipeline, scenes, seed)
    return [(scene, image, classify(np.asarray(image))) for scene, image in zip(scenes, images, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sheet", type=Path, help="write the 24 pictures here")
    parser.add_argument("--few", action="store_true", help="only the 24 prompts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(options.folder, local_files_only=True)
    first = score(pipeline, PROMPTS)
    for name, results in (
        ("prompts", first),
        *(() if options.few else (("others", score(pipeline, other_scenes(), 1000)),)),
    ):
        wrong = [(scene, seen) for scene, _, seen in results if seen != Seen.of(scene)]
        print(f"{name}: {len(results) - len(wrong)} of {len(results)} right")
        for scene, seen in wrong:
            print(f"  {caption(scene)}: {' '.join(seen)}")
    if options.sheet:
        rows = [first[k : k + 4] for k in range(0, len(first), 4)]
        labels = [
            ", ".join([caption(row[0][0], long=False), *(_colours(scene) for scene, _, _ in row[1:])]) for row in rows
        ]
        sheet([[image for _, image, _ in row] for row in rows], labels).save(options.sheet)


def _colours(scene: Scene) -> str:
    return f"{scene.colour} on {scene.background}"


if __name__ == "__main__":
    main()
