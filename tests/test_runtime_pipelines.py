"""Opening base models of every kind, and what is said of those that cannot be opened."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from test_hub import COMMITS, Hub, hub  # noqa: F401 (a fixture)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.numpy import load_file, save_file  # noqa: E402

from lora_convert.errors import FileError, UsageError  # noqa: E402
from lora_convert.families import FAMILIES  # noqa: E402
from lora_convert.runtime.architectures import build_component  # noqa: E402
from lora_convert.runtime.bases import NAMES, folder  # noqa: E402
from lora_convert.runtime.pipelines import (  # noqa: E402
    base_record,
    device_of,
    dtype_of,
    family_of,
    live_components,
    open_pipeline,
)

UNET = Path("unet/diffusion_pytorch_model.safetensors")
TEXT_ENCODER = Path("text_encoder/model.safetensors")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of tiny-sd15 to break."""
    return Path(shutil.copytree(folder("tiny-sd15"), tmp_path / "my-model"))


def weights_of(pipeline: Any) -> dict[str, Any]:
    models = {name: model for name, model in pipeline.components.items() if isinstance(model, torch.nn.Module)}
    return {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}


def same_weights(first: Any, second: Any) -> bool:
    ours, theirs = weights_of(first), weights_of(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as raised:
        open_pipeline(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def finding(*arguments: Any, **options: Any) -> Any:
    with pytest.raises(FileError) as raised:
        open_pipeline(*arguments, **options)
    (said,) = raised.value.findings
    assert "\n" not in str(said)
    return said


@pytest.mark.parametrize("name", NAMES)
def test_embedded_models_open_ready_to_draw(name):
    pipeline = open_pipeline(name, "cpu")
    assert (
        type(pipeline).__name__
        == {
            "tiny-sd15": "StableDiffusionPipeline",
            "tiny-sdxl": "StableDiffusionXLPipeline",
        }[name]
    )
    assert family_of(pipeline) == name
    assert (device_of(pipeline), dtype_of(pipeline)) == (torch.device("cpu"), torch.float32)
    for model in (pipeline.vae, *live_components(pipeline).values()):
        assert not any(module.training for module in model.modules())
        assert not any(weight.requires_grad for weight in model.parameters())
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert getattr(pipeline, "safety_checker", None) is None
    assert getattr(pipeline, "watermark", None) is None
    record = base_record(pipeline)
    files = sorted(path.relative_to(folder(name)).as_posix() for path in folder(name).glob("*/*.safetensors"))
    order = [part for part in ("unet", "text_encoder", "text_encoder_2", "vae") for _ in files]
    listed = "".join(
        f"{hashlib.sha256((folder(name) / path).read_bytes()).hexdigest()}  {path}\n"
        for path in sorted(files, key=lambda path: order.index(path.partition("/")[0]))
    )
    sha256 = hashlib.sha256(listed.encode()).hexdigest()
    assert record == {"name": name, "family": name, "location": "embedded", "sha256": sha256}


def test_a_folder_is_the_same_model_and_its_record_has_no_path(base, monkeypatch):
    pipeline, embedded = open_pipeline(base, "cpu"), open_pipeline("tiny-sd15", "cpu")
    assert same_weights(pipeline, embedded)
    expected = {**base_record(embedded), "name": "my-model", "location": "folder"}
    assert base_record(pipeline) == expected
    monkeypatch.chdir(base)
    for spelling in (".", "../my-model/", "unet/.."):
        assert base_record(open_pipeline(spelling, "cpu")) == expected


def test_a_pipeline_of_other_origin_has_a_family_and_no_record():
    own = diffusers.DiffusionPipeline.from_pretrained(str(folder("tiny-sdxl")))
    assert base_record(own) == {} and family_of(own) == "tiny-sdxl"
    own.text_encoder = None
    assert family_of(own) == "tiny-sdxl"
    own.unet = open_pipeline("tiny-sd15", "cpu").unet
    assert family_of(own) is None


class Bare:
    """As much of a pipeline as family_of looks at, without weights."""

    def __init__(self, family: str) -> None:
        for component in FAMILIES[family].components:
            setattr(self, component.name, build_component(family, component.name))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_known_by_its_components(family):
    pipeline = Bare(family)
    assert family_of(pipeline) == family
    for number in (*dict(FAMILIES[family].variants).values(), 7):
        with torch.device("meta"):
            shape = pipeline.unet.conv_in.weight.shape
            pipeline.unet.conv_in = torch.nn.Conv2d(number, shape[0], shape[2:])
        assert family_of(pipeline) == (family if number != 7 else None)


def test_the_first_fitting_device_is_taken(monkeypatch):
    opened = open_pipeline("tiny-sd15", "auto", "auto")
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert device_of(opened).type == kind
    assert dtype_of(opened) == (torch.float32 if kind == "cpu" else torch.float16)


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("float32", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("fp32", "float32"),
        ("fp16", "float16"),
        ("bf16", "bfloat16"),
        ("torch.float16", "float16"),
    ],
)
def test_dtypes(spelling, dtype):
    pipeline = open_pipeline("tiny-sd15", "cpu", spelling)
    assert dtype_of(pipeline) == getattr(torch, dtype)
    assert {value.dtype for value in weights_of(pipeline).values()} == {getattr(torch, dtype)}


WRONG = {
    "device": ({"device": "gpu"}, "there is no device gpu here; there is (.*, )?cpu$"),
    "device index": ({"device": "cuda:99"}, "there is no device cuda:99 here"),
    "meta": ({"device": "meta"}, "there is no device meta here"),
    "dtype": ({"dtype": "int8"}, "dtype 'int8' is not one of auto, float32, float16, bfloat16, fp32, fp16, bf16"),
    "family": ({"family": "sd15"}, "tiny-sd15 is of the family tiny-sd15, and sd15 was asked for"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_named(case):
    options, message = WRONG[case]
    assert re.match(message, refused("tiny-sd15", **options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_an_error_that_says_which_are():
    assert re.match(r"there is no device cuda here; there is (mps, )?cpu$", refused("tiny-sd15", "cuda"))


ABSENT = ["tiny-sd3", "./model", "/nowhere/model", "model.safetensors", "a/b/c", "", "owner/", "hf://owner", "x" * 5000]


@pytest.mark.parametrize("name", ABSENT, ids=lambda name: name[:20])
def test_a_base_that_does_not_exist_is_an_error_that_says_what_bases_are(name):
    message = refused(name, "cpu")
    assert re.match(
        r"there is no .*; a base is an embedded model \(tiny-sd15, tiny-sdxl\), a Diffusers folder, ", message
    )
    assert refused(Path("owner/repo"), "cpu").startswith("there is no owner/repo; ")


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin"])
def test_pickles_are_never_opened(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    path = tmp_path / f"model.{suffix}"
    for _ in range(2):
        assert re.match(rf"model\.{suffix} is a pickle, which can run code when it is loaded", refused(path, "cpu"))
        path.write_bytes(b"PK\x03\x04")
    disguised = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(3)}, disguised)
    assert finding(disguised, "cpu").name == "not-weights"
    other = tmp_path / "model.txt"
    other.write_text("text")
    assert "is no .safetensors checkpoint" in refused(other, "cpu")


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
def test_pickles_in_a_folder_are_not_opened_either(component, base, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    (weights,) = (base / component).glob("*.safetensors")
    torch.save({}, weights.with_suffix(".bin"))
    same = open_pipeline(base, "cpu")
    assert same_weights(same, open_pipeline("tiny-sd15", "cpu"))
    weights.unlink()
    message = refused(base, "cpu")
    assert message.startswith(f"the {component} of my-model is a pickle ({weights.stem}.bin), which can run code")
    weights.with_suffix(".bin").unlink()
    assert refused(base, "cpu") == f"my-model has no weights in its folder {component}"


def test_a_folder_without_an_index_is_no_model(base, tmp_path):
    assert re.match(r"unet has no model_index\.json, so it is no Diffusers model; a base is ", refused(base / "unet"))
    (base / "model_index.json").write_text("{")
    assert finding(base).name == "unreadable" and "model_index.json" in finding(base).message
    (base / "model_index.json").write_text("[]")
    assert "no JSON object" in finding(base).message


def change_index(base: Path, **entries: Any) -> None:
    path = base / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "FluxPipeline"}, None),
        ({"_class_name": "OwnPipeline"}, "my-model is a OwnPipeline; adapters are known for these families"),
        ({"_class_name": ["own", "Pipeline"]}, "my-model is a .*own.*; adapters are known for"),
        ({"_class_name": "UNet2DConditionModel"}, "my-model is a UNet2DConditionModel; adapters"),
        ({"unet": ["own", "UNet"]}, r"the unet of my-model needs code of its own \(.*own.*\), which is not run"),
        ({"unet": [None, None]}, "my-model is a StableDiffusionPipeline of other sizes; adapters are known for"),
    ],
)
def test_models_of_other_kinds_are_named_before_anything_is_loaded(entries, message, base, monkeypatch):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (base / "own.py").write_text("raise SystemExit('ran')")
    (base / "unet/own.py").write_text("raise SystemExit('ran')")
    change_index(base, **entries)
    if message is None:
        index = json.loads((base / "model_index.json").read_text())
        index["transformer"] = index.pop("unet")
        (base / "model_index.json").write_text(json.dumps(index))
        message = "my-model is a FluxPipeline; adapters are known for these families of base models: sd15, sd21, sdxl"
    assert re.match(message, refused(base, "cpu"))


def test_other_sizes_are_no_known_family(base):
    tensors = load_file(base / UNET)
    tensors["conv_in.weight"] = np.zeros((64, 4, 3, 3), np.float16)
    save_file(tensors, base / UNET)
    assert re.match("my-model is a StableDiffusionPipeline of other sizes; ", refused(base, "cpu"))


def test_damaged_weights_are_named(base):
    content = (base / UNET).read_bytes()
    (base / UNET).write_bytes(content[:-10])
    said = finding(base, "cpu")
    assert (said.name, said.subject) == ("malformed-header", UNET.as_posix())
    (base / UNET).write_bytes(content)
    (base / TEXT_ENCODER).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert (finding(base).name, finding(base).subject) == ("not-weights", TEXT_ENCODER.as_posix())


def test_a_model_with_a_part_missing_is_not_opened(base):
    (base / UNET).rename(base / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    said = finding(base, "cpu")
    assert re.match(
        r"Of the 2 files like unet/diffusion_\S+-00001-of-00002\.safetensors only 1 are there", said.message
    )


@pytest.mark.parametrize(("file", "tensor"), [(UNET, "conv_out.bias"), (TEXT_ENCODER, "encoder.layers.1.mlp.fc2.bias")])
def test_weights_that_are_missing_are_not_made_up(file, tensor, base):
    tensors = load_file(base / file)
    name = next(name for name in tensors if name.endswith(tensor))
    del tensors[name]
    save_file(tensors, base / file, {"format": "pt"})
    said = finding(base, "cpu")
    assert (said.name, said.subject) == ("unreadable", "my-model") and tensor in said.message


def test_what_the_library_cannot_load_is_reported_in_its_words(base):
    shutil.rmtree(base / "scheduler")
    said = finding(base, "cpu")
    assert (said.name, said.subject) == ("unreadable", "my-model")
    assert said.message.startswith("diffusers cannot load it: ") and "scheduler" in said.message


def test_the_variant_fp16_is_taken_where_there_is_no_other(base):
    for path in (UNET, TEXT_ENCODER):
        (base / path).rename((base / path).with_suffix(".fp16.safetensors"))
    pipeline = open_pipeline(base, "cpu")
    assert same_weights(pipeline, open_pipeline("tiny-sd15", "cpu"))


def test_another_component_folder_order_does_not_matter_and_other_weights_change_the_hash(base):
    before = base_record(open_pipeline(base, "cpu"))["sha256"]
    tensors = load_file(base / UNET)
    tensors["conv_out.bias"] = tensors["conv_out.bias"] + 1
    save_file(tensors, base / UNET, {"format": "pt"})
    assert base_record(open_pipeline(base, "cpu"))["sha256"] != before


def test_the_hash_of_large_weights_is_of_samples(base, monkeypatch):
    monkeypatch.setattr("lora_convert.runtime.weights._WHOLE", 0)
    first = base_record(open_pipeline(base, "cpu"))
    assert first["sampled_sha256"] == base_record(open_pipeline("tiny-sd15", "cpu"))["sampled_sha256"]
    assert "sha256" not in first
    tensors = {name: value * np.float16(1.01) for name, value in load_file(base / UNET).items()}
    save_file(tensors, base / UNET, {"format": "pt"})
    assert base_record(open_pipeline(base, "cpu"))["sampled_sha256"] != first["sampled_sha256"]


def test_inpainting_models_open_as_what_they_are(base):
    change_index(base, _class_name="StableDiffusionInpaintPipeline")
    assert type(open_pipeline(base, "cpu")).__name__ == "StableDiffusionInpaintPipeline"


VAE_NAMES = (
    (r"up_blocks\.(\d)\.", lambda match: f"up.{3 - int(match[1])}."),
    (r"down_blocks\.", "down."),
    (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"resnets\.", "block."),
    (r"(up|down)samplers\.0\.", r"\1sample."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
)
PREFIXES = {
    "tiny-sd15": {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."},
    "tiny-sdxl": {
        "unet": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}


def original_vae(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    for pattern, replacement in VAE_NAMES:
        name = re.sub(pattern, replacement, name)
    if ".attn_1." in name and ".norm." not in name and value.ndim == 2:
        value = value[..., None, None]
    return f"first_stage_model.{name}", value


def checkpoint(path: Path, family: str) -> Path:
    """The embedded model in the layout of a single file, as Stability AI's code saves it."""
    (vae,) = (folder(family) / "vae").glob("*.safetensors")
    tensors = dict(original_vae(name, value) for name, value in load_file(vae).items())
    for component in FAMILIES[family].components:
        (file,) = (folder(family) / component.name).glob("*.safetensors")
        stored = load_file(file)
        fused: dict[str, dict[int, np.ndarray]] = {}
        for module in component.modules.values():
            for parameter in ("weight", "bias"):
                name = f"{module.path}.{parameter}"
                value = stored.get(name, stored.get(name.removeprefix("text_model.")))
                if value is None:
                    continue
                original = f"{PREFIXES[family][component.name]}{module.original}"
                value = value.T if module.mark == "transposed" else value
                if module.rows:
                    fused.setdefault(f"{original}_{parameter}", {})[module.rows[0]] = value
                else:
                    bare = original.endswith(("text_projection", "positional_embedding")) and "model." in original
                    bare = bare and component.name == "text_encoder_2"
                    tensors[original if bare else f"{original}.{parameter}"] = value
        tensors |= {name: np.concatenate([parts[row] for row in sorted(parts)]) for name, parts in fused.items()}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, {"format": "pt"})
    return path


@pytest.mark.parametrize("family", NAMES)
def test_a_single_file_opens_with_the_configuration_of_its_family(family, tmp_path):
    path = checkpoint(tmp_path / "model.safetensors", family)
    pipeline = open_pipeline(path, "cpu")
    assert type(pipeline) is type(open_pipeline(family, "cpu"))
    assert same_weights(pipeline, open_pipeline(family, "cpu"))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert base_record(pipeline) == {
        "name": "model.safetensors",
        "family": family,
        "location": "file",
        "sha256": sha256,
    }
    assert not any(weight.requires_grad for weight in pipeline.unet.parameters())
    tokens = pipeline.tokenizer("a red circle").input_ids
    assert tokens == open_pipeline(family, "cpu").tokenizer("a red circle").input_ids


def test_a_configuration_can_be_given_to_a_single_file(tmp_path, base):
    path = checkpoint(tmp_path / "model.safetensors", "tiny-sd15")
    for weights in base.glob("*/*.safetensors"):
        weights.unlink()
    assert same_weights(open_pipeline(path, "cpu", config=base), open_pipeline("tiny-sd15", "cpu"))
    assert "has no model_index.json" in refused(path, "cpu", config=tmp_path)
    other = finding(path, "cpu", config=folder("tiny-sdxl"))
    assert other.name == "unreadable" and "diffusers cannot load it" in other.message


def test_a_single_file_that_is_no_checkpoint_of_a_known_family(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": np.zeros((6, 2), np.float32)}, path)
    assert "model.safetensors holds no UNet under a checkpoint's names" in refused(path, "cpu")
    tensors = load_file(checkpoint(path, "tiny-sd15"))
    save_file({name: value for name, value in tensors.items() if "first_stage" not in name}, path)
    assert finding(path, "cpu").name == "unreadable"
    path.write_bytes(path.read_bytes()[:-7])
    assert (finding(path, "cpu").name, finding(path, "cpu").subject) == ("malformed-header", "model.safetensors")


def test_a_checkpoint_of_a_family_without_configuration_says_where_one_comes_from(tmp_path, monkeypatch):
    """The real configurations are on the hub, which is not asked here."""
    path = checkpoint(tmp_path / "model.safetensors", "tiny-sd15")
    monkeypatch.setattr("lora_convert.runtime.pipelines.bases.NAMES", ())
    said = finding(path, "cpu")
    assert said.name == "unreadable" and "given as config" in said.fix


def test_opening_is_quiet(tmp_path):
    script = "from lora_convert.runtime.pipelines import open_pipeline; open_pipeline('tiny-sdxl', 'cpu', 'fp16')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def repository(hub: Hub) -> Hub:  # noqa: F811
    """The hub with tiny-sd15 as owner/repo."""
    root = folder("tiny-sd15")
    hub.files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    hub.files["text_encoder/pytorch_model.bin"] = b"\x80\x02"
    return hub


def test_a_repository_is_fetched_once(repository, monkeypatch):
    for name in ("owner/repo", "hf://owner/repo", "owner/repo@main", f"hf://owner/repo@{COMMITS[0]}"):
        pipeline = open_pipeline(name, "cpu")
        record = base_record(pipeline)
        assert (record["name"], record["location"], record["revision"]) == ("owner/repo", "hub", COMMITS[0])
        assert record["sha256"] == base_record(open_pipeline("tiny-sd15", "cpu"))["sha256"]
        assert not any(request.path.endswith(".bin") for request in repository.seen)
        if name == "owner/repo":
            assert same_weights(pipeline, open_pipeline("tiny-sd15", "cpu"))
            repository.seen.clear()
    assert repository.bodies == []
    repository.seen.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    open_pipeline("owner/repo", "cpu")
    assert repository.seen == []


def test_a_repository_that_is_cached_in_part_is_completed(repository):
    from lora_convert.containers.hub import download

    download("hf://owner/repo/model_index.json")
    download(f"hf://owner/repo/{UNET.as_posix()}")
    assert family_of(open_pipeline("owner/repo", "cpu")) == "tiny-sd15"


def test_a_repository_with_the_variant_fp16_only(repository):
    for path in (UNET, TEXT_ENCODER, Path("vae/diffusion_pytorch_model.safetensors")):
        repository.files[path.with_suffix(".fp16.safetensors").as_posix()] = repository.files.pop(path.as_posix())
    assert family_of(open_pipeline("owner/repo", "cpu")) == "tiny-sd15"


def test_a_checkpoint_on_the_hub(repository, tmp_path):
    content = checkpoint(tmp_path / "model.safetensors", "tiny-sd15").read_bytes()
    repository.files = {"checkpoints/model.safetensors": content}
    record = base_record(open_pipeline("hf://owner/repo/checkpoints/model.safetensors", "cpu"))
    assert record["name"] == "hf://owner/repo/checkpoints/model.safetensors"
    assert record["sha256"] == hashlib.sha256(content).hexdigest()


def test_what_the_hub_refuses_is_a_sentence(repository, monkeypatch):
    assert "no repository owner/absent" in finding("owner/absent", "cpu").message
    assert "no revision nowhere" in finding("owner/repo@nowhere", "cpu").message
    index = repository.files.pop("model_index.json")
    assert "has no file model_index.json" in finding("owner/repo", "cpu").message
    repository.files["model_index.json"] = index.replace(b"StableDiffusionPipeline", b"FluxPipeline")
    repository.files["model_index.json"] = repository.files["model_index.json"].replace(b'"unet"', b'"transformer"')
    repository.seen.clear()
    assert refused("owner/repo", "cpu").startswith("owner/repo is a FluxPipeline; ")
    assert not any("unet" in request.path for request in repository.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = finding("owner/other", "cpu")
    assert (said.name, said.subject) == ("unreadable", "owner/other") and "HF_HUB_OFFLINE" in said.fix


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("name", NAMES)
def test_cuda(name):
    pipeline = open_pipeline(name, "cuda")
    assert (device_of(pipeline).type, dtype_of(pipeline)) == ("cuda", torch.float16)
    assert device_of(open_pipeline(name, "cuda:0", "bf16")).index == 0
