"""Train the autoencoder that both tiny base models share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.pictures import STYLES, draw, random_scene

PIXELS = 128
CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,  # flat colours have to survive the normalisation
    "sample_size": PIXELS,
}
_KL = 5e-4


def as_batch(pictures: list[np.ndarray]) -> torch.Tensor:
    """Pictures (height, width, 3), uint8, as (n, 3, height, width), float32, -1 to 1."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def some_picture(rng: np.random.Generator) -> np.ndarray:
    """A picture for the autoencoder, which must know the adapters' styles too, and colours without names."""
    picture = draw(random_scene(rng, str(rng.choice(STYLES, p=(0.7, 0.15, 0.15)))), PIXELS)
    if rng.random() < 0.2:
        mixed = picture.astype(np.float32) @ rng.dirichlet([0.5] * 3, 3).astype(np.float32)
        picture = np.clip(mixed, 0, 255).astype(np.uint8)
    return picture


def batches(steps: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Crops first, which cost little and have edges in most; whole pictures from 60 % of the way."""
    for step in range(steps):
        if step < 0.6 * steps:
            crops = []
            for _ in range(3):
                picture = some_picture(rng)
                for top, left in rng.integers(8, PIXELS - 56, (3, 2)):
                    crops.append(picture[top : top + 48, left : left + 48])
            yield as_batch(crops)
        else:
            yield as_batch([some_picture(rng) for _ in range(3)])


def _loss(picture: torch.Tensor, drawn: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    error = drawn - picture
    edges = (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + _KL * divergence


def train(steps: int, seed: int = 0) -> AutoencoderKL:
    """Train from nothing; the result's `scaling_factor` makes latents of unit variance."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.quant_conv.bias[CONFIG["latent_channels"] :] = -4
    rate = 1.5e-3
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-4)
    for step, picture in enumerate(batches(steps, rng)):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        posterior = model.encode(picture).latent_dist
        drawn = model.decode(posterior.sample()).sample
        loss = _loss(picture, drawn, posterior.mean, posterior.logvar)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            pass
    model.eval()
    model.register_to_config(scaling_factor=1 / _latent_deviation(model, rng))
    return model


@torch.no_grad()
def _latent_deviation(model: AutoencoderKL, rng: np.random.Generator) -> float:
    pictures = as_batch([draw(random_scene(rng), PIXELS) for _ in range(200)])
    return float(torch.cat([model.encode(part).latent_dist.mean for part in pictures.split(20)]).std())


@torch.no_grad()
def quality(model: AutoencoderKL, count: int = 60) -> dict[str, float]:
    """PSNR in dB, by style, of pictures that were not trained on."""
    rng = np.random.default_rng(10_000)
    found = {}
    for style in STYLES:
        pictures = as_batch([draw(random_scene(rng, style), PIXELS) for _ in range(count)])
        drawn = model.decode(model.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        errors = ((drawn - pictures) / 2).square().mean((1, 2, 3))
        found[style or "plain"] = float((-10 * errors.log10()).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = train(options.steps)
    print(quality(model))
    model.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
