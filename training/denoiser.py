"""Train a tiny base model's UNet and text encoders on drawn pictures, and write it as a Diffusers pipeline."""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_convert.runtime.architectures import TEXT_ENCODERS, UNETS
from training import tokenizer
from training.autoencoder import PIXELS, as_batch
from training.pictures import Scene, caption, draw, jittered, random_scene

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_BATCH = 32
_PER_CAPTION = 2  # pictures that share one encoded caption, which is a third of a step's work otherwise
_FEW_TOKENS, _FEW_UNTIL = 24, 0.6  # padding costs as much as words; it is learnt at the end
_NOISY, _MOST_WEIGHT = 0.7, 60.0
_DROPPED = 0.1  # of the captions, so that guidance has something to compare with


@dataclass(frozen=True)
class Latents:
    """Drawn pictures as the autoencoder sees them: `mean` and `deviation` are (captions, 2, 4, h, w), scaled."""

    mean: torch.Tensor
    deviation: torch.Tensor
    scenes: Sequence[Scene]

    @classmethod
    @torch.no_grad()
    def drawn(cls, vae: AutoencoderKL, count: int, rng: np.random.Generator, style: str = "") -> Latents:
        """Draw `count` captions' pictures."""
        scenes = [random_scene(rng, style) for _ in range(count)]
        means, deviations = [], []
        for first in range(0, count, 8):
            some = [other for scene in scenes[first : first + 8] for other in (scene, jittered(scene, rng))]
            seen = vae.encode(as_batch([draw(scene, PIXELS) for scene in some])).latent_dist
            means.append(seen.mean)
            deviations.append(seen.std)
        scale, shape = vae.config.scaling_factor, (-1, _PER_CAPTION, *means[0].shape[1:])
        return cls(torch.cat(means).reshape(shape) * scale, torch.cat(deviations).reshape(shape) * scale, scenes)

    def sample(self, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
        """A batch (n, 4, h, w) and its captions, one for every two pictures."""
        chosen = rng.integers(0, len(self.scenes), _BATCH // _PER_CAPTION)
        mean, deviation = self.mean[chosen].flatten(0, 1), self.deviation[chosen].flatten(0, 1)
        captions = [caption(self.scenes[k], long=rng.random() < 0.7) for k in chosen]
        return mean + deviation * torch.randn_like(mean), captions


def new_pipeline(base: str, vae: AutoencoderKL, tokenizer_folder: Path) -> DiffusionPipeline:
    """The base model before training."""
    words = CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=77)
    unet = UNet2DConditionModel(**UNETS[f"unet_{base.replace('-', '_')}"])
    if base == "tiny-sd15":
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS["clip_tiny_sd15"])),
            tokenizer=words,
            unet=unet,
            scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS["clip_tiny_sdxl"])),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODERS["openclip_tiny_sdxl"])),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def trained_parts(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The models of a pipeline that learn together, by component."""
    parts = {name: getattr(pipeline, name, None) for name in ("unet", "text_encoder", "text_encoder_2")}
    return {name: part for name, part in parts.items() if part is not None}


def predict(
    pipeline: Any, noisy: torch.Tensor, times: torch.Tensor, captions: Sequence[str], length: int = 77
) -> torch.Tensor:
    """The UNet's answer to pictures and their captions, each caption standing for an equal run of pictures."""
    tokens = pipeline.tokenizer(list(captions), padding="max_length", max_length=length, return_tensors="pt").input_ids
    each = len(noisy) // len(captions)
    if not hasattr(pipeline, "text_encoder_2"):
        context = pipeline.text_encoder(tokens).last_hidden_state
        return pipeline.unet(noisy, times, context.repeat_interleave(each, 0)).sample
    first = pipeline.text_encoder(tokens, output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    # The pipeline gives zeros for an empty prompt.
    said = torch.tensor([bool(text) for text in captions]).float()
    context = context * said[:, None, None]
    pooled = second.text_embeds * said[:, None]
    size = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]]).float().expand(len(noisy), -1)
    added = {"text_embeds": pooled.repeat_interleave(each, 0), "time_ids": size}
    return pipeline.unet(noisy, times, context.repeat_interleave(each, 0), added_cond_kwargs=added).sample


def losses(pipeline: Any, latents: Latents, steps: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """The squared error of the predicted noise, weighted by the inverse of the signal's share, batch after batch."""
    schedule = DDPMScheduler(**NOISE)
    for step in range(steps):
        clean, captions = latents.sample(rng)
        captions = [text if rng.random() >= _DROPPED else "" for text in captions]
        times = _times(len(clean))
        noise = torch.randn_like(clean)
        noisy = schedule.add_noise(clean, noise, times).contiguous(memory_format=torch.channels_last)
        length = _FEW_TOKENS if step < _FEW_UNTIL * steps else 77
        error = mse_loss(predict(pipeline, noisy, times, captions, length), noise, reduction="none").mean((1, 2, 3))
        yield (error * (1 / schedule.alphas_cumprod[times]).clamp(max=_MOST_WEIGHT)).mean()


def _times(count: int) -> torch.Tensor:
    """Half of them anywhere, half where there is almost only noise; each half spread evenly, in any order.

    The colours of a picture are decided there, and a plain loss hardly sees them: weighted by the inverse of the
    signal's share it is the loss of v-prediction.
    """
    half = count // 2
    anywhere = (torch.randperm(count - half) + torch.rand(count - half)) / (count - half)
    noisy = _NOISY + (1 - _NOISY) * (torch.randperm(half) + torch.rand(half)) / half
    return (torch.cat([anywhere, noisy])[torch.randperm(count)] * 1000).long().clamp(max=999)


def train(base: str, vae: AutoencoderKL, folder: Path, steps: int, seed: int = 0) -> DiffusionPipeline:
    """Train from nothing; the result has the moving average of the weights. `folder` gets the tokenizer."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer.save(folder / "tokenizer")
    pipeline = new_pipeline(base, vae, folder / "tokenizer")
    latents = Latents.drawn(vae, 6000, rng)
    parts = torch.nn.ModuleDict(trained_parts(pipeline)).to(memory_format=torch.channels_last)
    parts.requires_grad_(True).train()
    average = copy.deepcopy(parts).requires_grad_(False)
    rate, warm = 1.2e-3, 150
    optimizer = torch.optim.AdamW(parts.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-3)
    mean = 0.0
    for step, loss in enumerate(losses(pipeline, latents, steps, rng)):
        late = max(0.0, step / steps - 0.4) / 0.6
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / warm) * (0.02 + 0.98 * (1 + math.cos(math.pi * late)) / 2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        keep = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(parts.parameters()), 1 - keep)
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0:
            pass
    parts.load_state_dict(average.state_dict())
    parts.requires_grad_(False).eval()
    return pipeline


def save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in half precision, with vocab.json and merges.txt beside each tokenizer."""
    pipeline.to(torch.float16).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(pipeline, name, None) is not None:
            tokenizer.save(folder / name)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where it was trained
        if path.parent.name.startswith("text_encoder"):
            config["dtype"] = "float32"  # in which transformers loads it; diffusers loads its own models so
        path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", choices=("tiny-sd15", "tiny-sdxl"))
    parser.add_argument("autoencoder", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4800)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(options.autoencoder)
    save(train(options.base, vae, options.folder, options.steps), options.folder)


if __name__ == "__main__":
    main()
