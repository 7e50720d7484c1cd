"""What single-file checkpoints call a model's tensors: the layout of LDM (Stable Diffusion 1 and 2) and SGM (SDXL).

The UNet's and text encoders' names are those of the families' tables behind a prefix for each component. Facts:
CompVis/stable-diffusion and Stability-AI/generative-models (`configs/`), OpenCLIP `transformer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from lora_convert.families import Module

__all__ = ["PREFIXES", "VAE_PREFIX", "WRITTEN", "component_names", "original_names", "vae_name"]

_UNET = "model.diffusion_model."
_SD1 = {"unet": _UNET, "text_encoder": "cond_stage_model.transformer."}
_SD2 = {"unet": _UNET, "text_encoder": "cond_stage_model.model."}
_SDXL = {
    "unet": _UNET,
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
_REFINER = {"unet": _UNET, "text_encoder_2": "conditioner.embedders.0.model."}

PREFIXES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "sd15": _SD1,
        "sd21": _SD2,
        "sdxl": _SDXL,
        "sdxl-refiner": _REFINER,
        "tiny-sd15": _SD1,
        "tiny-sdxl": _SDXL,
    }
)
"""What the names of a component begin with in a checkpoint, by family."""

WRITTEN = frozenset({"sd15", "sdxl", "tiny-sd15", "tiny-sdxl"})
"""Families whose checkpoints can be written from a Diffusers folder. SD 2.x has an OpenCLIP layer that folders lack."""

VAE_PREFIX = "first_stage_model."

_PLAIN = frozenset({"positional_embedding", "text_projection"})
"""Parameters of OpenCLIP that belong to no module of their own, so that their names have no `.weight`."""


def original_names(module: Module, parameter: str) -> Iterator[tuple[str, bool]]:
    """Names of a module's `weight` or `bias` in a checkpoint, without prefix, the usual one first.

    Each with whether the tensor is the transpose of the Diffusers one. Blocks of rows share the name of what they are
    blocks of.
    """
    original = module.original
    if module.rows is not None:
        yield f"{original}_{parameter}", False  # torch.nn.MultiheadAttention's `in_proj_weight`
    if original in _PLAIN and parameter == "weight":
        yield original, module.mark == "transposed"
    yield f"{original}.{parameter}", False
    if original.startswith("text_model."):
        yield f"{original.removeprefix('text_model.')}.{parameter}", False  # as saved from transformers 5.6 and later


def component_names(module: Module, parameter: str) -> Iterator[tuple[str, bool]]:
    """Names of a module's `weight` or `bias` in its component's file of a Diffusers folder; none is transposed."""
    yield f"{module.path}.{parameter}", False
    if module.path.startswith("text_model."):
        yield f"{module.path.removeprefix('text_model.')}.{parameter}", False


_VAE_RENAMES = (
    (r"downsamplers\.0\.conv", "downsample.conv"),
    (r"upsamplers\.0\.conv", "upsample.conv"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.(?:to_q|query)", "mid.attn_1.q"),
    (r"mid_block\.attentions\.0\.(?:to_k|key)", "mid.attn_1.k"),
    (r"mid_block\.attentions\.0\.(?:to_v|value)", "mid.attn_1.v"),
    (r"mid_block\.attentions\.0\.(?:to_out\.0|proj_attn)", "mid.attn_1.proj_out"),
    (r"resnets\.(\d+)", r"block.\1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"down_blocks\.(\d+)", r"down.\1"),
)
"""Parts of `AutoencoderKL`'s names in Diffusers (today's and, for the attention, its first), and LDM's."""

_UP_BLOCK = re.compile(r"decoder\.up_blocks\.(\d+)\.")
_VAE_MATRIX = re.compile(r"\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight$")


def vae_name(name: str, up_blocks: int) -> tuple[str, bool]:
    """LDM's name of a tensor of the VAE, without prefix, and whether its matrix is a 1×1 convolution there.

    LDM numbers the decoder's blocks from the other end; `up_blocks` is how many there are.
    """
    renamed = _UP_BLOCK.sub(lambda match: f"decoder.up.{up_blocks - 1 - int(match[1])}.", name)
    for pattern, original in _VAE_RENAMES:
        renamed = re.sub(rf"(?<![^.]){pattern}(?![^.])", original, renamed)
    return renamed, _VAE_MATRIX.search(renamed) is not None
