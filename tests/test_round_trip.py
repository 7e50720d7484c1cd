"""Kohya -> Diffusers -> Kohya for composed files: the same tensors with alpha in the header, the same ΔW without."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from conftest import read_all
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_convert import Deltas

import lora_convert
from lora_convert.families import FAMILIES
from lora_convert.report import severest

PLACES = {
    "sd15": (
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", (320, 768)),
        ("lora_unet_mid_block_attentions_0_proj_in", (1280, 1280, 1, 1)),
        ("lora_unet_up_blocks_3_resnets_0_conv1", (320, 960, 3, 3)),
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", (3072, 768)),
        ("lora_te_text_model_encoder_layers_3_self_attn_q_proj", (768, 768)),
    ),
    "sdxl": (
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", (640, 2048)),
        ("lora_unet_input_blocks_3_0_op", (320, 320, 3, 3)),
        ("lora_unet_label_emb_0_0", (1280, 2816)),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc2", (768, 3072)),
        ("lora_te2_text_model_encoder_layers_30_self_attn_k_proj", (1280, 1280)),
        ("lora_te2_text_projection", (1280, 1280)),
    ),
}
DTYPES = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.float32: np.float32}


@st.composite
def kohya_files(draw: st.DrawFn) -> tuple[str, bytes]:
    family = draw(st.sampled_from(sorted(PLACES)))
    dtype = draw(st.sampled_from(sorted(DTYPES, key=str)))
    places = draw(st.lists(st.sampled_from(PLACES[family]), min_size=1, unique=True))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    tensors = {}
    for name, shape in places:
        rank = draw(st.integers(1, 5))
        ones = (1,) * (len(shape) - 2)
        down = random.standard_normal((rank, *shape[1:])).astype(np.float32) / 16
        up = random.standard_normal((shape[0], rank, *ones)).astype(np.float32) / 64
        tensors[f"{name}.lora_down.weight"] = torch.from_numpy(down).to(dtype)
        tensors[f"{name}.lora_up.weight"] = torch.from_numpy(up).to(dtype)
        alpha = draw(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 16.0, -1.0]))
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return family, save(tensors)


@settings(max_examples=40, deadline=None)
@given(kohya_files())
def test_round_trip(problem: tuple[str, bytes]) -> None:
    family, data = problem
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "k.safetensors").write_bytes(data)
        for alpha in ("header", "fold"):
            there = lora_convert.convert(io.BytesIO(data), folder / f"{alpha}.safetensors", alpha=alpha, family=family)
            assert there.ok, there.findings
            back = lora_convert.convert(
                folder / f"{alpha}.safetensors", folder / f"back-{alpha}.safetensors", to="kohya", family=family
            )
            assert back.ok and severest(back.findings) != "error"
        first, second = (read_bits(folder / name) for name in ("k.safetensors", "back-header.safetensors"))
        assert first == second
        source, folded = (Deltas(folder / name, family) for name in ("k.safetensors", "back-fold.safetensors"))
        assert set(source) == set(folded) <= set(FAMILIES[family].modules)
        limit = {"float16": 3e-4, "bfloat16": 2.4e-3, "float32": 1e-6}[first[next(iter(first))][0]]
        for module in source:
            error = np.linalg.norm(folded[module] - source[module]) / np.linalg.norm(source[module])
            assert error <= limit


def read_bits(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in read_all(path).items()}
