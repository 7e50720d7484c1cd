"""Drawing: the same bytes again, a record of what determined them, and sheets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from lora_convert.errors import FileError, UsageError  # noqa: E402
from lora_convert.families import FAMILIES  # noqa: E402
from lora_convert.runtime.applying import apply  # noqa: E402
from lora_convert.runtime.pipelines import open_pipeline  # noqa: E402
from lora_convert.runtime.rendering import (  # noqa: E402
    SCHEDULERS,
    Settings,
    deterministic,
    draw,
    read_record,
    render,
    save_png,
    scheduler_name,
    sheet,
)

SETTINGS = Settings("a red circle", steps=2, width=64, height=64, seed=3)
NASTY = 'two\nlines [bold]é🙂 <script> \x1b[31m "quoted", 100%: a\\b\0c'


@pytest.fixture(scope="module")
def pipeline():
    return open_pipeline("tiny-sd15", "cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A LoRA of some attention modules of tiny-sd15, strong enough to be seen."""
    random = np.random.default_rng(0)
    tensors = {}
    for name, module in FAMILIES["tiny-sd15"].modules.items():
        if name.endswith(("attn1.to_q", "attn2.to_v")):
            out, width = module.shape
            tensors[f"{name}.lora_A.weight"] = random.standard_normal((4, width), np.float32) / 4
            tensors[f"{name}.lora_B.weight"] = random.standard_normal((out, 4), np.float32) / 4
    path = tmp_path_factory.mktemp("adapter") / "bold.safetensors"
    save_file(tensors, path)
    return path


def changed(**settings) -> Settings:
    return dataclasses.replace(SETTINGS, **settings)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"guidance": math.nan}, "guidance"),
        ({"guidance": math.inf}, "guidance"),
        ({"guidance": "7"}, "guidance"),
        ({"width": 100}, "multiple of 8"),
        ({"height": 0}, "multiple of 8"),
        ({"height": -8}, "multiple of 8"),
        ({"scheduler": "dpm+++"}, "euler-a"),
        ({"prompt": "\ud800"}, "no valid text"),
        ({"prompt": None}, "must be text"),
        ({"negative_prompt": "\udfff"}, "negative prompt"),
    ],
)
def test_settings_that_nothing_can_draw_with(wrong, said):
    with pytest.raises(UsageError, match=said):
        changed(**wrong).checked()


@pytest.mark.parametrize(
    ("spelt", "meant"),
    [
        ("Euler a", "euler-a"),
        ("euler_ancestral", "euler-a"),
        ("DPM++ 2M Karras", "dpm++2m-karras"),
        ("dpmpp_2m_sde", "dpm++2m-sde"),
        ("uni_pc", "unipc"),
        ("PLMS", "pndm"),
        *((name, name) for name in SCHEDULERS),
    ],
)
def test_schedulers_by_the_names_of_other_programs(spelt, meant):
    assert scheduler_name(spelt) == meant


def test_two_runs_give_the_same_bytes(pipeline, tmp_path):
    sums = []
    for number in range(2):
        drawn = render(pipeline, SETTINGS)
        save_png(tmp_path / f"{number}.png", drawn.images[0], drawn.record)
        sums.append(hashlib.sha256((tmp_path / f"{number}.png").read_bytes()).hexdigest())
    code = (
        "import torch; from lora_convert.runtime import pipelines, rendering\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"drawn = rendering.render(pipelines.open_pipeline('tiny-sd15', 'cpu'), rendering.{SETTINGS!r})\n"
        f"rendering.save_png({str(tmp_path / 'other.png')!r}, drawn.images[0], drawn.record)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    sums.append(hashlib.sha256((tmp_path / "other.png").read_bytes()).hexdigest())
    assert len(set(sums)) == 1


def test_a_picture_does_not_depend_on_those_beside_it(pipeline):
    several = render(pipeline, changed(scheduler="dpm++2m-sde"), count=3)
    third = render(pipeline, changed(scheduler="dpm++2m-sde", seed=5))
    assert several.latents.shape == (3, 4, 8, 8) and several.latents.dtype == np.float32
    assert np.array_equal(several.latents[2:], third.latents)
    assert several.images[2].tobytes() == third.images[0].tobytes() != several.images[0].tobytes()
    assert several.record_of(2) == third.record and several.record["seed"] == 3


def test_drawing_several_settings(pipeline):
    told = []
    with deterministic():
        images, latents = draw(pipeline, [SETTINGS, changed(prompt="a blue star")], progress=told.append)
    alone = render(pipeline, changed(prompt="a blue star"))
    assert sum(told) == 2 and latents.shape == (2, 4, 8, 8)
    assert np.abs(latents[1:] - alone.latents).max() < 1e-4  # drawn in one batch: other last bits
    assert np.abs(np.asarray(images[1], int) - np.asarray(alone.images[0], int)).max() <= 2


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a blue star"},
        {"negative_prompt": "a circle"},
        {"steps": 3},
        {"guidance": 1.0},
        {"seed": 4},
        {"scheduler": "euler-a"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_every_setting_matters(pipeline, other):
    assert not np.array_equal(render(pipeline, SETTINGS).latents, render(pipeline, changed(**other)).latents)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_and_leaves_the_pipeline_as_it_was(pipeline, name):
    own, config, before = pipeline.scheduler, dict(pipeline.config), dict(pipeline.scheduler.__dict__)
    drawn = render(pipeline, changed(scheduler=name, steps=4))
    class_name, options = SCHEDULERS[name]
    assert drawn.record["scheduler"]["name"] == name and drawn.record["scheduler"]["class"] == class_name
    assert options.items() <= drawn.record["scheduler"]["config"].items()
    assert drawn.record["scheduler"]["config"]["beta_start"] == own.config["beta_start"]
    assert pipeline.scheduler is own and own.__dict__ == before and dict(pipeline.config) == config
    assert not hasattr(pipeline, "_progress_bar_config")


def test_the_size_of_the_base_is_the_default(pipeline):
    drawn = render(pipeline, changed(width=None, height=None, steps=1))
    assert drawn.images[0].size == (128, 128) and drawn.images[0].mode == "RGB"
    assert (drawn.record["width"], drawn.record["height"]) == (128, 128)
    assert render(pipeline, changed(width=None, height=64, steps=1)).images[0].size == (128, 64)
    wide = render(pipeline, changed(width=72, height=40, steps=1))
    assert wide.images[0].size == (72, 40) and wide.latents.shape == (1, 4, 5, 9)


def test_the_other_embedded_base():
    drawn = render(open_pipeline("tiny-sdxl", "cpu", "bf16"), SETTINGS)
    assert drawn.images[0].size == (64, 64)
    assert (drawn.record["dtype"], drawn.record["base"]["name"]) == ("bf16", "tiny-sdxl")


def test_the_record_has_all_that_determined_the_picture_and_no_places(pipeline, adapter):
    plain = render(pipeline, SETTINGS)
    applied = apply(pipeline, adapter, 0.5)
    try:
        drawn = render(pipeline, SETTINGS)
    finally:
        applied.remove()
    assert not np.array_equal(plain.latents, drawn.latents)
    assert np.array_equal(plain.latents, render(pipeline, SETTINGS).latents)
    record = json.loads(json.dumps(drawn.record, allow_nan=False))
    sha256 = hashlib.sha256(adapter.read_bytes()).hexdigest()
    assert record["adapters"] == [
        {"file": "bold.safetensors", "sha256": sha256, "modules": applied.modules, "scale": 0.5}
    ]
    assert plain.record == {**record, "adapters": []}
    for name, value in dataclasses.asdict(SETTINGS).items():
        assert name == "scheduler" or record[name] == value
    assert record["scheduler"]["class"] == type(pipeline.scheduler).__name__
    assert record["base"]["name"] == record["base"]["family"] == "tiny-sd15"
    assert record["device"]["kind"] == "cpu" and record["dtype"] == record["vae_dtype"] == "fp32"
    assert record["versions"].keys() == {"lora_convert", "torch", "diffusers", "transformers", "peft"}
    assert record["threads"] == torch.get_num_threads() and record["deterministic"] is True
    text = json.dumps(record)
    assert str(adapter.parent) not in text and str(Path.home()) not in text and os.uname().nodename not in text


def test_progress_counts_every_step_of_every_picture(pipeline):
    told: list[tuple[int, int]] = []
    render(pipeline, SETTINGS, count=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_nothing_is_printed(pipeline, capfd):
    drawn = render(pipeline, changed(prompt="red " * 100, scheduler="lcm"))
    assert capfd.readouterr() == ("", "")
    (finding,) = drawn.findings
    assert (finding.name, finding.subject, finding.severity) == ("prompt-truncated", "prompt", "warning")
    assert "102 tokens" in finding.message and "77" in finding.message
    assert not render(pipeline, changed(prompt="red " * 75)).findings


@pytest.mark.parametrize(("part", "said"), [("unet", "after step 1 of 2"), ("vae", "VAE decoded")])
def test_a_picture_of_nan_is_an_error_and_not_black(pipeline, part, said):
    weight = pipeline.unet.conv_out.bias if part == "unet" else pipeline.vae.decoder.conv_out.bias
    before = weight.detach().clone()
    try:
        weight.data.fill_(math.nan)
        with pytest.raises(FileError, match=f"not-finite.*{said}"):
            render(pipeline, SETTINGS)
    finally:
        weight.data.copy_(before)
    assert not hasattr(pipeline, "_progress_bar_config")


def test_what_overflows_in_fp16_is_told_what_to_do(pipeline, monkeypatch):
    half = open_pipeline("tiny-sd15", "cpu", "fp16")
    half.unet.conv_out.bias.data.fill_(60000.0)
    with pytest.raises(FileError, match="open the base model in fp32 or bf16"):
        render(half, SETTINGS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"steps": 1001}, "at most 1000 steps"), ({"scheduler": "lcm", "steps": 60}, "lcm cannot draw in 60 steps")],
)
def test_more_steps_than_there_are(pipeline, settings, said):
    own = pipeline.scheduler
    with pytest.raises(UsageError, match=said):
        render(pipeline, changed(**settings))
    assert pipeline.scheduler is own


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_number_of_pictures_that_is_none(pipeline, count):
    with pytest.raises(UsageError, match="number of pictures"):
        render(pipeline, SETTINGS, count=count)


def test_pipelines_that_need_more_than_a_prompt(pipeline):
    sdxl = open_pipeline("tiny-sdxl", "cpu")
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**sdxl.components)
    with pytest.raises(UsageError, match="cannot draw from a prompt alone"):
        render(refiner, SETTINGS)
    parts = {**pipeline.components, "requires_safety_checker": False}
    with pytest.raises(UsageError, match="has no vae"):
        render(diffusers.StableDiffusionPipeline(**{**parts, "vae": None}), SETTINGS)
    wider = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=9)
    with pytest.raises(UsageError, match="takes 9 channels"):
        render(diffusers.StableDiffusionPipeline(**{**parts, "unet": wider}), SETTINGS)


def test_too_little_memory_is_a_sentence(pipeline, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(pipeline.unet, "forward", exhausted)
    with pytest.raises(UsageError, match="not enough memory on cpu"):
        render(pipeline, SETTINGS)


def settings_of_torch() -> dict[str, object]:
    return {
        "environment": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
    }


@pytest.mark.parametrize("set_before", [False, True])
def test_torch_settings_are_restored(set_before, monkeypatch):
    if set_before:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_float32_matmul_precision("medium")
    try:
        before = settings_of_torch()
        with pytest.raises(KeyError), deterministic():
            within = settings_of_torch()
            raise KeyError
        assert settings_of_torch() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert within["deterministic"] and within["matmul"] == "highest" and within["cudnn"] == (True, False, False)
    assert within["environment"] == (":4096:8" if set_before else ":16:8")


def test_a_png_carries_its_record(tmp_path, pipeline):
    drawn = render(pipeline, changed(prompt=NASTY, negative_prompt="Steps: 3, a: b"))
    path = tmp_path / "new" / "folder" / "ä [x].png"
    save_png(path, drawn.images[0], drawn.record)
    assert read_record(path) == drawn.record and read_record(str(path))["prompt"] == NASTY
    with Image.open(path) as image:
        assert image.tobytes() == drawn.images[0].tobytes()
        parameters = image.info["parameters"]
    assert parameters.startswith(
        NASTY.replace("\0", "\ufffd") + "\nNegative prompt: Steps: 3, a: b\nSteps: 2, Sampler: "
    )
    assert "CFG scale: 4.0, Seed: 3, Size: 64x64, Model: tiny-sd15" in parameters
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_png_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    image = Image.new("RGB", (8, 8))

    def interrupted(file, **_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_png(path, image, {"schema": 1})
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be made"):
        save_png(tmp_path / "file" / "x.png", Image.new("RGB", (8, 8)), {"schema": 1})


def png(path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize(
    "record", [None, "", "{", "[1]", "{}", "3", "[" * 100_000, "null"], ids=lambda record: str(record)[:8]
)
def test_a_png_without_a_record(tmp_path, record):
    path = png(tmp_path / "x.png", **({} if record is None else {"lora_convert": record}))
    with pytest.raises(FileError, match=r"unreadable.*no record"):
        read_record(path)


def test_files_that_are_no_pictures(tmp_path):
    whole = png(tmp_path / "x.png", lora_convert='{"schema": 1}').read_bytes()
    for name, content in {"text": b"hello", "empty": b"", "cut": whole[:40], "jpeg": b"\xff\xd8\xff\xe0"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError, match="unreadable"):
            read_record(tmp_path / name)
    for path in (tmp_path, tmp_path / "absent.png"):
        with pytest.raises(FileError, match="unreadable"):
            read_record(path)


def coloured(*colours: str, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    return [Image.new("RGB", size, colour) for colour in colours]


def ink(whole: Image.Image, box: tuple[int, int, int, int]) -> int:
    """Dark pixels in a part of a sheet: writing."""
    return int((np.asarray(whole.crop(box).convert("L")) < 100).sum())


def found_at(whole: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what has exactly this colour."""
    rows, columns = np.nonzero((np.asarray(whole) == colour).all(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_a_sheet_has_its_pictures_in_their_places():
    rows = [coloured("red", "lime"), [*coloured("blue"), None]]
    whole = sheet(rows, ["first", "second"], ["left", "right"], "a title")
    red, lime, blue = (found_at(whole, colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    for box in (red, lime, blue):
        assert (box[2] - box[0], box[3] - box[1]) == (192, 144), "enlarged by 3, pixels staying squares"
    assert red[1] == lime[1] and red[0] == blue[0] and lime[0] > red[2] and blue[1] > red[3]
    assert ink(whole, (0, red[1], red[0] - 2, red[3])) and ink(whole, (0, blue[1], red[0] - 2, blue[3])), "row labels"
    assert ink(whole, (red[0], 0, red[2], red[1] - 2)) and ink(whole, (lime[0], 0, lime[2], red[1] - 2)), "headings"
    assert ink(whole, (0, 0, whole.width, 40)), "title"
    assert whole.getpixel((0, 0)) == whole.getpixel((whole.width - 1, whole.height - 1)) == (250, 250, 248)
    assert sheet(rows, ["first", "second"], ["left", "right"], "a title").tobytes() == whole.tobytes()


def test_long_labels_do_not_run_into_each_other():
    label = "a very long label that says much more than there is room for, " * 5
    word = "w" * 300
    whole = sheet([coloured("red", "lime")], [label], [label, word], label)
    red, lime = found_at(whole, (255, 0, 0)), found_at(whole, (0, 255, 0))
    assert lime[0] - red[2] < 20, "columns keep their distance"
    assert not ink(whole, (red[2] + 1, red[1] - 80, lime[0] - 1, red[3])), "nothing is written between them"
    assert not ink(whole, (whole.width - 19, 0, whole.width, whole.height)), "nor in the margin"
    assert red[0] < 20 + 192 + 30 and whole.height < 400


def test_labels_of_any_text(pipeline):
    sheet([coloured("red")], [NASTY], [""], "\u202e[/x]\ud800\n")


def test_pictures_of_other_sizes_are_fitted():
    whole = sheet([[*coloured("red", size=(200, 100)), *coloured("lime", size=(50, 300))]])
    red, lime = found_at(whole, (255, 0, 0)), found_at(whole, (0, 255, 0))
    assert (red[2] - red[0], lime[3] - lime[1]) == (200, 300)


def test_a_sheet_of_very_many_pictures_is_made_of_smaller_ones(monkeypatch):
    monkeypatch.setattr("lora_convert.runtime.sheets._MOST_PIXELS", 100_000)
    whole = sheet([coloured(*["red"] * 5, size=(200, 100))] * 5)
    left, top, right, bottom = found_at(whole, (255, 0, 0))
    assert 75_000 < (right - left - 40) * (bottom - top - 40) < 100_000


@pytest.mark.parametrize(
    ("rows", "labels"),
    [([], {}), ([[]], {}), ([[None]], {}), ([[1]], {"row_labels": ["a", "b"]}), ([[1]], {"column_labels": ["a", "b"]})],
)
def test_sheets_that_cannot_be(rows, labels):
    (picture,) = coloured("red")
    with pytest.raises(UsageError):
        sheet([[cell and picture for cell in row] for row in rows], **labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_cuda_draws_the_same_twice_and_nearly_what_the_cpu_draws(pipeline, dtype):
    cuda = open_pipeline("tiny-sd15", "cuda", dtype)
    first, second = render(cuda, SETTINGS), render(cuda, SETTINGS)
    assert first.images[0].tobytes() == second.images[0].tobytes() and np.array_equal(first.latents, second.latents)
    assert first.record["device"]["kind"] == "cuda" and first.record["dtype"] == dtype
    alike = render(pipeline, SETTINGS).latents
    error = np.linalg.norm(first.latents - alike) / np.linalg.norm(alike)
    assert error < {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.3}[dtype]
