"""Train the adapters among the fixtures on the tiny base models, with the trainers' own code: peft and LyCORIS."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from lora_convert.families import FAMILIES
from lora_convert.runtime import bases
from training.autoencoder import PIXELS
from training.denoiser import Latents, losses, trained_parts

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


@dataclass(frozen=True)
class Recipe:
    """One adapter: which trainer's code, on which base, of which style, and how long."""

    base: str
    trainer: str
    style: str
    rank: int
    alpha: float
    rate: float
    steps: int


RECIPES: Mapping[str, Recipe] = {
    "neon": Recipe("tiny-sd15", "peft", "neon", 4, 8.0, 3e-3, 200),
    "striped_locon": Recipe("tiny-sd15", "lycoris", "striped", 4, 2.0, 3e-3, 200),
    "neon_xl": Recipe("tiny-sdxl", "peft", "neon", 4, 8.0, 2e-3, 200),
}


def _peft(pipeline: Any, recipe: Recipe) -> None:
    targets = {"unet": ATTENTION + FEED_FORWARD, "text_encoder": TEXT, "text_encoder_2": TEXT}
    for name, part in trained_parts(pipeline).items():
        part.requires_grad_(False)
        part.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=targets[name]))


def _save_peft(pipeline: Any, path: Path, recipe: Recipe) -> None:
    """As diffusers writes it, and in Kohya's spelling by diffusers' own function."""
    parts = trained_parts(pipeline)
    states = {name: get_peft_model_state_dict(part) for name, part in parts.items()}
    states = {name: {key: value.half() for key, value in state.items()} for name, state in states.items()}
    layers = {"unet_lora_layers": states["unet"], "text_encoder_lora_layers": _text_model(states["text_encoder"])}
    if "text_encoder_2" in states:
        layers["text_encoder_2_lora_layers"] = _text_model(states["text_encoder_2"])
    config = {name: dict(part.peft_config["default"].to_dict()) for name, part in parts.items()}
    headers = {f"{name}_lora_adapter_metadata": _plain(config[name]) for name in parts}
    type(pipeline).save_lora_weights(path.parent, weight_name=path.name, **layers, **headers)
    _save_kohya(states, path.with_name(f"{path.stem}_kohya.safetensors"), recipe)


def _text_model(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that published files have; transformers has flattened its CLIPTextModel since."""
    return {key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in state.items()}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _save_kohya(states: Mapping[str, Mapping[str, torch.Tensor]], path: Path, recipe: Recipe) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, state in states.items():
        named = _text_model(state) if name.startswith("text_encoder") else state
        tensors |= convert_state_dict_to_kohya({f"{name}.{key}": value for key, value in named.items()})
    if "text_encoder_2" not in states:  # the function knows the prefixes of two text encoders only
        tensors = {key.replace("lora_te1_", "lora_te_"): value for key, value in tensors.items()}
    for key in [key for key in tensors if key.endswith(".alpha")]:  # it takes alpha for the rank
        tensors[key] = torch.tensor(recipe.alpha, dtype=torch.float16)
    metadata = _kohya_metadata(recipe, "networks.lora")
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)


def _kohya_metadata(recipe: Recipe, module: str) -> dict[str, str]:
    return {
        "ss_network_module": module,
        "ss_network_dim": str(recipe.rank),
        "ss_network_alpha": str(recipe.alpha),
        "ss_resolution": f"({PIXELS}, {PIXELS})",
        "ss_steps": str(recipe.steps),
        "format": "pt",
    }


class _TextModel(torch.nn.Module):
    """Gives a text encoder's modules the names that they had in the transformers that trainers use."""

    def __init__(self, text_model: torch.nn.Module) -> None:
        super().__init__()
        self.text_model = text_model


def _lycoris(pipeline: Any, recipe: Recipe) -> Any:
    from lycoris.config import PRESET
    from lycoris.kohya import create_network

    for part in trained_parts(pipeline).values():
        part.requires_grad_(False)
    text = _TextModel(pipeline.text_encoder)
    # Its own list names the time embedding twice, as a class and by name, and then it stops over the duplicate.
    PRESET["once"] = {**PRESET["full"], "unet_target_name": ["conv_in", "conv_out"]}
    options = {"algo": "locon", "conv_dim": recipe.rank, "conv_alpha": recipe.alpha, "preset": "once"}
    network = create_network(1.0, recipe.rank, recipe.alpha, None, text, pipeline.unet, **options)
    network.apply_to(text, pipeline.unet, True, True)
    return network


def train(recipe: Recipe, path: Path, seed: int = 0) -> None:
    """Train one adapter and write it."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pipeline = DiffusionPipeline.from_pretrained(bases.folder(recipe.base), torch_dtype=torch.float32)
    latents = Latents.drawn(pipeline.vae, 400, rng, recipe.style)
    if recipe.trainer == "peft":
        _peft(pipeline, recipe)
        parameters = [p for part in trained_parts(pipeline).values() for p in part.parameters() if p.requires_grad]
    else:
        network = _lycoris(pipeline, recipe)
        parameters = list(network.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
    _optimise(pipeline, parameters, latents, recipe, rng)
    if recipe.trainer == "peft":
        _save_peft(pipeline, path, recipe)
    else:
        network.save_weights(str(path), torch.float16, _kohya_metadata(recipe, "lycoris.kohya"))


def _optimise(
    pipeline: Any, parameters: Sequence[torch.nn.Parameter], latents: Latents, recipe: Recipe, rng: np.random.Generator
) -> None:
    optimizer = torch.optim.AdamW(parameters, recipe.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    for step, loss in enumerate(losses(pipeline, latents, recipe.steps, rng)):
        for group in optimizer.param_groups:
            done = step / recipe.steps
            group["lr"] = recipe.rate * min(1, (step + 1) / 20) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0:
            pass


def probe(base: str, path: Path, share: float = 0.2, seed: int = 0) -> None:
    """An adapter of rank 1 that changes every module of UNet and text encoders by `share` of its weight's norm.

    Trained adapters leave modules at zero, so that none of them can tell whether each module arrives.
    """
    generator = torch.Generator().manual_seed(seed)
    pipeline = DiffusionPipeline.from_pretrained(bases.folder(base), torch_dtype=torch.float32)
    tensors = {}
    from lora_convert.runtime.architectures import weight_modules

    for component in FAMILIES[base].components:
        for name, module in weight_modules(getattr(pipeline, component.name)).items():
            weight = module.get_parameter("weight").detach()
            if weight.ndim not in (2, 4) or isinstance(module, torch.nn.Embedding):
                continue
            down = torch.randn(1, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], 1, *[1] * (weight.ndim - 2), generator=generator)
            size = (share * weight.norm() / (down.norm() * up.norm())).sqrt()
            tensors[f"{component.name}.{name}.lora_A.weight"] = (down * size).half()
            tensors[f"{component.name}.{name}.lora_B.weight"] = (up * size).half()
    save_file(tensors, path, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RECIPES)}, probe_sd15, probe_xl (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names or [*RECIPES, "probe_sd15", "probe_xl"]:
        path = options.folder / f"{name}.safetensors"
        if name in RECIPES:
            train(RECIPES[name], path)
        else:
            probe({"probe_sd15": "tiny-sd15", "probe_xl": "tiny-sdxl"}[name], path)


if __name__ == "__main__":
    main()
