"""A base model's weights come the same out of every layout, and what cannot be read is said in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_hub import COMMITS, Hub, hub  # noqa: F401 (a fixture)

from lora_convert.converters.base import BaseWeights, open_base
from lora_convert.converters.checkpoint import original_names, vae_name
from lora_convert.errors import FileError, UsageError
from lora_convert.families import FAMILIES, Module
from lora_convert.families.embedded import NAMES, folder

Tensors = dict[str, np.ndarray]
UNET = "unet/diffusion_pytorch_model.safetensors"
PREFIXES = {
    "tiny-sd15": {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."},
    "tiny-sdxl": {
        "unet": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}


def stored(name: str) -> Tensors:
    """The tensors of an embedded model's UNet and text encoders by canonical name (`unet.conv_in.weight`)."""
    tensors = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for path in (folder(name) / component).glob("*.safetensors"):
            content = load_file(path)
            bare = "embeddings.token_embedding.weight" in content
            tensors |= {f"{component}.{'text_model.' * bare}{key}": value for key, value in content.items()}
    return tensors


def checkpoint(name: str) -> Tensors:
    """An embedded model as LDM or SGM would store it, put together from the facts and not by the code under test."""
    held = stored(name)
    found: Tensors = {}
    for component, prefix in PREFIXES[name].items():
        for module in FAMILIES[name].component(component).modules.values():
            for parameter in ("weight", "bias"):
                value = held.get(f"{module.name}.{parameter}")
                if value is None or module.rows is not None:
                    continue
                if module.original in ("positional_embedding", "text_projection"):
                    found[prefix + module.original] = value.T.copy() if module.mark == "transposed" else value
                else:
                    found[f"{prefix}{module.original}.{parameter}"] = value
    attention = "text_encoder_2.text_model.encoder.layers.{}.self_attn.{}_proj.{}"
    for layer in range(2 if name == "tiny-sdxl" else 0):
        for parameter in ("weight", "bias"):
            fused = [held[attention.format(layer, letter, parameter)] for letter in "qkv"]
            key = f"{PREFIXES[name]['text_encoder_2']}transformer.resblocks.{layer}.attn.in_proj_{parameter}"
            found[key] = np.concatenate(fused)
    return found


def assert_same_weights(base: BaseWeights, name: str, change: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
    held = stored(name)
    assert base.family == name
    for module in FAMILIES[name].modules.values():
        parameters = base.of([module])
        assert parameters.keys() == {part for part in ("weight", "bias") if f"{module.name}.{part}" in held}
        for part, values in parameters.items():
            truth = held[f"{module.name}.{part}"]
            assert values.dtype == np.float32
            assert values.shape == (module.shape if part == "weight" else module.shape[:1])
            expected = (change(truth) if change else truth).astype(np.float32)
            np.testing.assert_array_equal(values, expected.reshape(values.shape), err_msg=module.name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of tiny-sd15 to change."""
    return Path(shutil.copytree(folder("tiny-sd15"), tmp_path / "my-model"))


def rewritten(path: Path, change: Callable[[Tensors], Mapping[str, np.ndarray]]) -> None:
    tensors = change(load_file(path))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, {"format": "pt"})


def shard(path: Path, parts: int = 3, variant: str = "") -> None:
    """Cut a weight file into several, as save_pretrained does for large models."""
    tensors = load_file(path)
    names = sorted(tensors)
    weight_map = {}
    for number in range(parts):
        part = f"{path.stem}{variant}-{number + 1:05}-of-{parts:05}.safetensors"
        mine = names[number::parts]
        save_file({name: tensors[name] for name in mine}, path.with_name(part), {"format": "pt"})
        weight_map |= dict.fromkeys(mine, part)
    index = f"{path.name}.index{variant}.json"
    path.with_name(index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    path.unlink()


def renamed(path: Path, name: str) -> None:
    path.rename(path.with_name(name))


@pytest.mark.parametrize("name", NAMES)
def test_an_embedded_model(name):
    with open_base(name) as base:
        assert_same_weights(base, name)


LAYOUTS: Mapping[str, Callable[[Path], None]] = {
    "as it is": lambda model: None,
    "in shards": lambda model: shard(model / UNET),
    "a variant in shards": lambda model: shard(model / UNET, variant=".fp16"),
    "a variant": lambda model: renamed(model / UNET, "diffusion_pytorch_model.fp16.safetensors"),
    "text_model": lambda model: rewritten(
        model / "text_encoder/model.safetensors",
        lambda tensors: {f"text_model.{name}": value for name, value in tensors.items()},
    ),
    "linear proj_in": lambda model: rewritten(
        model / UNET,
        lambda tensors: {
            name: value.reshape(value.shape[:2]) if ".proj_" in name and value.ndim == 4 else value
            for name, value in tensors.items()
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder(layout, model):
    LAYOUTS[layout](model)
    with open_base(model, "tiny-sd15") as base:
        assert_same_weights(base, "tiny-sd15")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_dtypes_are_widened(dtype, model):
    for path in (model / UNET, model / "text_encoder/model.safetensors"):
        tensors = {name: value.astype(dtype) for name, value in load_file(path).items()}
        write_any(path, tensors)
    with open_base(model) as base:
        assert_same_weights(base, "tiny-sd15", lambda values: values.astype(dtype))


CODES = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "uint8": "U8",
}


def write_any(path: Path, tensors: Tensors) -> None:
    """Write safetensors of any dtype, which the library's numpy half does not."""
    header, data = {}, b""
    for name, value in tensors.items():
        content = np.ascontiguousarray(value).tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": CODES[value.dtype.name], "shape": list(value.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint(name, tmp_path):
    extras = {"model_ema.decay": np.ones(1, np.float32), "first_stage_model.encoder.conv_in.bias": np.ones(3, "f4")}
    save_file(checkpoint(name) | extras, tmp_path / "model.safetensors")
    with open_base(tmp_path / "model.safetensors", name) as base:
        assert_same_weights(base, name)


def without_text_model(name: str) -> str:
    return name.replace("transformer.text_model.", "transformer.")


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("tiny-sd15", without_text_model),
        ("tiny-sdxl", without_text_model),
        ("tiny-sd15", lambda name: name if not name.startswith("cond_stage") else f"lost.{name}"),
    ],
)
def test_checkpoints_with_other_names(name, rename, tmp_path):
    save_file({rename(key): value for key, value in checkpoint(name).items()}, tmp_path / "model.safetensors")
    encoder = FAMILIES[name].modules["text_encoder.text_model.final_layer_norm"]
    with open_base(tmp_path / "model.safetensors") as base:
        if rename is without_text_model:
            assert_same_weights(base, name)
        else:
            assert base.lacking([encoder]) == [encoder.name]
            with pytest.raises(UsageError, match="has no text_encoder"):
                base.of([encoder])


def test_a_projection_that_is_a_module_of_its_own_is_not_transposed(tmp_path):
    """Playground's files say `text_projection.weight`, as Diffusers' linear layer does."""
    tensors = checkpoint("tiny-sdxl")
    key = "conditioner.embedders.1.model.text_projection"
    tensors[f"{key}.weight"] = tensors.pop(key).T.copy()
    save_file(tensors, tmp_path / "model.safetensors")
    with open_base(tmp_path / "model.safetensors") as base:
        assert_same_weights(base, "tiny-sdxl")


@pytest.mark.parametrize("original", [True, False])
def test_a_unet_alone(original, tmp_path):
    if original:
        start = "model.diffusion_model."
        tensors = {
            name.removeprefix(start): value for name, value in checkpoint("tiny-sdxl").items() if name.startswith(start)
        }
    else:
        tensors = load_file(folder("tiny-sdxl") / UNET)
    save_file(tensors, tmp_path / "unet.safetensors")
    held = stored("tiny-sdxl")
    with open_base(tmp_path / "unet.safetensors") as base:
        assert base.family == "tiny-sdxl"
        for module in FAMILIES["tiny-sdxl"].component("unet").modules.values():
            values = base.of([module])["weight"]
            np.testing.assert_array_equal(values, held[f"{module.name}.weight"].astype(np.float32))


def test_rows_of_several_modules_lie_one_under_the_other():
    """What a file for a fused attention changes: q, k and v, in this order."""
    modules = [FAMILIES["tiny-sdxl"].modules[qkv(letter)] for letter in "qkv"]
    with open_base("tiny-sdxl") as base:
        fused, parts = base.of(modules), [base.of([module]) for module in modules]
    for parameter in ("weight", "bias"):
        np.testing.assert_array_equal(fused[parameter], np.concatenate([part[parameter] for part in parts]))


def qkv(letter: str) -> str:
    return f"text_encoder_2.text_model.encoder.layers.0.self_attn.{letter}_proj"


def test_the_names_of_checkpoints_are_those_of_the_published_ones():
    """A few out of sd_xl_base_1.0.safetensors and v1-5-pruned.safetensors."""
    known = {
        ("sdxl", qkv("k"), "bias"): ("transformer.resblocks.0.attn.in_proj_bias", False),
        ("sdxl", "text_encoder_2.text_projection", "weight"): ("text_projection", True),
        ("sdxl", "text_encoder_2.text_model.embeddings.position_embedding", "weight"): ("positional_embedding", False),
        ("sdxl", "unet.add_embedding.linear_1", "weight"): ("label_emb.0.0.weight", False),
        ("sd15", "unet.conv_norm_out", "bias"): ("out.0.bias", False),
        ("sd15", "text_encoder.text_model.encoder.layers.3.mlp.fc1", "weight"): (
            "text_model.encoder.layers.3.mlp.fc1.weight",
            False,
        ),
    }
    for (family, module, parameter), expected in known.items():
        assert next(original_names(FAMILIES[family].modules[module], parameter)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.up_blocks.0.resnets.2.conv1.weight", ("decoder.up.3.block.2.conv1.weight", False)),
        ("decoder.up_blocks.2.upsamplers.0.conv.bias", ("decoder.up.1.upsample.conv.bias", False)),
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.bias", ("encoder.down.1.block.0.nin_shortcut.bias", False)),
        ("encoder.down_blocks.0.downsamplers.0.conv.weight", ("encoder.down.0.downsample.conv.weight", False)),
        ("encoder.mid_block.attentions.0.group_norm.weight", ("encoder.mid.attn_1.norm.weight", False)),
        ("encoder.mid_block.attentions.0.to_q.weight", ("encoder.mid.attn_1.q.weight", True)),
        ("decoder.mid_block.attentions.0.proj_attn.weight", ("decoder.mid.attn_1.proj_out.weight", True)),
        ("decoder.mid_block.attentions.0.to_out.0.bias", ("decoder.mid.attn_1.proj_out.bias", False)),
        ("decoder.mid_block.resnets.1.norm2.weight", ("decoder.mid.block_2.norm2.weight", False)),
        ("decoder.conv_norm_out.weight", ("decoder.norm_out.weight", False)),
        ("post_quant_conv.weight", ("post_quant_conv.weight", False)),
    ],
)
def test_names_of_the_vae(name, expected):
    assert vae_name(name, 4) == expected


@pytest.fixture
def repository(hub: Hub) -> Hub:  # noqa: F811
    """The hub with tiny-sd15 as owner/repo, and what does not belong to it in safetensors."""
    root = folder("tiny-sd15")
    hub.files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    hub.files |= {"text_encoder/pytorch_model.bin": b"\x80\x02", "old.safetensors": b"", "vae/model.onnx": b""}
    return hub


@pytest.mark.parametrize("name", ["owner/repo", "hf://owner/repo", f"owner/repo@{COMMITS[0]}"])
def test_a_repository(name, repository):
    with open_base(name) as base:
        assert_same_weights(base, "tiny-sd15")
    fetched = {request.path.rpartition("/")[2].partition("?")[0] for request in repository.bodies}
    assert fetched == {"model_index.json", "diffusion_pytorch_model.safetensors", "model.safetensors"}
    assert not any("/vae/" in request.path for request in repository.bodies)


def test_a_repository_in_the_cache_needs_no_hub(repository, monkeypatch):
    from huggingface_hub import constants

    with open_base("owner/repo"):
        pass
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    seen = len(repository.seen)
    with open_base("owner/repo") as base:
        assert base.family == "tiny-sd15"
    assert len(repository.seen) == seen
    with pytest.raises(FileError, match="HF_HUB_OFFLINE"), open_base("owner/other"):
        pass


def refused(base: Path | str, family: str | None = None) -> str:
    with pytest.raises(UsageError) as raised, open_base(base, family):
        pass
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_base_of_another_family_is_named():
    said = refused("tiny-sdxl", "sd15")
    assert said == (
        "the base model tiny-sdxl is the embedded tiny Stable Diffusion XL, and the file is for Stable Diffusion 1.x; "
        "give a base of sd15"
    )


def only_pickles(model: Path) -> None:
    (model / "text_encoder/model.safetensors").rename(model / "text_encoder/pytorch_model.bin")


def one_shard_missing(model: Path) -> None:
    shard(model / UNET)
    next((model / "unet").glob("*-00002-of-*")).unlink()


def whole_and_in_shards(model: Path) -> None:
    kept = (model / UNET).read_bytes()
    shard(model / UNET)
    (model / UNET).write_bytes(kept)


def other_sizes(model: Path) -> None:
    rewritten(model / UNET, lambda tensors: tensors | {"conv_out.weight": np.zeros((5, 32, 3, 3), np.float16)})


def quantised(model: Path) -> None:
    write_any(model / UNET, {name: value.astype(np.uint8) for name, value in load_file(model / UNET).items()})


def scaled(model: Path) -> None:
    rewritten(model / UNET, lambda tensors: tensors | {"conv_in.scale_weight": np.ones(1, np.float32)})


def no_index(model: Path) -> None:
    (model / "model_index.json").unlink()


def no_unet(model: Path) -> None:
    (model / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": null}')


def flux(model: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (model / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (only_pickles, "the text_encoder of my-model is a pickle (pytorch_model.bin)"),
        (whole_and_in_shards, "remove one of the two forms"),
        (other_sizes, "of other sizes"),
        (quantised, "is U8; give the base model in fp16 or bf16"),
        (scaled, "scaled or quantised form (conv_in.scale_weight)"),
        (no_index, "has no model_index.json"),
        (no_unet, "is a StableDiffusionPipeline; adapters are known for"),
        (flux, "is a FluxPipeline"),
    ],
)
def test_a_folder_that_cannot_be_read_is_said_in_a_sentence(spoil, said, model):
    spoil(model)
    assert said in refused(model)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (one_shard_missing, "only 2 are there"),
        (lambda model: (model / UNET).write_bytes(b"<html>"), "a web page"),
        (lambda model: (model / UNET).write_bytes((model / UNET).read_bytes()[:-7]), "the file ends before"),
        (lambda model: (model / "model_index.json").write_text("{"), "cannot be read"),
        (lambda model: (model / "model_index.json").write_text("[" * 100_000), "cannot be read"),
        (lambda model: (model / "model_index.json").write_text("[]"), "is no JSON object"),
    ],
)
def test_a_damaged_folder_is_a_finding(spoil, said, model):
    spoil(model)
    with pytest.raises(FileError) as raised, open_base(model):
        pass
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("nothing-here", "there is no nothing-here"),
        ("model.ckpt", "is a pickle"),
        ("lora.safetensors", "holds no UNet"),
        ("dir.txt", "is no .safetensors checkpoint"),
    ],
)
def test_what_is_no_base_is_said_in_a_sentence(base, said, tmp_path):
    save_file({"lora_unet_conv_in.alpha": np.ones(1, np.float32)}, tmp_path / "lora.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    (tmp_path / "dir.txt").write_text("text")
    assert said in refused(str(tmp_path / base) if (tmp_path / base).exists() else base)


def test_a_module_of_another_size_is_said(model):
    """The first convolution of an inpainting model takes nine channels."""
    rewritten(model / UNET, lambda tensors: tensors | {"conv_in.weight": np.zeros((32, 9, 3, 3), np.float16)})
    module = Module("unet", "conv_in", (320, 4, 3, 3), "input_blocks.0.0")
    with pytest.raises(UsageError, match="of other sizes"), open_base(model):
        pass  # the tiny family has no such variant
    with open_base("tiny-sd15") as base, pytest.raises(UsageError, match="is 32×4×3×3, and the file's is 320×4×3×3"):
        base.of([module])
