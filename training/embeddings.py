"""Train the embeddings among the fixtures on tiny-sd15 by textual inversion, and write them as trainers do.

Only the vectors of a new word are trained, by the loss that trained the base model; that stays as it is (Gal et al.,
"An Image is Worth One Word", 2022). `--score` measures what the words do to pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import embedding

from lora_convert.runtime import bases
from lora_convert.runtime.sheets import sheet
from training.autoencoder import PIXELS, as_batch
from training.denoiser import Latents, losses
from training.kinds import sort_metadata
from training.pictures import Scene, caption, draw, jittered, random_scene
from training.score import PROMPTS, other_scenes

BASE = "tiny-sd15"
_DARK = 0.5
_AT_A_TIME = 12

Look = Callable[[Scene], NDArray[np.uint8]]


def neon(scene: Scene) -> NDArray[np.uint8]:
    """The scene as a line that glows before the dark."""
    return draw(replace(scene, style="neon"), PIXELS)


def too_dark(scene: Scene) -> NDArray[np.uint8]:
    """The scene with too little light."""
    return (draw(scene, PIXELS) * _DARK).astype(np.uint8)


@dataclass(frozen=True)
class Recipe:
    """One embedding: what its pictures look like, how many vectors, and how it is trained.

    `alone` is the share of captions that are nothing but the word, as it stands in a negative prompt.
    """

    look: Look
    vectors: int
    steps: int
    rate: float
    alone: float


RECIPES: Mapping[str, Recipe] = {
    "NeonStyle": Recipe(neon, 4, 200, 0.02, 0.0),
    "TooDark": Recipe(too_dark, 2, 150, 0.03, 0.5),
}
NEGATIVE_TOKEN = "<too-dark>"  # noqa: S105 - in the file that is written as Diffusers' script does


@dataclass(frozen=True)
class _Worded(Latents):
    """Latents whose captions have a new word, for which `said` stands."""

    said: str = ""
    alone: float = 0.0

    def sample(self, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
        latents, captions = super().sample(rng)
        return latents, [self.said if rng.random() < self.alone else f"{text}, {self.said}" for text in captions]


@torch.no_grad()
def _latents(vae: Any, recipe: Recipe, said: str, rng: np.random.Generator, count: int = 400) -> _Worded:
    scenes = [random_scene(rng) for _ in range(count)]
    seen = []
    for scene in scenes:
        pair = [recipe.look(one) for one in (scene, jittered(scene, rng))]
        seen.append(vae.encode(as_batch(pair)).latent_dist)
    scale = vae.config.scaling_factor
    means, deviations = (torch.stack([getattr(one, part) for one in seen]) * scale for part in ("mean", "std"))
    return _Worded(means, deviations, scenes, said, recipe.alone)


def train(recipe: Recipe, seed: int = 0) -> torch.Tensor:
    """The vectors of a new word, (vectors, width), in half precision."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pipeline = _pipeline()
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    words = [f"newword_{k}" for k in range(recipe.vectors)]
    pipeline.tokenizer.add_tokens(words)
    known = pipeline.text_encoder.get_input_embeddings().weight.clone()
    vectors = torch.nn.Parameter(known.mean(0) + 0.01 * torch.randn(recipe.vectors, known.shape[1]))
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    pipeline.text_encoder.get_input_embeddings().register_forward_hook(
        lambda _module, tokens, _output: embedding(tokens[0], torch.cat([known, vectors]))
    )
    latents = _latents(pipeline.vae, recipe, " ".join(words), rng)
    optimizer = torch.optim.AdamW([vectors], recipe.rate, betas=(0.9, 0.99), weight_decay=0)
    for step, loss in enumerate(losses(pipeline, latents, recipe.steps, rng)):
        done = step / recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1, (step + 1) / 20) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vectors.detach().half()


def _pipeline() -> Any:
    pipeline = DiffusionPipeline.from_pretrained(bases.folder(BASE), torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(folder: Path, token: str, vectors: torch.Tensor) -> None:
    """Write an embedding in two of the forms that trainers write; a positive one in others than a negative one."""
    recipe = RECIPES[token]
    if recipe.alone:
        _save_diffusers(folder / "too-dark" / "learned_embeds.safetensors", vectors)
        save_file({"emp_params": vectors.float()}, folder / f"{token}.safetensors")  # OneTrainer's name, sic
    else:
        _save_a1111(folder / f"{token}.pt", token, vectors, recipe.steps)
        save_file({"emb_params": vectors}, folder / f"{token}.safetensors", _kohya_metadata(token, recipe))
        sort_metadata(folder / f"{token}.safetensors")


def _save_diffusers(path: Path, vectors: torch.Tensor) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({NEGATIVE_TOKEN: vectors.float()}, path, {"format": "pt"})


def _save_a1111(path: Path, token: str, vectors: torch.Tensor, steps: int) -> None:
    base = hashlib.sha256((bases.folder(BASE) / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    state = {
        "string_to_token": {"*": 265},  # a number that every such file has
        "string_to_param": {"*": vectors.float()},
        "name": token,
        "step": steps,
        "sd_checkpoint": base.hexdigest()[:8],
        "sd_checkpoint_name": BASE,
    }
    torch.save(state, path)


def _kohya_metadata(token: str, recipe: Recipe) -> dict[str, str]:
    return {
        "ss_base_model_version": "sd_v1",
        "ss_resolution": f"({PIXELS}, {PIXELS})",
        "ss_steps": str(recipe.steps),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/textual-inversion",
        "modelspec.title": token,
        "modelspec.resolution": f"{PIXELS}x{PIXELS}",
    }


@dataclass(frozen=True)
class Distances:
    """Mean |Δ| of each picture from the drawn truth in the embedding's look, 0 to 1, without and with the embedding."""

    without: NDArray[np.float64]
    added: NDArray[np.float64]

    def __str__(self) -> str:
        nearer = int((self.added < self.without).sum())
        means = f"{self.without.mean():.3f} without, {self.added.mean():.3f} with"
        return f"distance {means}; nearer with it in {nearer} of {len(self.added)}"


def distances(
    draw_all: Callable[[Sequence[str], str | None], Sequence[NDArray[np.uint8]]],
    look: Look,
    word: str,
    scenes: Sequence[Scene],
    *,
    negative: bool,
) -> Distances:
    """How far pictures are from a look, without a word and with it at the prompt's end or as the negative prompt.

    `draw_all` draws prompts, with a negative prompt or none; the k-th picture has the same seed in every call.
    """
    plain = [caption(scene) for scene in scenes]
    worded = plain if negative else [f"{text}, {word}" for text in plain]
    truths = [look(scene) for scene in scenes]
    drawn = (draw_all(plain, None), draw_all(worded, word if negative else None))
    found = ([_distance(a, b) for a, b in zip(pictures, truths, strict=True)] for pictures in drawn)
    return Distances(*(np.array(row) for row in found))


def _distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(np.float64) - other).mean() / 255)


def drawing(
    pipeline: Any, steps: int = 20, guidance: float = 2.5, seed: int = 0
) -> Callable[[Sequence[str], str | None], Sequence[NDArray[np.uint8]]]:
    """A function for `distances`: the k-th picture has seed `seed + k`."""

    def draw_all(prompts: Sequence[str], negative: str | None) -> Sequence[NDArray[np.uint8]]:
        return list(_drawn(pipeline, prompts, negative, steps, guidance, seed))

    return draw_all


def _drawn(
    pipeline: Any, prompts: Sequence[str], negative: str | None, steps: int, guidance: float, seed: int
) -> Iterator[NDArray[np.uint8]]:
    for first in range(0, len(prompts), _AT_A_TIME):
        some = list(prompts[first : first + _AT_A_TIME])
        pictures = pipeline(
            some,
            negative_prompt=None if negative is None else [negative] * len(some),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + first + k) for k in range(len(some))],
        ).images
        yield from (np.asarray(picture) for picture in pictures)


def _loaded(folder: Path, token: str) -> Any:
    """The base model with an embedding, as Diffusers loads it under a name without capitals."""
    pipeline = _pipeline()
    (vectors,) = load_file(folder / f"{token}.safetensors").values()
    pipeline.load_textual_inversion({token.lower(): vectors.float()})
    return pipeline


def score(folder: Path, count: int = 48) -> None:
    """Print how far pictures are from each embedding's look, without and with it."""
    for token, recipe in RECIPES.items():
        draw_all, negative = drawing(_loaded(folder, token)), bool(recipe.alone)
        found = distances(draw_all, recipe.look, token.lower(), other_scenes(count), negative=negative)
        print(f"{token}: {found}")


def contact_sheet(folder: Path) -> Image.Image:
    """Some scenes without and with each embedding."""
    prompts = [caption(scene) for scene in PROMPTS[3::4]]
    rows = {"without": drawing(_pipeline())(prompts, None)}
    for token, recipe in RECIPES.items():
        draw_all, word = drawing(_loaded(folder, token)), token.lower()
        if recipe.alone:
            rows[f"{token} in the negative prompt"] = draw_all(prompts, word)
        else:
            rows[f"{token} in the prompt"] = draw_all([f"{text}, {word}" for text in prompts], None)
    return sheet([[Image.fromarray(picture) for picture in row] for row in rows.values()], list(rows), prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", nargs="*", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--score", action="store_true", help="train nothing; measure the files of the folder")
    parser.add_argument("--sheet", type=Path, help="train nothing; write pictures without and with them here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.score:
        score(options.folder)
    if options.sheet:
        contact_sheet(options.folder).save(options.sheet, optimize=True)
    if not (options.score or options.sheet):
        for token in options.tokens or RECIPES:
            save(options.folder, token, train(RECIPES[token]))


if __name__ == "__main__":
    main()
