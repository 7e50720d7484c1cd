"""One small adapter of every kind on tiny-sd15, made by LyCORIS (one by peft), with seeded random values.

Nothing is trained: every parameter is drawn, alpha is not the rank and differs between modules, and the size is such
that a module's weight changes by about `Kind.share` of its norm. LyCORIS' own forward on unit inputs, `changes`, is
what the file means.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from lora_convert.runtime import bases

BASE = "tiny-sd15"
_SPATIAL = "up_blocks.2.attentions.1"
_BLOCK = f"{_SPATIAL}.transformer_blocks.0"
_LAYER = "text_model.encoder.layers.0"

ATTENTION = (f"{_BLOCK}.attn1.to_q", f"{_BLOCK}.attn1.to_v", f"{_BLOCK}.attn1.to_out.0", f"{_BLOCK}.attn2.to_k")
LINEAR = (*ATTENTION, f"{_BLOCK}.ff.net.0.proj", f"{_SPATIAL}.proj_in", "up_blocks.3.resnets.1.time_emb_proj")
CONVOLUTIONS = ("conv_in", "up_blocks.3.resnets.0.conv2", "down_blocks.1.resnets.0.conv1")
NORMS = (f"{_BLOCK}.norm1", f"{_BLOCK}.norm3", "up_blocks.3.resnets.0.norm1", f"{_LAYER}.layer_norm1")
TEXT = (f"{_LAYER}.self_attn.out_proj", f"{_LAYER}.mlp.fc1")
EVERYWHERE = (*LINEAR, *CONVOLUTIONS, *TEXT)


@dataclass(frozen=True)
class Kind:
    """One file: LyCORIS' algorithm and network arguments, the modules, and how much they change.

    `each` holds arguments of single modules. `share` is ‖ΔW‖/‖W‖; None leaves the drawn values as they are.
    """

    algorithm: str
    options: Mapping[str, Any] = field(default_factory=dict)
    modules: Sequence[str] = EVERYWHERE
    each: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rank: int = 4
    share: float | None = 0.3
    dtype: torch.dtype | None = None
    biases: bool = False


_DORA = {"dora_wd": True}
_HALF = torch.float16
_SOME = (*ATTENTION, *CONVOLUTIONS, TEXT[0])
_DECOMPOSED = MappingProxyType({name: {"weight_decompose": True} for name in (*ATTENTION[:2], CONVOLUTIONS[1])})
_ON_INPUT = MappingProxyType({name: {"train_on_input": True} for name in (ATTENTION[2], CONVOLUTIONS[1])})

KINDS: Mapping[str, Kind] = {
    "locon": Kind("locon", modules=_SOME),
    "locon_tucker": Kind("locon", {"use_tucker": True}, dtype=_HALF),
    "locon_rslora": Kind("locon", {"rs_lora": True}, modules=_SOME, dtype=_HALF),
    "lora_bias": Kind("locon", modules=(*CONVOLUTIONS[1:], ATTENTION[2], *TEXT), biases=True),
    "loha": Kind("loha", modules=_SOME, rank=3),
    "loha_tucker": Kind("loha", {"use_tucker": True}, rank=3, dtype=_HALF),
    "lokr": Kind("lokr", {"factor": 8}, rank=2),
    "lokr_full": Kind("lokr", {"factor": 4, "full_matrix": True}, dtype=_HALF),
    "lokr_tucker": Kind("lokr", {"factor": 4, "use_tucker": True}, rank=3),
    "lokr_decompose_both": Kind("lokr", {"factor": 8, "decompose_both": True}, rank=3),
    "lokr_unbalanced": Kind("lokr", {"factor": 4, "unbalanced_factorization": True}, rank=3),
    "dora_out": Kind("locon", _DORA),
    "dora_in": Kind("locon", {**_DORA, "wd_on_output": False}, dtype=_HALF),
    "loha_dora_out": Kind("loha", _DORA, modules=_SOME, rank=3),
    "lokr_dora_out": Kind("lokr", {**_DORA, "factor": 8}, rank=2),
    "partial_dora": Kind("locon", modules=_SOME, each=_DECOMPOSED),
    "glora": Kind("glora", dtype=_HALF),
    "tlora": Kind("tlora", modules=(*LINEAR, *TEXT)),
    "ia3": Kind("ia3", each=_ON_INPUT),
    "diag_oft": Kind("diag-oft", rank=8, dtype=_HALF),
    "diag_oft_constraint": Kind("diag-oft", {"constraint": 0.015, "rescaled": True}, share=None),
    "boft": Kind("boft", modules=_SOME, rank=8, dtype=_HALF),
    "oft_r": Kind("peft", modules=(*ATTENTION, LINEAR[4], *TEXT), rank=8),
    "full": Kind("full", modules=(*ATTENTION, CONVOLUTIONS[0], TEXT[0]), dtype=_HALF),
    "norm": Kind("locon", {"train_norm": True}, modules=(*NORMS, *ATTENTION[:2], CONVOLUTIONS[0])),
}
"""File name -> how it is made."""

_ALPHAS = (1.0, 3.0, 2.0, 6.0)
_STARTING = ("dora_scale", "rescale", "q_layer.weight", "p_layer.weight", "lambda_layer")
"""Parameters that are not neutral at zero; they vary around where LyCORIS begins."""
_FIXED = {"dora_scale": 0.15, "rescale": 0.1}
"""How far those vary that the search for the size leaves alone."""


def _text_model(pipeline: Any) -> torch.nn.Module:
    """The text encoder under the names that it has in the transformers that trainers use."""
    named = torch.nn.Module()
    named.text_model = pipeline.text_encoder
    return named


def layers(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The modules of UNet and text encoder by the name that trainers give them."""
    text = _text_model(pipeline)
    named = {f"lora_unet_{name}": module for name, module in pipeline.unet.named_modules()}
    named |= {f"lora_te_{name}": module for name, module in text.named_modules()}
    return {name.replace(".", "_"): module for name, module in named.items()}


def loaded() -> Any:
    """The base model, float32."""
    return DiffusionPipeline.from_pretrained(bases.folder(BASE), torch_dtype=torch.float32)


def network(kind: Kind, pipeline: Any) -> Any:
    """LyCORIS' network of a kind for the pipeline, not applied to it."""
    from lycoris.config import PRESET
    from lycoris.kohya import create_network

    each = {
        name: {"alpha": alpha, **kind.each.get(name, {})}
        for name, alpha in zip(kind.modules, _ALPHAS * len(kind.modules), strict=False)
    }
    PRESET[BASE] = {
        "enable_conv": True,
        "unet_target_module": [],
        "unet_target_name": [name for name in kind.modules if not name.startswith("text_model.")],
        "text_encoder_target_module": [],
        "text_encoder_target_name": [name for name in kind.modules if name.startswith("text_model.")],
        "module_algo_map": {},
        "name_algo_map": each,
        "use_fnmatch": True,
        "exclude_name": [],
    }
    text = _text_model(pipeline)
    options = {"algo": kind.algorithm, "preset": BASE, **kind.options}
    return create_network(1.0, kind.rank, _ALPHAS[0], None, text, pipeline.unet, **options)


def _responses(module: torch.nn.Module, layer: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What the adapter adds to the layer's output; LyCORIS' forward takes the layer's own from `org_forward`."""
    with torch.no_grad():
        return module(inputs) - layer(inputs)


def _norm_changes(module: torch.nn.Module, layer: Any) -> dict[str, torch.Tensor]:
    signs = torch.ones(layer.weight.numel(), dtype=layer.weight.dtype)
    signs[::2] = -1  # has mean 0 and variance 1 in every group: a norm leaves it as it is
    shape = (1, -1, 1, 1) if isinstance(layer, torch.nn.GroupNorm) else (1, -1)
    there, back = (_responses(module, layer, (sign * signs).reshape(shape)).flatten() for sign in (1, -1))
    return {"weight": (there - back) / 2 * signs, "bias": (there + back) / 2}


def changes(module: torch.nn.Module, layer: Any) -> dict[str, torch.Tensor]:
    """ΔW, and Δb where it is not zero, of an adapter's module: its forward on unit inputs less the layer's.

    Convolutions have stride 1 and keep the picture's size.
    """
    weight = layer.weight
    if weight.ndim == 1:
        return _norm_changes(module, layer)
    units = torch.eye(weight.shape[1], dtype=weight.dtype)
    if weight.ndim == 4:
        size = weight.shape[2]
        images = torch.zeros(*units.shape, 2 * size - 1, 2 * size - 1, dtype=weight.dtype)
        images[:, :, size - 1, size - 1] = units
        units = images
    still = _responses(module, layer, torch.zeros_like(units[:1]))
    response = _responses(module, layer, units) - still
    if weight.ndim == 4:
        seen = slice(size // 2, size // 2 + size)
        response = response[:, :, seen, seen].flip(2, 3)
    changed = {"weight": response.transpose(0, 1)}
    bias = still.reshape(weight.shape[0], -1)[:, -1]
    return changed | ({"bias": bias} if bias.any() else {})


def _draw(module: torch.nn.Module, rng: np.random.Generator) -> Iterator[tuple[torch.nn.Parameter, Any, Any, float]]:
    """Of each parameter: where it begins, the noise around it, and how far it goes (0: as far as the size asks)."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, parameter in sorted(trained.items()):
        noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype(np.float32))
        start = parameter.detach().clone()
        if name not in _STARTING:
            yield parameter, torch.zeros_like(start), noise, 0.0
        else:
            yield parameter, start, start * noise, _FIXED.get(name, 0.0)


def fill(module: torch.nn.Module, layer: Any, share: float | None, rng: np.random.Generator) -> None:
    """Random values for all parameters, of such a size that ‖ΔW‖/‖W‖ is `share`.

    The size is rounded, so that the last bits of a machine's sums do not reach the file.
    """
    drawn = list(_draw(module, rng))

    def at(size: float) -> float:
        for parameter, start, noise, fixed in drawn:
            parameter.data = start + (fixed or size) * noise
        return float(changes(module, layer)["weight"].norm() / layer.weight.detach().norm())

    if share is None:
        at(0.3)
        return
    low, high = math.log(1e-4), math.log(10.0)
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if at(math.exp(middle)) < share else (low, middle)
    at(float(f"{math.exp(low):.2g}"))


def _metadata(kind: Kind) -> dict[str, str]:
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(kind.rank),
        "ss_network_alpha": str(_ALPHAS[0]),
        "ss_network_args": json.dumps({"algo": kind.algorithm, **kind.options}),
        "format": "pt",
    }


def _write_lycoris(kind: Kind, pipeline: Any, path: Path, rng: np.random.Generator) -> None:
    made, places = network(kind, pipeline), layers(pipeline)
    for lora in made.loras:
        fill(lora, places[lora.lora_name], kind.share, rng)
    biases = {
        f"{lora.lora_name}.diff_b": 0.1 * torch.from_numpy(rng.standard_normal(lora.dim).astype(np.float32))
        for lora in made.loras
        if kind.biases and places[lora.lora_name].bias is not None
    }
    made.apply_to(None, None, True, True)
    made.save_weights(str(path), kind.dtype, _metadata(kind))
    if biases:  # ComfyUI's extraction writes these beside a LoRA; LyCORIS does not
        save_file({**load_file(path), **biases}, path, {"format": "pt"})


def rotating(layer: torch.nn.Module, size: int) -> torch.nn.Module:
    """The layer inside peft's OFT with blocks of `size`: what OneTrainer trains as OFT_2."""
    from peft import OFTConfig, inject_adapter_in_model

    holder = torch.nn.Module()
    holder.layer = layer
    inject_adapter_in_model(OFTConfig(r=0, oft_block_size=size, target_modules=["layer"]), holder)
    return holder.get_submodule("layer")


def _flat(name: str) -> str:
    return f"lora_{'te' if name.startswith('text_model.') else 'unet'}_{name}".replace(".", "_")


def _write_peft(kind: Kind, pipeline: Any, path: Path, rng: np.random.Generator) -> None:
    tensors, places = {}, layers(pipeline)
    for name in map(_flat, kind.modules):
        module = rotating(places[name], kind.rank)
        fill(module, places[name], kind.share, rng)
        tensors[f"{name}.oft_R.weight"] = module.get_parameter("oft_R.default.weight").detach()
    save_file(tensors, path, {"format": "pt"})


def sort_metadata(path: Path) -> None:
    """Give the metadata an order; safetensors writes its entries in one of chance."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    sorted_header = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    path.write_bytes(data[:8] + sorted_header + data[8 + size :])


def write(name: str, path: Path) -> None:
    """Write one kind's file, the same bytes every time."""
    kind = KINDS[name]
    make = _write_peft if kind.algorithm == "peft" else _write_lycoris
    make(kind, loaded(), path, np.random.default_rng(list(name.encode())))
    sort_metadata(path)


def read(name: str, path: Path, pipeline: Any) -> dict[str, torch.nn.Module]:
    """The trainer's modules of a kind with the values of its file, by name. They are not applied to the pipeline."""
    kind, tensors = KINDS[name], load_file(path)
    if kind.algorithm == "peft":
        places = layers(pipeline)
        modules = {flat: rotating(places[flat], kind.rank) for flat in map(_flat, kind.modules)}
        for flat, module in modules.items():
            module.get_parameter("oft_R.default.weight").data = tensors[f"{flat}.oft_R.weight"]
        return modules
    modules = {lora.lora_name: lora for lora in network(kind, pipeline).loras}
    for flat, module in modules.items():
        own = {key.removeprefix(f"{flat}."): value for key, value in tensors.items() if key.startswith(f"{flat}.")}
        if kind.biases:
            own.pop("diff_b", None)
        wrong = module.load_state_dict(own, strict=False).unexpected_keys
        assert own and not wrong, (flat, wrong)  # T-LoRA's state also has what it began with, which no file holds
    return modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(KINDS)} (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names or KINDS:
        write(name, options.folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
