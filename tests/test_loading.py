from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LORA, lora
from test_convert import Deltas

import lora_convert

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.torch import save_file  # noqa: E402

from lora_convert.converters.adapters import BaseNeeded, Dora  # noqa: E402
from lora_convert.families import FAMILIES  # noqa: E402
from lora_convert.runtime.loading import LoadingError, load_adapter  # noqa: E402

Factors = Mapping[str, tuple[Any, Any, float]]  # module: A, B, alpha

UNET_AND_FIRST_ENCODER = (
    "unet.conv_in",
    "unet.time_embedding.linear_1",
    "unet.down_blocks.1.attentions.0.proj_in",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.mid_block.resnets.1.conv2",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.11.mlp.fc1",
)
SECOND_ENCODER = (
    "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc2",
    "text_encoder_2.text_projection",
)
FILES = {
    "sd15": ("sd15", UNET_AND_FIRST_ENCODER),
    "sd15-unet": ("sd15", UNET_AND_FIRST_ENCODER[:7]),
    "sd15-text": ("sd15", UNET_AND_FIRST_ENCODER[7:]),
    "sdxl": ("sdxl", UNET_AND_FIRST_ENCODER + SECOND_ENCODER),
    "sdxl-second-text": ("sdxl", SECOND_ENCODER),
    "sdxl-refiner": ("sdxl-refiner", UNET_AND_FIRST_ENCODER[:2] + SECOND_ENCODER),
}


def factors(family: str, names: tuple[str, ...], dtype: Any) -> Factors:
    """Random factors whose ranks and scales differ from module to module."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for number, name in enumerate(names):
        out, inner, *kernel = FAMILIES[family].modules[name].shape
        rank = 2 + number % 3
        down = torch.randn(rank, inner, *kernel, generator=generator).to(dtype)
        up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator).to(dtype)
        made[name] = (down, up, 1.0 + number)
    return made


def write(path: Path, modules: Factors, extra: Mapping[str, Any] | None = None, *flags: str) -> Path:
    """Write a canonical file: PEFT's names, and the scales in the header, with what else is true of every component."""
    tensors = dict(extra or {})
    header: dict[str, Any] = {}
    for name, (down, up, alpha) in modules.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
        component, _, module = name.partition(".")
        module = module.removeprefix("text_model.")
        pattern = f"^{module}" if component == "unet" else module
        header.setdefault(f"{component}.r", 1)
        header.setdefault(f"{component}.lora_alpha", 1.0)
        header.setdefault(f"{component}.rank_pattern", {})[pattern] = down.shape[0]
        header.setdefault(f"{component}.alpha_pattern", {})[pattern] = alpha
        header.setdefault(f"{component}.target_modules", []).append(module)
        header |= {f"{component}.{flag}": True for flag in flags}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    return path


@pytest.mark.parametrize("file", FILES)
def test_every_module_arrives_with_its_change(file: str, tmp_path: Path) -> None:
    family, names = FILES[file]
    modules = factors(family, names, torch.float16)
    loaded = load_adapter(write(tmp_path / "lora.safetensors", modules), family)
    assert set(loaded.deltas) == set(names)
    assert loaded.warnings == ()
    for name, (down, up, alpha) in modules.items():
        delta = loaded.deltas[name]
        assert tuple(delta.shape) == FAMILIES[family].modules[name].shape
        rank = down.shape[0]
        expected = alpha / rank * torch.einsum("or,ri->oi", up.double().flatten(1), down.double().flatten(1))
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta.double().flatten(1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16",), ("float16", "bfloat16")])
def test_no_value_is_rounded_by_loading(dtypes: tuple[str, ...], tmp_path: Path) -> None:
    names = UNET_AND_FIRST_ENCODER[2:4] + UNET_AND_FIRST_ENCODER[7:]
    modules = {
        name: factors("sd15", (name,), getattr(torch, dtypes[number % len(dtypes)]))[name]
        for number, name in enumerate(names)
    }
    loaded = load_adapter(write(tmp_path / "lora.safetensors", modules), "sd15")
    for name, (down, up, alpha) in modules.items():
        expected = alpha / down.shape[0] * (up.double().flatten(1) @ down.double().flatten(1))
        assert torch.equal(loaded.deltas[name].flatten(1), expected.float())


def test_modules_of_another_family_are_not_counted(tmp_path: Path) -> None:
    modules = factors("sdxl", UNET_AND_FIRST_ENCODER[:1] + SECOND_ENCODER, torch.float16)
    loaded = load_adapter(write(tmp_path / "lora.safetensors", modules), "sd15")
    assert list(loaded.deltas) == ["unet.conv_in"]


def test_warnings_of_the_loader_are_returned_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules = factors("sd15", UNET_AND_FIRST_ENCODER, torch.float16)
    stray = {"text_encoder.text_model.encoder.layers.99.mlp.fc1.lora_A.weight": torch.zeros(2, 768)}
    handlers = logging.getLogger("diffusers").handlers
    capsys.readouterr()
    loaded = load_adapter(write(tmp_path / "lora.safetensors", modules, stray), "sd15")
    assert any("layers.99.mlp.fc1" in warning for warning in loaded.warnings)
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger("diffusers").handlers is handlers


def test_what_the_loader_refuses_is_reported_in_its_words(tmp_path: Path) -> None:
    modules = factors("sd15", ("text_encoder.text_model.encoder.layers.0.mlp.fc1",), torch.float16)
    with pytest.raises(LoadingError, match="ValueError: Could not automatically infer state dict type"):
        load_adapter(write(tmp_path / "lora.safetensors", modules), "sd15")


def magnitudes(family: str, names: tuple[str, ...]) -> dict[str, Any]:
    """A magnitude for every module, as peft stores it."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: FAMILIES[family].modules[name].shape for name in names}
    return {
        f"{name}.lora_magnitude_vector.weight": 1
        + torch.rand((1, shape[0], 1, 1) if len(shape) == 4 else shape[:1], generator=generator)
        for name, shape in shapes.items()
    }


def biases(family: str, names: tuple[str, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        f"{name}.lora_B.bias": torch.randn(FAMILIES[family].modules[name].shape[0], generator=generator)
        for name in names
    }


@pytest.mark.parametrize("file", ["sd15", "sdxl"])
def test_magnitudes_arrive(file: str, tmp_path: Path) -> None:
    """Without the base model's weights: the norm that peft begins with is that of zeros."""
    family, names = FILES[file]
    extra = magnitudes(family, names)
    path = write(tmp_path / "dora.safetensors", factors(family, names, torch.float32), extra, "use_dora")
    loaded = load_adapter(path, family)
    assert set(loaded.adapters) == set(names) and loaded.warnings == ()
    for name in names:
        live = loaded.adapters[name]
        assert isinstance(live, Dora)
        assert np.array_equal(live.magnitude, extra[f"{name}.lora_magnitude_vector.weight"].flatten().numpy())
        with pytest.raises(BaseNeeded, match="base model's weights"):
            loaded.deltas[name]


def test_biases_arrive_with_their_scale(tmp_path: Path) -> None:
    names = UNET_AND_FIRST_ENCODER
    modules, extra = factors("sd15", names, torch.float32), biases("sd15", names)
    loaded = load_adapter(write(tmp_path / "bias.safetensors", modules, extra, "lora_bias"), "sd15")
    assert set(loaded.adapters) == set(names)
    for name, (down, _, alpha) in modules.items():
        expected = alpha / down.shape[0] * extra[f"{name}.lora_B.bias"].double().numpy()
        assert np.allclose(loaded.adapters[name].deltas()["bias"], expected, rtol=1e-6)


@pytest.mark.parametrize(("flag", "extra"), [("use_dora", magnitudes), ("lora_bias", biases)])
def test_a_part_that_only_some_modules_have_is_an_error(flag: str, extra: Any, tmp_path: Path) -> None:
    """The loader leaves the others' on the meta device, where the first picture would fail."""
    names = UNET_AND_FIRST_ENCODER[:3]
    path = write(tmp_path / "some.safetensors", factors("sd15", names, torch.float32), extra("sd15", names[:2]), flag)
    with pytest.raises(LoadingError, match=f"{names[2]}: the loader adapted it but gave it no values"):
        load_adapter(path, "sd15")


TEXT_ENCODER_PARTS = {
    "self_attn_q_proj": (768, 768),
    "self_attn_k_proj": (768, 768),
    "mlp_fc1": (3072, 768),
    "mlp_fc2": (768, 3072),
}
COMPOSED = {
    "attention and feed-forward": ("lora_te_", ["self_attn_q_proj", "mlp_fc1"], "sd15"),
    "no output projection": ("lora_te_", ["self_attn_q_proj", "self_attn_k_proj", "mlp_fc1", "mlp_fc2"], "sd15"),
    "feed-forward alone": ("lora_te_", ["mlp_fc1", "mlp_fc2"], "sd15"),
    "one layer alone, SDXL": ("lora_te1_", ["mlp_fc2"], "sdxl"),
}


@pytest.mark.parametrize("case", COMPOSED)
@pytest.mark.parametrize("alpha", ["fold", "header"])
def test_every_combination_of_text_encoder_modules_loads(case, alpha, tmp_path, write):
    """diffusers refuses or drops some of these in other spellings; ours must arrive whole."""
    prefix, parts, family = COMPOSED[case]
    tensors = {}
    for number, part in enumerate(parts):
        name = f"{prefix}text_model_encoder_layers_{number}_{part}"
        tensors |= lora(
            name, *TEXT_ENCODER_PARTS[part], rank=number + 1, alpha=number + 2, dtype=np.float32, seed=number
        )
    if family == "sdxl":  # a projection alone in the second encoder, of another rank
        tensors |= lora("lora_te2_text_projection", 1280, 1280, rank=3, alpha=1, dtype=np.float32)
    assert_loads(write(tensors), family, alpha, tmp_path)


@pytest.mark.parametrize("name", ["k_sdxl_excerpt_f32", "k_sd15_excerpt_f32", "k_sd21_lora", "simo_sd15_safetensors"])
@pytest.mark.parametrize("alpha", ["fold", "header"])
def test_converted_fixtures_load(name, alpha, tmp_path):
    family = {"k_sdxl": "sdxl", "k_sd21": "sd21"}.get(name[:6], "sd15")
    assert_loads(LORA / f"{name}.safetensors", family, alpha, tmp_path)


def assert_loads(path, family, alpha, tmp_path):
    """Convert, load with diffusers' own code, and compare every module with the source's ΔW."""
    result = lora_convert.convert(path, tmp_path / "o.safetensors", alpha=alpha, family=family)
    assert result.ok, result.findings
    loaded = load_adapter(result.outputs[0].path, family)
    source = Deltas(path, family)
    assert set(loaded.deltas) == set(source)
    for name in list(source)[:: max(1, len(source) // 30)]:
        error = np.linalg.norm(np.asarray(loaded.deltas[name], np.float64) - source[name]) / np.linalg.norm(
            source[name]
        )
        assert error <= 3e-4, name
