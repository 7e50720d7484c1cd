"""`lora-convert render`: pictures, sheets, what it refuses, and what it says."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, LORA
from PIL import Image
from safetensors.numpy import save_file

pytest.importorskip("diffusers")

import lora_convert
from lora_convert.cli import run
from lora_convert.families import FAMILIES
from lora_convert.runtime import pipelines, rendering

SD15 = str(LORA / "k_sd15_excerpt_f32.safetensors")
QUICK = ("--base", "tiny-sd15", "--steps", "1", "--width", "64", "--height", "64")
ASKED = (*QUICK, "--prompt", "a red circle")


@pytest.fixture
def call(capsys):
    """Run `render` in process: (exit status, standard output, standard error)."""

    def in_process(*arguments) -> tuple[int, str, str]:
        status = run(["render", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return in_process


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> tuple[Path, Path]:
    """A LoRA of tiny-sd15, in the canonical layout and in Kohya's."""
    folder = tmp_path_factory.mktemp("adapters")
    random = np.random.default_rng(0)
    tensors = {}
    for name, module in FAMILIES["tiny-sd15"].modules.items():
        if name.endswith("attn2.to_v"):
            out, width = module.shape
            tensors[f"{name}.lora_A.weight"] = random.standard_normal((4, width), np.float32) / 4
            tensors[f"{name}.lora_B.weight"] = random.standard_normal((out, 4), np.float32) / 4
    save_file(tensors, folder / "canonical.safetensors")
    lora_convert.convert(folder / "canonical.safetensors", folder / "kohya.safetensors", to="kohya", strict=True)
    return folder / "canonical.safetensors", folder / "kohya.safetensors"


@pytest.fixture
def no_loading(monkeypatch):
    """Fail where a base model is opened: what is wrong was to be noticed before."""

    def opened(*_, **__):
        pytest.fail("a base model was opened")

    monkeypatch.setattr(pipelines, "open_pipeline", opened)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_a_picture_in_text(call, adapters, tmp_path):
    kohya, out = adapters[1], tmp_path / "new" / "out.png"
    status, said, err = call(kohya, *ASKED, "-o", out)
    assert (status, err) == (0, "")
    assert f"{kohya}: 16 modules applied to tiny-sd15, scale 1, converted from kohya's names" in said
    assert f"{out}: 64×64 pixels, seed 0" in said and hashlib.sha256(out.read_bytes()).hexdigest() in said
    assert [path.name for path in out.parent.iterdir()] == ["out.png"]
    with Image.open(out) as image:
        assert image.size == (64, 64)
    assert rendering.read_record(out)["prompt"] == "a red circle"


def test_json_and_the_same_bytes_again(call, adapters, tmp_path):
    sums = []
    for name in ("first.png", "second.png"):
        status, said, err = call(adapters[0], *ASKED, "--seed", "7", "-o", tmp_path / name, "--json")
        content = json.loads(said)
        assert (status, err, said.count("\n"), content["status"]) == (0, "", 1, "rendered")
        (output,) = content["outputs"]
        written = (tmp_path / name).read_bytes()
        assert output["path"] == str(tmp_path / name) and output["bytes"] == len(written) and output["seed"] == 7
        assert output["sha256"] == hashlib.sha256(written).hexdigest()
        sums.append(output["sha256"])
    assert sums[0] == sums[1]
    assert content.keys() == {
        "schema", "files", "base", "status", "family", "adapters", "outputs", "record", "findings",
    }  # fmt: skip
    assert (content["files"], content["base"], content["family"]) == ([str(adapters[0])], "tiny-sd15", "tiny-sd15")
    assert content["record"] == rendering.read_record(tmp_path / name)
    (adapter,) = content["adapters"]
    assert (adapter["modules"], adapter["scale"], adapter["spelling"]) == (16, 1.0, "diffusers")


def test_what_is_converted_on_the_way_draws_the_same(call, adapters, tmp_path):
    for file, name in zip(adapters, ("canonical.png", "kohya.png"), strict=True):
        assert call(file, *ASKED, "-o", tmp_path / name)[0] == 0
    assert call(*ASKED, "-o", tmp_path / "base.png")[0] == 0
    assert pixels(tmp_path / "canonical.png") == pixels(tmp_path / "kohya.png") != pixels(tmp_path / "base.png")


def test_several_files_with_their_scales(call, adapters, tmp_path):
    by_block = '{"unet": {"down": 0.0, "up": 0.5}, "text_encoder": 0.5}'
    scales = ("--scale", "0.5", "--scale", by_block)
    status, said, _ = call(*adapters, *ASKED, *scales, "-o", tmp_path / "x.png", "--json")
    assert status == 0
    assert [adapter["scale"] for adapter in json.loads(said)["adapters"]] == [0.5, json.loads(by_block)]
    record = rendering.read_record(tmp_path / "x.png")
    assert [adapter["file"] for adapter in record["adapters"]] == ["canonical.safetensors", "kohya.safetensors"]
    assert all(
        str(adapter) in finding["subject"] for adapter in adapters[:1] for finding in json.loads(said)["findings"]
    )


def test_several_pictures(call, tmp_path):
    status, said, _ = call(*ASKED, "--count", "2", "--seed", "4", "-o", tmp_path / "x.png")
    assert status == 0 and "seed 4" in said and "seed 5" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-4.png", "x-5.png"]
    assert rendering.read_record(tmp_path / "x-5.png")["seed"] == 5
    assert call(*ASKED, "--seed", "5", "-o", tmp_path / "folder")[0] == 0
    assert pixels(tmp_path / "folder" / "tiny-sd15-5.png") == pixels(tmp_path / "x-5.png")


def test_a_sheet_over_seeds_and_scales(call, adapters, tmp_path):
    asked = (adapters[0], *ASKED, "--grid", "seeds=0..1", "--grid", "scales=0,0.5,1", "-o", tmp_path / "x.png")
    status, said, _ = call(*asked, "--json")
    content = json.loads(said)
    assert status == 0 and len(content["outputs"]) == 1
    assert content["record"]["grid"] == {"seeds": [0, 1], "scales": [0.0, 0.5, 1.0]}
    output = content["outputs"][0]
    assert output["width"] > 3 * 192 and 2 * 192 < output["height"] < output["width"]
    assert call(*ASKED, "-o", tmp_path / "base.png")[0] == 0
    with Image.open(tmp_path / "x.png") as whole, Image.open(tmp_path / "base.png") as base:
        large = np.asarray(base.resize((192, 192), Image.Resampling.NEAREST))
        sheet = np.asarray(whole)
    corners = np.argwhere((sheet[:-191, :-191] == large[0, 0]).all(axis=2))
    assert any(np.array_equal(sheet[y : y + 192, x : x + 192], large) for y, x in corners), "scale 0 is the base alone"


def test_a_sheet_in_a_folder(call, tmp_path):
    status, said, _ = call(*ASKED, "--grid", "seeds=3,1", "-o", tmp_path)
    assert status == 0 and f"{tmp_path / 'tiny-sd15-grid.png'}: " in said
    assert rendering.read_record(tmp_path / "tiny-sd15-grid.png")["seed"] == 3


def test_an_output_that_exists(call, tmp_path, monkeypatch):
    out = tmp_path / "x.png"
    out.write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(pipelines, "open_pipeline", lambda *_, **__: pytest.fail("opened"))
        status, said, err = call(*ASKED, "-o", out)
        assert status == 2 and not said and "exists; --force replaces it" in err
        status, said, err = call(*ASKED, "-o", out, "--json")
        assert status == 2 and "--force" in err
        assert json.loads(said)["status"] == "refused" and "exists" in json.loads(said)["error"]
    assert out.read_bytes() == b"old"
    assert call(*ASKED, "-o", out, "--force")[0] == 0 and out.read_bytes() != b"old"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Missing option '--base'"),
        (("--base", "tiny-sd15", "-o", "x.png"), "Missing option '--prompt'"),
        (ASKED, "Missing option '-o'"),
        ((*ASKED, "-o", "x.jpg"), "name the output x.png"),
        ((*ASKED, "-o", "x.png", "--steps", "0"), "steps must be"),
        ((*ASKED, "-o", "x.png", "--width", "100"), "multiple of 8"),
        ((*ASKED, "-o", "x.png", "--guidance", "nan"), "guidance must be"),
        ((*ASKED, "-o", "x.png", "--seed", "-1"), "seed must be"),
        ((*ASKED, "-o", "x.png", "--scheduler", "dpm"), "there is no scheduler dpm; there are ddim"),
        ((*ASKED, "-o", "x.png", "--count", "0"), "--count"),
        ((*ASKED, "-o", "x.png", "--device", "tpu"), "Invalid value"),
        ((*ASKED, "-o", "x.png", "--scale", "1"), "given 1 time for 0 FILEs"),
        ((SD15, *ASKED, "-o", "x.png", "--scale", "1", "--scale", "2"), "given 2 times for 1 FILE"),
        ((SD15, *ASKED, "-o", "x.png", "--scale", "inf"), "neither a number nor JSON"),
        ((SD15, *ASKED, "-o", "x.png", "--scale", "{"), "neither a number nor JSON"),
        ((SD15, *ASKED, "-o", "x.png", "--scale", '{"unet":' * 100_000), "neither a number nor JSON"),
        ((SD15, *ASKED, "-o", "x.png", "--scale", '{"unet": 1}', "--grid", "scales=0,1"), "plain numbers"),
        ((*ASKED, "-o", "x.png", "--grid", "scales=0,1"), "needs a FILE"),
        ((*ASKED, "-o", "x.png", "--grid", "seeds=0..2", "--count", "2"), "--count"),
        ((*ASKED, "-o", "x.png", "--grid", "seeds=0..2", "--seed", "2"), "leave --seed out"),
        ((*ASKED, "-o", "x.png", "--grid", "seeds=0,1", "--grid", "seeds=2"), "given twice"),
        ((*ASKED, "-o", "x.png", "--grid", "seeds"), "'' is not a seed"),
        ((*ASKED, "-o", "x.png", "--grid", "seeds=2..1"), "'2..1' is not a seed"),
        ((*ASKED, "-o", "x.png", "--grid", "seeds=-1"), "'-1' is not a seed"),
        ((*ASKED, "-o", "x.png", "--grid", "seeds=1,[/x]"), "'[/x]' is not a seed"),
        ((*ASKED, "-o", "x.png", "--grid", "seeds=0..999999999999"), "at most 1,000 pictures"),
        ((SD15, *ASKED, "-o", "x.png", "--grid", "scales=0,nan"), "'nan' is not a number"),
        ((SD15, *ASKED, "-o", "x.png", "--grid", "steps=1,2"), "write scales="),
        ((SD15, *ASKED, "-o", "x.png", "--skip", "nothing"), "matches no tensor"),
    ],
)
def test_wrong_usage_is_a_sentence_before_anything_is_loaded(call, no_loading, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(*arguments)
    assert status == 2 and said in err and "Traceback" not in err and not out
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read(call, no_loading, adapters, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    status, said, _ = call(adapters[0], broken, *ASKED, "-o", tmp_path / "x.png")
    assert status == 1 and "failed, nothing was written" in said and f"malformed-header {broken}: " in said
    status, said, _ = call(tmp_path / "absent", *ASKED, "-o", tmp_path / "x.png", "--json")
    content = json.loads(said)
    assert (status, content["status"], content["outputs"]) == (1, "failed", [])
    assert [finding["name"] for finding in content["findings"]] == ["unreadable"]


def test_a_file_for_another_base_model(call, tmp_path):
    status, said, err = call(SD15, *ASKED, "-o", tmp_path / "x.png")
    assert status == 2 and not said and "(sd15)" in err and "(tiny-sd15)" in err
    status, said, _ = call(SD15, *ASKED, "-o", tmp_path / "x.png", "--json")
    assert status == 2 and json.loads(said)["status"] == "refused" and "(sd15)" in json.loads(said)["error"]
    assert not list(tmp_path.iterdir())


def test_a_base_model_that_does_not_exist(call, tmp_path):
    status, _, err = call("--base", tmp_path / "nowhere", "--prompt", "x", "-o", tmp_path / "x.png")
    assert status == 2 and "nowhere" in err and "Traceback" not in err


def test_prompts_are_data(call, tmp_path):
    prompt = "[bold]two\nlines[/x] <b>\x1b[31m é🙂"
    status, said, err = call(*QUICK, "--prompt", prompt, "--negative-prompt", "[/x]", "-o", tmp_path / "x.png")
    assert (status, err) == (0, "") and "\x1b" not in said
    record = rendering.read_record(tmp_path / "x.png")
    assert (record["prompt"], record["negative_prompt"]) == (prompt, "[/x]")
    assert call(*QUICK, "--prompt", prompt, "--grid", "seeds=0", "-o", tmp_path / "y.png")[0] == 0


def test_a_long_prompt_is_a_warning(call, tmp_path):
    asked = (*QUICK, "--prompt", "red " * 90, "--force", "-o", tmp_path / "x.png")
    status, said, err = call(*asked)
    assert (status, err) == (0, "") and said.count("prompt-truncated") == 1
    assert call(*asked, "--count", "2", "--fail-on", "warning")[0] == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_a_missing_library_is_a_sentence(call, tmp_path, monkeypatch):
    def opened(*_, **__):
        raise ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    monkeypatch.setattr(pipelines, "open_pipeline", opened)
    status, said, err = call(*ASKED, "-o", tmp_path / "x.png")
    assert status == 2 and not said
    assert 'needs diffusers, which is not installed; install it with: pip install "lora-convert[runtime]"' in err


def test_what_was_drawn_before_an_interrupt_stays_whole(call, tmp_path, monkeypatch):
    drawn = rendering.render

    def interrupted(pipeline, settings, **options):
        if settings.seed == 1:
            raise KeyboardInterrupt
        return drawn(pipeline, settings, **options)

    monkeypatch.setattr(rendering, "render", interrupted)
    status, _, err = call(*ASKED, "--count", "3", "-o", tmp_path / "new")
    assert status == 130 and "half-written" in err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiny-sd15-0.png"]
    assert rendering.read_record(tmp_path / "new" / "tiny-sd15-0.png")["seed"] == 0


def test_a_picture_of_nan_is_an_error_with_a_fix(call, tmp_path, monkeypatch):
    opened = pipelines.open_pipeline

    def spoilt(*arguments, **options):
        pipeline = opened(*arguments, **options)
        pipeline.unet.conv_out.bias.data.fill_(float("nan"))
        return pipeline

    monkeypatch.setattr(pipelines, "open_pipeline", spoilt)
    status, said, _ = call(*ASKED, "-o", tmp_path / "x.png")
    assert status == 1 and "not-finite" in said and "nothing was written" in said
    assert not list(tmp_path.iterdir())


def test_help(call):
    status, said, _ = call("--help")
    assert status == 0 and "Examples:" in said and "--grid" in said


def test_the_record_names_no_place(call, adapters, tmp_path):
    assert call(adapters[0], *ASKED, "-o", tmp_path / "x.png")[0] == 0
    text = json.dumps(rendering.read_record(tmp_path / "x.png"))
    assert str(adapters[0].parent) not in text and os.uname().nodename not in text


@pytest.mark.parametrize(("kind", "options"), [("partial_dora", {}), ("lokr", {"to": "peft"})])
def test_a_folder_that_convert_wrote_is_drawn_with(call, tmp_path, kind, options):
    source = FIXTURES / "tiny" / "kinds" / f"{kind}.safetensors"
    lora_convert.convert(source, tmp_path / "o", **options)
    status, out, _ = call(*ASKED, "-o", tmp_path / "p.png", tmp_path / "o", "--json")
    record = json.loads(out)
    assert (status, record["status"]) == (0, "rendered")
    assert record["adapters"][0]["modules"] == len(lora_convert.identify(source).payload)
