"""merge: what is written is the base model plus ΔW and nothing else, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import FIXTURES, LORA, ROOT, names_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_base import UNET, Hub, checkpoint, hub, renamed, rewritten, shard, stored, write_any  # noqa: F401

import lora_convert
from lora_convert import FileError, UsageError, merge
from lora_convert.cli import run
from lora_convert.containers import opened
from lora_convert.converters.adapters import read_adapter
from lora_convert.converters.base import open_base
from lora_convert.families import FAMILIES
from lora_convert.families.embedded import folder
from lora_convert.inspect.detect import detect

TINY = FIXTURES / "tiny"
NEON, LOCON, NEON_XL = (TINY / f"{name}.safetensors" for name in ("neon", "striped_locon", "neon_xl_kohya"))
KINDS = sorted((TINY / "kinds").glob("*.safetensors"))
ENCODER = "text_encoder/model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of tiny-sd15 to change."""
    return Path(shutil.copytree(folder("tiny-sd15"), tmp_path / "my-model"))


def changes_of(path: Path, base: str = "tiny-sd15") -> dict[str, np.ndarray]:
    """ΔW and Δb of a file by canonical name, by its trainer's definition."""
    found = {}
    with opened(path) as source, open_base(base) as weights:
        for module in detect(source).payload:
            row = 0
            deltas = read_adapter(source, module).deltas(weights.of(module.modules))
            for target in module.modules:
                for part, delta in deltas.items():
                    found[f"{target.name}.{part}"] = delta[row : row + target.shape[0]]
                row += target.shape[0]
    return found


def expected(*files: tuple[Path, float], base: str = "tiny-sd15") -> dict[str, np.ndarray]:
    """W + Σ scale · ΔW of every tensor of a base model, float64."""
    tensors = {name: value.astype(np.float64) for name, value in stored(base).items()}
    for path, scale in files:
        for name, delta in changes_of(path, base).items():
            tensors[name] = tensors[name] + scale * delta.reshape(tensors[name].shape)
    return tensors


def read_model(path: Path) -> dict[str, np.ndarray]:
    """All weights of a merged folder by canonical name."""
    tensors = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for file in (path / component).glob("*.safetensors"):
            content = load_file(file)
            bare = "embeddings.token_embedding.weight" in content
            tensors |= {f"{component}.{'text_model.' * bare}{name}": value for name, value in content.items()}
    return tensors


def assert_merged(result, out: Path, *files: tuple[Path, float], base: str = "tiny-sd15", roundoff: float = 2.0**-11):
    assert result.status == "merged", result.findings
    truth, found = expected(*files, base=base), read_model(out)
    assert found.keys() == truth.keys()
    touched = set().union(*(changes_of(path, base) for path, _ in files))
    before = stored(base)
    for name, value in found.items():
        if name in touched:
            limit = 1.01 * roundoff * np.abs(truth[name]) + (2.0**-25 if roundoff == 2.0**-11 else 1e-9)
            assert (np.abs(value.astype(np.float64) - truth[name]) <= limit).all(), name
        else:
            np.testing.assert_array_equal(value.astype(np.float32), before[name].astype(np.float32), err_msg=name)
    assert set(touched) <= found.keys()


@pytest.mark.parametrize(("path", "base"), [(NEON, "tiny-sd15"), (LOCON, "tiny-sd15"), (NEON_XL, "tiny-sdxl")])
def test_a_merged_folder_is_the_base_plus_the_change(path, base, tmp_path):
    out = tmp_path / "out"
    result = merge(path, base, out)
    assert_merged(result, out, (path, 1.0), base=base)
    assert result.modules == len(lora_convert.identify(path).payload)
    there = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert there == {file.relative_to(folder(base)).as_posix() for file in folder(base).rglob("*") if file.is_file()}
    for record in result.outputs:
        data = Path(record.path).read_bytes()
        assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    untouched = [name for name in there if not name.startswith(("unet/diff", "text_encoder"))]
    for name in (*untouched, "vae/diffusion_pytorch_model.safetensors"):
        if name.endswith(("model.safetensors", "_2/model.safetensors")) and not name.startswith("vae"):
            continue
        assert (out / name).read_bytes() == (folder(base) / name).read_bytes(), name


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.stem)
def test_every_kind_merges_exactly(path, tmp_path):
    result = merge(path, "tiny-sd15", tmp_path / "out", dtype="fp32")
    assert_merged(result, tmp_path / "out", (path, 1.0), roundoff=2.0**-24)
    assert result.worst_rounding < 1e-6


def test_several_files_add_up_with_their_scales(tmp_path):
    files = [NEON, LOCON, TINY / "probe_sd15.safetensors"]
    result = merge(files, "tiny-sd15", tmp_path / "out", scales=[0.5, -1.25, 0.1], dtype="fp32")
    assert_merged(result, tmp_path / "out", *zip(files, (0.5, -1.25, 0.1), strict=True), roundoff=2.0**-24)
    again = merge(files, "tiny-sd15", tmp_path / "again", scales=[0.5, -1.25, 0.1], dtype="fp32")
    assert [one.sha256 for one in again.outputs] == [one.sha256 for one in result.outputs]


def test_one_scale_is_for_all_files(tmp_path):
    for name, scales in (("one", 0.5), ("numpy", np.float32(0.5)), ("each", [0.5, 0.5])):
        merge([NEON, LOCON], "tiny-sd15", tmp_path / name, scales=scales)
    assert len({(tmp_path / name / UNET).read_bytes() for name in ("one", "numpy", "each")}) == 1


@pytest.mark.filterwarnings("error")
def test_the_proof_holds_at_any_scale(tmp_path):
    """Squares of such values do not fit float32, in which a norm would be infinite and prove anything."""
    result = merge(NEON, "tiny-sd15", tmp_path / "out", scales=1e30, dtype="fp32")
    assert result.ok and 0 < result.worst_rounding < 1e-6


def composed(path: Path) -> Path:
    """A file that changes a norm, an embedding-like vector and biases alone."""
    random = np.random.default_rng(5)
    sizes = {
        "lora_unet_conv_norm_out.w_norm": 32,
        "lora_unet_conv_norm_out.b_norm": 32,
        "lora_unet_down_blocks_0_attentions_0_norm.w_norm": 32,
        "lora_unet_down_blocks_0_attentions_0_norm.b_norm": 32,
        "lora_te_text_model_encoder_layers_0_mlp_fc2.diff_b": 64,
        "lora_unet_conv_in.diff_b": 32,
    }
    tensors = {name: random.standard_normal(size).astype(np.float32) / 8 for name, size in sizes.items()}
    tensors["lora_unet_conv_in.diff"] = random.standard_normal((32, 4, 3, 3)).astype(np.float32) / 8
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc2.diff"] = random.standard_normal((64, 256)).astype("f4") / 8
    save_file(tensors, path)
    return path


def test_norms_and_biases_change_too(tmp_path):
    path = composed(tmp_path / "norms.safetensors")
    names = {name.rpartition(".")[2] for name in changes_of(path)}
    assert names == {"weight", "bias"} and len(changes_of(path)) == 8
    assert_merged(merge(path, "tiny-sd15", tmp_path / "out"), tmp_path / "out", (path, 1.0))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, ml_dtypes.float8_e5m2])
def test_the_base_keeps_its_dtype(dtype, model, tmp_path):
    for path in (model / UNET, model / ENCODER):
        write_any(path, {name: value.astype(dtype) for name, value in load_file(path).items()})
    result = merge(LOCON, model, tmp_path / "out")
    assert result.ok
    with open_base(model) as before, open_base(tmp_path / "out") as after:
        delta = changes_of(LOCON)["unet.conv_out.weight"]
        module = FAMILIES["tiny-sd15"].modules["unet.conv_out"]
        truth = before.of([module])["weight"] + delta
        assert {file.source.header.tensors["conv_in.weight"].dtype for file in after.files if file.component == "unet"}
        np.testing.assert_array_equal(after.of([module])["weight"], truth.astype(dtype).astype(np.float32))
    assert ("merge-rounded" in names_of(result.findings)) == (dtype is not np.float32)


def test_another_dtype_is_for_all_of_the_unet_and_encoders(tmp_path):
    merge(NEON, "tiny-sd15", tmp_path / "out", dtype="bf16")
    for name, dtype in ((UNET, "BF16"), (ENCODER, "BF16"), ("vae/diffusion_pytorch_model.safetensors", "F16")):
        with opened(tmp_path / "out" / name) as source:
            assert {tensor.dtype for tensor in source.header.tensors.values()} == {dtype}
    assert json.loads((tmp_path / "out/text_encoder/config.json").read_text())["dtype"] == "bfloat16"


def test_shards_and_variants_become_a_plain_folder(model, tmp_path):
    shard(model / UNET, variant=".fp16")
    renamed(model / ENCODER, "model.fp16.safetensors")
    renamed(model / "vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    (model / "vae/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    (model / "old.ckpt").write_bytes(b"\x80\x02")
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("x")
    result = merge(NEON, model, tmp_path / "out")
    assert_merged(result, tmp_path / "out", (NEON, 1.0))
    weights = sorted(Path(record.path).relative_to(tmp_path / "out").as_posix() for record in result.outputs)
    assert [name for name in weights if "model" in Path(name).name and "index" not in Path(name).name] == [
        ENCODER,
        *(f"unet/diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
        "vae/diffusion_pytorch_model.safetensors",
    ]
    index = json.loads((tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 684 and index["metadata"]["total_size"] > 6_000_000
    assert not [
        path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".ckpt") or ".git" in path.parts
    ]


def test_a_merged_folder_loads_as_any_other_does(model, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    shard(model / UNET, variant=".fp16")
    renamed(model / ENCODER, "model.fp16.safetensors")
    renamed(model / "vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    assert merge(LOCON, model, tmp_path / "out", dtype="fp32").ok
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    truth = expected((LOCON, 1.0))
    live = {f"unet.{name}": value for name, value in pipeline.unet.state_dict().items()}
    live |= {f"text_encoder.text_model.{name}": value for name, value in pipeline.text_encoder.state_dict().items()}
    assert live.keys() == truth.keys()
    for name, value in live.items():
        np.testing.assert_allclose(value.double().numpy(), truth[name], rtol=2.0**-23, atol=1e-9, err_msg=name)


def test_a_merged_model_draws_what_the_reference_draws(tmp_path):
    pytest.importorskip("diffusers")
    from lora_convert.runtime.pipelines import open_pipeline
    from lora_convert.runtime.reference import merged
    from lora_convert.runtime.rendering import Settings, draw

    assert merge(LOCON, "tiny-sd15", tmp_path / "out", scales=0.8, dtype="fp32").ok
    settings = [Settings("a red circle on a blue background", steps=4)]
    pipeline = open_pipeline("tiny-sd15", "cpu")
    _, base = draw(pipeline, settings)
    with opened(LOCON) as source, merged(pipeline, source, detect(source), 0.8):
        _, reference = draw(pipeline, settings)
    _, drawn = draw(open_pipeline(tmp_path / "out", "cpu"), settings)
    norm = np.linalg.norm(reference)
    assert np.linalg.norm(drawn - reference) / norm < 1e-4
    assert np.linalg.norm(base - reference) / norm > 0.1


@pytest.mark.parametrize(("path", "base"), [(LOCON, "tiny-sd15"), (NEON_XL, "tiny-sdxl")])
def test_a_checkpoint_stays_one(path, base, tmp_path):
    """Names, order, shapes and metadata are the base's; what no file changes keeps its bytes."""
    tensors = checkpoint(base) | {"model_ema.decay": np.ones(1, "f4"), "first_stage_model.x": np.ones((3, 5), "f2")}
    before = tmp_path / "base.safetensors"
    save_file(tensors, before, {"modelspec.title": "x", "modelspec.hash_sha256": "0x12", "format": "pt"})
    out = tmp_path / "merged.safetensors"
    result = merge(path, before, out, single_file=True)
    assert result.ok and [record.path for record in result.outputs] == [str(out)]
    assert names_of(result.findings) == {"ema-unchanged", "merge-rounded"}
    with open_base(before) as old, open_base(out) as new:
        assert list(new.files[0].source.header.tensors) == list(old.files[0].source.header.tensors)
        truth = expected((path, 1.0), base=base)
        for name, value in truth.items():
            module, _, parameter = name.rpartition(".")
            found = new.parameter(FAMILIES[base].modules[module], parameter)
            limit = 1.01 * 2.0**-11 * np.abs(value) + 2.0**-25
            assert (np.abs(found - value.reshape(found.shape)) <= limit).all(), name
    after = load_file(out)
    same = [name for name, value in tensors.items() if np.array_equal(after[name], value)]
    assert {"model_ema.decay", "first_stage_model.x"} <= set(same)
    assert result.copied <= len(same) < len(tensors) == result.copied + result.changed
    with safe_open(out, "np") as file:
        metadata = file.metadata()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert metadata == {
        "modelspec.title": "x",
        "format": "pt",
        "lora_convert.version": lora_convert.__version__,
        "lora_convert.family": base,
        "lora_convert.source_sha256": sha256,
        "lora_convert.scale": "1",
    }


def test_what_was_merged_before_stays_known(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    merge(NEON, "tiny-sd15", first, scales=0.5)
    merge([LOCON, NEON], first, second, scales=[1, -0.5])
    with opened(second / UNET) as source:
        metadata = source.header.metadata
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (NEON, LOCON, NEON)]
    assert metadata["lora_convert.source_sha256"] == ",".join(sums)
    assert metadata["lora_convert.scale"] == "0.5,1,-0.5"


@pytest.mark.parametrize(("path", "base"), [(LOCON, "tiny-sd15"), (NEON_XL, "tiny-sdxl")])
def test_a_folder_becomes_a_checkpoint_that_loads(path, base, tmp_path):
    result = merge(path, base, tmp_path / "out", single_file=True, dtype="fp32")
    (record,) = result.outputs
    assert record.path == str(tmp_path / "out" / f"{base}.safetensors")
    assert checkpoint(base).keys() <= load_file(record.path).keys()
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from lora_convert.runtime.pipelines import open_pipeline

    merge(path, base, tmp_path / "folder", dtype="fp32")
    ours, theirs = open_pipeline(record.path, "cpu"), open_pipeline(tmp_path / "folder", "cpu")
    for name, component in theirs.components.items():
        if isinstance(component, torch.nn.Module):
            found, wanted = getattr(ours, name).state_dict(), component.state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


def test_a_repository_is_fetched_whole(hub: Hub, tmp_path):  # noqa: F811
    root = folder("tiny-sd15")
    hub.files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    hub.files["vae/diffusion_pytorch_model.bin"] = b"\x80\x02"
    assert_merged(merge(NEON, "owner/repo", tmp_path / "out"), tmp_path / "out", (NEON, 1.0))
    assert (tmp_path / "out/tokenizer/vocab.json").is_file()
    assert not any(request.path.endswith(".bin") for request in hub.seen if "resolve" in request.path)


def refused(*arguments, **options) -> str:
    with pytest.raises(UsageError) as raised:
        merge(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("files", "base", "options", "said"),
    [
        (NEON, "tiny-sdxl", {}, "is for the embedded tiny Stable Diffusion 1.5; give a base of tiny-sd15"),
        (LORA / "a_sdxl_lora.safetensors", "tiny-sdxl", {}, "give a base of sdxl"),
        (NEON, "no-such-base", {}, "there is no no-such-base"),
        ([NEON, LOCON], "tiny-sd15", {"scales": [1, 2, 3]}, "3 scales for 2 files: give one for all, or one for each"),
        (NEON, "tiny-sd15", {"scales": float("nan")}, "--scale must be a finite number"),
        (NEON, "tiny-sd15", {"dtype": "fp8"}, "--dtype 'fp8' is not one of fp16, bf16, fp32"),
        ([], "tiny-sd15", {}, "there is no file to merge"),
        (NEON, "tiny-sd15", {"skip": "nothing*"}, "matches no tensor"),
        ([NEON, LOCON], "tiny-sd15", {"skip": ["nothing*"]}, "matches no tensor"),
    ],
)
def test_wrong_calls_are_one_sentence_and_write_nothing(files, base, options, said, tmp_path):
    assert said in refused(files, base, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_outputs_that_must_not_be_replaced(model, tmp_path):
    adapter = tmp_path / "out" / "neon.safetensors"
    out = tmp_path / "out"
    out.mkdir()
    assert merge(NEON, model, out).ok  # an empty folder is as good as none
    assert "exists; --force replaces it" in refused(NEON, model, out)
    assert merge(LOCON, model, out, force=True).ok
    assert_merged(merge(LOCON, model, out, force=True), out, (LOCON, 1.0))
    for place in (model, model / "unet", model.parent):
        assert "in the place of the base model" in refused(NEON, model, place, force=True)
    shutil.copy(NEON, adapter)
    assert "in the place of an input" in refused(adapter, model, out, force=True)
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    assert "is no Diffusers model, and is not replaced" in refused(NEON, model, other, force=True)
    assert "a file; or ask for --single-file" in refused(NEON, model, tmp_path / "x.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-model", "out", "precious"]


def test_an_output_that_is_a_link_stays_one(tmp_path):
    """Also one that leads to a folder that is not there yet; nothing is left beside it."""
    (tmp_path / "link").symlink_to("disk/model")
    for files in ([NEON], [NEON, LOCON]):
        assert merge(files, "tiny-sd15", tmp_path / "link", force=len(files) > 1).ok
    assert_merged(merge(LOCON, "tiny-sd15", tmp_path / "link", force=True), tmp_path / "link", (LOCON, 1.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_a_folder_that_cannot_be_replaced_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is the current folder, which cannot be replaced as a whole" in refused(NEON, "tiny-sd15", ".")
    monkeypatch.chdir("/")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    assert "is a mount point, which cannot be replaced as a whole" in refused(NEON, "tiny-sd15", tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_pickle_is_written(tmp_path):
    said = refused(NEON, "tiny-sd15", tmp_path / "merged.ckpt", single_file=True)
    assert "written as .safetensors, and not as .ckpt" in said


def test_a_checkpoint_needs_to_be_asked_for(tmp_path):
    save_file(checkpoint("tiny-sd15"), tmp_path / "base.safetensors")
    assert "--single-file writes another one" in refused(NEON, tmp_path / "base.safetensors", tmp_path / "out")
    same = tmp_path / "base.safetensors"
    assert "in the place of the base model" in refused(NEON, same, same, single_file=True, force=True)
    assert merge(NEON, same, tmp_path / "out", single_file=True).outputs[0].path.endswith("out/base.safetensors")


def test_a_base_without_what_a_file_changes_is_an_error(tmp_path):
    shutil.copy(folder("tiny-sd15") / UNET, tmp_path / "unet.safetensors")
    result = merge(LOCON, tmp_path / "unet.safetensors", tmp_path / "out", single_file=True)
    assert (result.status, result.family) == ("refused", "tiny-sd15")
    assert names_of(result.findings) == {"base-lacks-module"}
    assert result.findings[0].subject.startswith("text_encoder.")
    assert not (tmp_path / "out").exists()
    kept = merge(LOCON, tmp_path / "unet.safetensors", tmp_path / "out", single_file=True, skip=["lora_te_*"])
    assert kept.ok and "skipped" in names_of(kept.findings)


def test_components_may_be_links(model, tmp_path):
    """Models share text encoders, tokenizers and VAEs that way."""
    for name in ("unet", "vae", "tokenizer"):
        (model / name).rename(tmp_path / f"shared-{name}")
        (model / name).symlink_to(tmp_path / f"shared-{name}")
    assert_merged(merge(NEON, model, tmp_path / "out"), tmp_path / "out", (NEON, 1.0))
    assert not (tmp_path / "out/vae").is_symlink()
    assert sorted(path.name for path in (tmp_path / "out/tokenizer").iterdir()) == sorted(
        path.name for path in (model / "tokenizer").iterdir()
    )


@pytest.mark.parametrize("content", [b"{", b'["dtype"]', b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_cannot_be_read_is_said(content, model, tmp_path):
    (model / "text_encoder/config.json").write_bytes(content)
    result = merge(NEON, model, tmp_path / "out", dtype="fp32")
    (finding,) = result.findings
    assert (result.status, finding.name, finding.subject) == ("failed", "unreadable", "my-model")
    assert "Its text_encoder/config.json" in finding.message
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_the_base_is_said_of_the_base(model, tmp_path):
    vae = model / "vae/diffusion_pytorch_model.safetensors"
    kept = vae.read_bytes()
    shard(vae)
    vae.write_bytes(kept)
    said = refused(NEON, model, tmp_path / "out.safetensors", single_file=True)
    assert "remove one of the two forms of the model" in said
    for path in vae.parent.glob("*-of-*"):
        path.unlink()
    vae.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (finding,) = [found for found in merge(NEON, model, tmp_path / "out").findings if found.severity == "error"]
    assert (finding.name, finding.subject) == ("not-weights", "vae/diffusion_pytorch_model.safetensors")
    vae.write_bytes(kept)
    rewritten(
        model / UNET, lambda tensors: tensors | {"conv_out.weight": tensors["conv_out.weight"] * np.float16("inf")}
    )
    assert merge(NEON, model, tmp_path / "other").ok, "what is not changed is copied, whatever it is"
    (finding,) = merge(LOCON, model, tmp_path / "out").findings
    assert (finding.name, finding.subject) == ("not-finite", "conv_out.weight")
    assert "the base model's own values" in finding.message


def test_a_missing_component_is_said(model, tmp_path):
    shutil.rmtree(model / "vae")
    result = merge(NEON, model, tmp_path / "out")
    assert result.status == "failed" and "Its vae is missing" in str(result.findings[0])
    shutil.copytree(folder("tiny-sd15") / "vae", model / "vae")
    renamed(model / "vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    assert "the vae of my-model is a pickle" in refused(NEON, model, tmp_path / "out")


def spoilt(tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    tensors = load_file(NEON)
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda tensors: tensors[sorted(tensors)[0]].fill(np.nan), "not-finite"),
        (lambda tensors: tensors.pop(sorted(tensors)[0]), "missing-partner"),
        (lambda tensors: [value.fill(200) for value in tensors.values()], "overflow"),
    ],
)
def test_bad_files_are_findings_and_write_nothing(change, name, tmp_path):
    bad = spoilt(tmp_path, change)
    result = merge(bad, "tiny-sd15", tmp_path / "out")
    assert result.status == "failed" and name in names_of(result.findings)
    assert result.family == "tiny-sd15"
    assert merge("no\0name", "tiny-sd15", tmp_path / "out").status == "failed"
    several = merge([LOCON, bad], "tiny-sd15", tmp_path / "out")
    assert several.status == "failed"
    with pytest.raises(FileError):
        merge(bad, "tiny-sd15", tmp_path / "out", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_of_several_files_a_finding_names_its_own(tmp_path):
    bad = spoilt(tmp_path, lambda tensors: tensors.pop(sorted(tensors)[0]))
    result = merge([LOCON, bad, tmp_path / "none"], "tiny-sd15", tmp_path / "out")
    errors = [finding for finding in result.findings if finding.severity == "error"]
    assert {finding.subject.partition(": ")[0] for finding in errors} == {str(bad), str(tmp_path / "none")}


def test_half_of_an_adapter_is_a_warning(tmp_path):
    """Partial DoRA converts to two files."""
    source = TINY / "kinds/partial_dora.safetensors"
    both = [record.path for record in lora_convert.convert(source, tmp_path / "two").outputs]
    half = merge(both[0], "tiny-sd15", tmp_path / "half")
    (finding,) = [finding for finding in half.findings if finding.severity == "warning"]
    assert half.ok and (finding.name, finding.subject) == ("half-applied", both[0])
    whole = merge(both, "tiny-sd15", tmp_path / "whole", dtype="fp32")
    assert_merged(whole, tmp_path / "whole", *((Path(path), 1.0) for path in both), roundoff=2.0**-24)
    assert not whole.findings


def test_a_change_of_nothing_is_a_warning(tmp_path):
    idle = spoilt(tmp_path, lambda tensors: [value.fill(0) for value in tensors.values()])
    result = merge(idle, "tiny-sd15", tmp_path / "out")
    assert result.ok and "no-effect" in names_of(result.findings)
    before, after = stored("tiny-sd15"), read_model(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_file_that_fits_several_families_is_taken_for_the_bases(tmp_path):
    """Half a module of a text encoder that two families share: the base decides."""
    random = np.random.default_rng(0)
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {
        f"{name}.lora_down.weight": random.standard_normal((2, 64)).astype("f4"),
        f"{name}.lora_up.weight": random.standard_normal((256, 2)).astype("f4"),
    }
    save_file(tensors, tmp_path / "te.safetensors")
    assert merge(tmp_path / "te.safetensors", "tiny-sd15", tmp_path / "out").ok


def test_what_is_written_is_read_back(tmp_path, monkeypatch):
    """A wrong weight, or a byte that should not have moved, is caught before anything is put in place."""
    from lora_convert.converters import baking, merge_files

    real = baking.baked

    def wrong(file, tensor, changes):
        values = real(file, tensor, changes)
        return values * np.float32(1.01) if tensor == "conv_out.weight" else values

    with monkeypatch.context() as patch:
        patch.setattr(baking, "baked", wrong)
        result = merge(LOCON, "tiny-sd15", tmp_path / "out")
    assert result.status == "failed"
    (finding,) = [finding for finding in result.findings if finding.severity == "error"]
    assert (finding.name, finding.subject) == ("delta-mismatch", "unet.conv_out.weight")

    write = merge_files._write

    def flipped(file, chunks, advance):
        def damaged():
            for chunk in chunks:
                yield (
                    bytes(chunk)[:-1] + bytes([bytes(chunk)[-1] ^ 1]) if len(chunk) == 32 * 4 * 9 * 2 else chunk
                )  # conv_in

        return write(file, damaged(), advance)

    monkeypatch.setattr(merge_files, "_write", flipped)
    tensors = {name: value for name, value in load_file(NEON).items() if name.startswith("unet.down_blocks.1")}
    save_file(tensors, tmp_path / "few.safetensors")
    result = merge(tmp_path / "few.safetensors", "tiny-sd15", tmp_path / "out")
    assert result.status == "failed" and "delta-mismatch" in names_of(result.findings)
    assert not (tmp_path / "out").exists()


CODE = """
import sys, lora_convert
def tell(what, done, total):
    print(what, flush=True)
    if what == sys.argv[3]:
        import time; time.sleep(60)
lora_convert.merge(sys.argv[1], "tiny-sd15", sys.argv[2], force=True, progress=tell)
"""


@pytest.mark.parametrize("moment", ["merging", "proving"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_merge_leaves_the_old_model_or_none(moment, sent, tmp_path):
    out = tmp_path / "place" / "out"
    for before in (False, True):
        if before:
            assert merge(NEON, "tiny-sd15", out).ok
            kept = (out / UNET).read_bytes()
        child = subprocess.Popen(
            [sys.executable, "-c", CODE, str(LOCON), str(out), moment],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
        assert child.stdout is not None
        while child.stdout.readline().decode().strip() != moment:
            assert child.poll() is None
        child.send_signal(sent)
        child.communicate(timeout=60)
        assert child.returncode != 0
        if before:
            assert (out / UNET).read_bytes() == kept
        else:
            assert not out.exists()
        left = [path for path in (tmp_path / "place").iterdir() if path != out] if out.parent.exists() else []
        assert len(left) == (sent == signal.SIGKILL)  # what a killed process could not remove, the next one does
    assert merge(LOCON, "tiny-sd15", out, force=True).ok
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_without_the_proof_the_bytes_are_the_same(tmp_path):
    first = merge(NEON, "tiny-sd15", tmp_path / "first")
    second = merge(NEON, "tiny-sd15", tmp_path / "second", validated=False)
    assert [one.sha256 for one in first.outputs] == [one.sha256 for one in second.outputs]
    assert second.worst_rounding is None and first.worst_rounding > 0


def test_the_result_is_frozen_picklable_and_json(tmp_path):
    result = merge(NEON, "tiny-sd15", tmp_path / "out")
    again = pickle.loads(pickle.dumps(result))
    content = json.loads(json.dumps(again.as_dict(), allow_nan=False))
    assert (content["schema"], content["status"], content["family"]) == (1, "merged", "tiny-sd15")
    assert content["tensors"] == {"changed": 168, "copied": 796}
    assert (content["modules"], content["scales"], content["files"]) == (168, [1.0], [str(NEON)])
    with pytest.raises(AttributeError):
        result.status = "failed"


def test_the_verb(tmp_path, capsys):
    out = str(tmp_path / "out")
    call = ["merge", str(NEON), str(LOCON), "--base", "tiny-sd15", "--scale", "0.5", "--scale", "1", "-o", out]
    assert run(call) == 0
    said = capsys.readouterr().out
    assert "× 0.5" in said and "proved: " in said and "merge-rounded" in said
    assert run(call) == 2
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert run([*call, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["status"] == "refused"
    assert run([*call, "--json", "--force", "--dtype", "fp32"]) == 0
    assert json.loads(capsys.readouterr().out)["worst_rounding"] < 1e-3
    assert run(["merge", str(LORA / "none.safetensors"), "--base", "tiny-sd15", "-o", out, "--force"]) == 1
    assert "nothing was written" in capsys.readouterr().out


def test_merging_imports_no_torch(tmp_path):
    code = (
        "import sys, lora_convert\n"
        f"ok = lora_convert.merge({str(NEON)!r}, 'tiny-sd15', {str(tmp_path / 'out')!r}).ok\n"
        "print(ok, [m for m in ('torch', 'diffusers', 'transformers', 'peft', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


MEASURED = """
import sys, lora_convert
result = lora_convert.merge(sys.argv[1], sys.argv[2], sys.argv[3])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss counts the parent's
print(result.status, peak.split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
def test_memory_stays_small_with_a_large_base(tmp_path):
    """SD 1.5 in full size, 2 GB in fp16, with an adapter on every attention and feed-forward matrix."""
    model = Path(shutil.copytree(folder("tiny-sd15"), tmp_path / "model"))
    random = np.random.default_rng(0)
    block = (random.standard_normal(1 << 22) / 32).astype(np.float16)
    adapter = {}
    for component, name in (("unet", UNET), ("text_encoder", ENCODER)):
        tensors = {}
        for module in FAMILIES["sd15"].component(component).modules.values():
            size = int(np.prod(module.shape))
            tensors[f"{module.path}.weight"] = np.resize(block, size).reshape(module.shape)
            if "attn" in module.path or ".ff." in module.path:
                down = random.standard_normal((16, module.shape[1])).astype(np.float16) / 64
                up = random.standard_normal((module.shape[0], 16)).astype(np.float16) / 64
                adapter |= {f"{module.name}.lora_A.weight": down, f"{module.name}.lora_B.weight": up}
        save_file(tensors, model / name)
    save_file(adapter, tmp_path / "adapter.safetensors")
    arguments = [str(tmp_path / "adapter.safetensors"), str(model), str(tmp_path / "out")]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ,
    )
    status, peak = done.stdout.split()
    assert status == "merged"
    assert int(peak) * 1024 < 600e6, peak
    assert time.monotonic() - start < 300
