"""The real classes behind the family tables, built without weights.

The constructor arguments are those of the published base models' `config.json`; arguments that equal the class's
default are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lora_convert.families import FAMILIES

if TYPE_CHECKING:
    import torch

UNETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "unet_sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "unet_sd21": {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "unet_sdxl": {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "unet_sdxl_refiner": {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (384, 768, 1536, 1536),
            "transformer_layers_per_block": 4,
            "cross_attention_dim": 1280,
            "attention_head_dim": (6, 12, 24, 24),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        # The embedded base models: their big siblings' blocks, so few channels that both fit into this package.
        "unet_tiny_sd15": {
            "sample_size": 16,
            "block_out_channels": (32, 64, 64, 64),
            "norm_num_groups": 8,
            "cross_attention_dim": 64,
            "attention_head_dim": 2,
        },
        "unet_tiny_sdxl": {
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (32, 56, 32),
            "norm_num_groups": 8,
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 96,
            "attention_head_dim": (2, 4, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 16,
            "projection_class_embeddings_input_dim": 160,
        },
    }
)
"""Arguments of `diffusers.UNet2DConditionModel` by table."""

_TINY_VOCABULARY = {"vocab_size": 618, "bos_token_id": 616, "eos_token_id": 617, "pad_token_id": 617}

TEXT_ENCODERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "clip_l": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
            "hidden_act": "quick_gelu",
        },
        # Stable Diffusion 2.x takes the output before the last of OpenCLIP-H's 24 layers and is published without it.
        "openclip_h": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 1024,
            "hidden_act": "gelu",
        },
        "openclip_bigg": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
        "clip_tiny_sd15": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 64,
            "hidden_act": "quick_gelu",
            **_TINY_VOCABULARY,
        },
        "clip_tiny_sdxl": {
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 32,
            "hidden_act": "quick_gelu",
            **_TINY_VOCABULARY,
        },
        "openclip_tiny_sdxl": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "projection_dim": 64,
            "hidden_act": "gelu",
            **_TINY_VOCABULARY,
        },
    }
)
"""Arguments of `transformers.CLIPTextConfig` by table."""

PIPELINES: Mapping[str, str] = MappingProxyType(
    {
        "sd15": "StableDiffusionPipeline",
        "sd21": "StableDiffusionPipeline",
        "sdxl": "StableDiffusionXLPipeline",
        "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
        "tiny-sd15": "StableDiffusionPipeline",
        "tiny-sdxl": "StableDiffusionXLPipeline",
    }
)
"""Classes in diffusers by family."""


def build(table: str, *, projection: bool = True) -> torch.nn.Module:
    """Build the model that a table describes, on the meta device: names and shapes, no memory for weights.

    A text encoder is `CLIPTextModelWithProjection`, or `CLIPTextModel` without `projection`; a UNet ignores that.
    Raises KeyError for a table without an entry here.
    """
    if table in UNETS:
        from diffusers import UNet2DConditionModel

        return _on_meta(UNet2DConditionModel, **UNETS[table])

    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**TEXT_ENCODERS[table])
    return _on_meta(CLIPTextModelWithProjection if projection else CLIPTextModel, config)


def _on_meta(model_class: Any, *arguments: Any, **options: Any) -> torch.nn.Module:
    import torch

    with torch.device("meta"):
        model: torch.nn.Module = model_class(*arguments, **options)
    return model


def build_component(family: str, component: str) -> torch.nn.Module:
    """Build a component as the family's pipeline has it, on the meta device.

    Raises KeyError for an unknown family, ValueError for a component that the family does not have.
    """
    described = FAMILIES[family].component(component)
    if described is None:
        raise ValueError(f"{family} has no component {component}")
    return build(described.table, projection="text_projection" not in described.without)


def canonical_prefix(model: torch.nn.Module) -> str:
    """What canonical Diffusers names have before the paths of this live component.

    transformers 5.6 and later have flattened `CLIPTextModel`; the canonical names keep its `text_model.`.
    """
    from transformers import CLIPTextModel

    return "text_model." if isinstance(model, CLIPTextModel) and not hasattr(model, "text_model") else ""


def weight_modules(model: torch.nn.Module) -> Mapping[str, torch.nn.Module]:
    """The modules of a component that bear a weight, by canonical path, in the order of its `named_modules()`."""
    prefix = canonical_prefix(model)
    return {
        prefix + path: module for path, module in model.named_modules() if getattr(module, "weight", None) is not None
    }
