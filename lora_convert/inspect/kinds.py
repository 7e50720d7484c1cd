"""Files that hold no LoRA-like adapter, or one for a base model without a table: what they are instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_convert.containers import Header

__all__ = ["OTHER_BASES", "OtherKind", "names_other_base", "other_kind"]


@dataclass(frozen=True, slots=True)
class OtherKind:
    """A row: the kind's name, how to say it, and the test on the tensor names."""

    kind: str
    title: str
    test: Callable[[Header], bool]


def _any(*patterns: str) -> Callable[[Header], bool]:
    """A test: some tensor's name begins like one of the patterns."""
    compiled = re.compile("|".join(patterns))
    return lambda header: any(compiled.match(name) for name in header.tensors)


OTHER_KINDS: Sequence[OtherKind] = (
    OtherKind(
        "ip-adapter",
        "an IP-Adapter",
        _any(
            r"(image_proj|image_proj_model|ip_adapter|adapter_modules)\.",
            r"\d+\.to_[kv]_ip\.weight",
            r"\d+\.to_(q|k|v|out)_lora\.",  # the LoRA inside a FaceID adapter
        ),
    ),
    OtherKind(
        "controlnet",
        "a ControlNet",
        _any(
            r"lora_controlnet$",
            r"control_model\.",
            r"controlnet_(cond_embedding|down_block|mid_block)",
            r"(input_hint_block|zero_convs)\.",
        ),
    ),
    OtherKind(
        "checkpoint",
        "a full checkpoint",
        _any(r"model\.diffusion_model\..*\.(weight|bias)$", r"cond_stage_model\.", r"conditioner\.embedders\."),
    ),
    OtherKind("vae", "a VAE", _any(r"first_stage_model\.", r"(post_)?quant_conv\.")),
    OtherKind(
        "checkpoint",
        "a whole UNet",
        _any(r"(unet\.)?(down_blocks\.0\.resnets\.0\.conv1|input_blocks\.1\.0\.in_layers\.2)\.weight$"),
    ),
    OtherKind(
        "text-encoder",
        "a whole text encoder",
        _any(r"(text_model\.)?embeddings\.token_embedding\.weight$", r"text_model\.encoder\.layers\.0\.layer_norm1\."),
    ),
    OtherKind(
        "optimizer",
        "the state of an optimizer, as AUTOMATIC1111 saves it beside an embedding (the file without .optim)",
        _any(r"optimizer_state_dict\."),
    ),
)
"""Tried in this order on files without any adapter that the tables explain."""


def other_kind(header: Header) -> OtherKind | None:
    """What the file is, if it is one of the kinds known by name."""
    return next((kind for kind in OTHER_KINDS if kind.test(header)), None)


OTHER_BASES: Mapping[str, str] = {
    r".*double_blocks[._]\d+[._]img_mod": "Flux",
    r".*(double_blocks|single_blocks)[._]\d+[._](img_attn|txt_attn|linear1|linear2)": "Flux",
    r".*single_transformer_blocks[._]\d+": "Flux",
    r".*joint_blocks[._]\d+": "Stable Diffusion 3",
    r".*transformer_blocks[._]\d+[._](attn[._]add_[qkv]_proj|ff_context)": "Stable Diffusion 3 or Flux",
    r"(lora_unet_|diffusion_model\.|transformer\.)?blocks[._]\d+[._](self_attn|cross_attn)": "Wan",
    r".*(img_attn_qkv|txt_attn_qkv)": "HunyuanVideo",
    r".*layers[._]\d+[._](attention[._]|feed_forward[._]|adaLN_modulation)": "Lumina or Z-Image",
    r".*(lora_prior_unet_|effnet)": "Stable Cascade",
}
"""Module names of base models without a table yet, most telling first."""


def names_other_base(name: str) -> str | None:
    """The base model without a table that a module's name is of, if it is of one."""
    return next((title for pattern, title in OTHER_BASES.items() if re.match(pattern, name)), None)
