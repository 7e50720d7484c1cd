"""Golden pictures: what is recorded, what a check finds, and what each finding is called."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import names_of
from PIL import Image
from safetensors.numpy import save_file

from lora_convert.errors import UsageError
from lora_convert.families import FAMILIES
from lora_convert.runtime import bases, golden_report, pipelines, studio
from lora_convert.runtime import golden as golden_module
from lora_convert.runtime.comparing import Difference
from lora_convert.runtime.golden import SuiteResult, check, record
from lora_convert.runtime.golden_file import Golden, read_golden, write_golden
from lora_convert.runtime.policy import POLICY
from lora_convert.runtime.studio import disturbed

SAME = Difference(0.0, 1.0, 0.0)
SUITE = """
[suite]
base = "tiny-sd15"
device = "cpu"
size = 64
steps = 2
prompts = ["a red circle"]

[[case]]
name = "base"

[[case]]
name = "style"
adapter = "style.safetensors"
seeds = [3]
"""


def adapter(path: Path, strength: float, seed: int = 0, family: str = "tiny-sd15") -> None:
    """An adapter of all attention of the UNet; a strength of 1 has about the weights' own norm."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, module in FAMILIES[family].modules.items():
        if ".attn" in name and name.startswith("unet."):
            out, width = module.shape
            tensors[f"{name}.lora_A.weight"] = random.standard_normal((2, width)) / width**0.5
            tensors[f"{name}.lora_B.weight"] = strength * random.standard_normal((out, 2)) / 2**0.5
    save_file({name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}, path)


@pytest.fixture(scope="module", autouse=True)
def opened() -> Iterator[list[str]]:
    """Every base is opened once for all tests here; the list has what was asked for."""
    asked: list[str] = []
    open_once = functools.cache(pipelines.open_pipeline)

    def open_pipeline(base: str, *arguments: str) -> Any:
        asked.append(base)
        return open_once(base, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "open_pipeline", open_pipeline)
        yield asked


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SuiteResult]:
    folder = tmp_path_factory.mktemp("recorded")
    adapter(folder / "style.safetensors", 0.5)
    (folder / "suite.toml").write_text(SUITE)
    return folder, record(folder / "suite.toml")


@pytest.fixture
def folder(recorded: tuple[Path, SuiteResult], tmp_path: Path) -> Path:
    """A copy of the recorded suite, to do things to."""
    return Path(shutil.copytree(recorded[0], tmp_path / "suite"))


def written(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(path for path in (folder / "golden").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def rewrite(folder: Path, old: str, new: str) -> None:
    path = folder / "suite.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def golden(folder: Path, id: str) -> Golden:
    found = read_golden(folder / "golden", id)
    assert found is not None
    return found


def touch_sidecar(folder: Path, id: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "golden" / f"{id}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_record_writes_pictures_and_all_that_determined_them(recorded: tuple[Path, SuiteResult]) -> None:
    folder, result = recorded
    assert result.ok
    assert {picture.id: picture.status for picture in result.pictures} == dict.fromkeys(
        ("base/00", "style/00"), "recorded"
    )
    assert sorted(written(folder)) == [
        f"golden/{id}.{kind}" for id in ("base/00", "style/00") for kind in ("json", "png")
    ]
    with Image.open(folder / "golden/style/00.png") as picture:
        assert (picture.mode, picture.size, picture.info) == ("RGB", (64, 64), {})
    found = golden(folder, "style/00")
    expected = {"prompt": "a red circle", "seed": 3, "steps": 2, "width": 64, "height": 64, "dtype": "fp32"}
    assert {key: found.record[key] for key in expected} == expected
    assert found.record["versions"]["torch"] == torch.__version__
    assert len(found.record["adapters"][0]["sha256"]) == 64
    assert str(folder) not in (folder / "golden/style/00.json").read_text()  # nothing of this machine's folders
    assert found.base_alone is not None
    assert found.base_alone.tile_difference > 0.02
    assert golden(folder, "base/00").base_alone is None
    assert (found.repeated.tile_difference, found.repeated.tile_ssim, found.repeated.flip) == (0, 1, 0)
    assert found.disturbed.tile_difference < 0.002
    assert list(found.tolerances) == list(POLICY)


def test_recording_again_changes_no_byte(folder: Path) -> None:
    before = written(folder)
    again = record(folder / "suite.toml")
    assert {picture.status for picture in again.pictures} == {"kept"}
    assert again.conditions is None  # nothing was drawn
    updated = record(folder / "suite.toml", update=True)
    assert {picture.status for picture in updated.pictures} == {"unchanged"}
    assert updated.pictures[0].difference == SAME
    assert written(folder) == before


def test_what_is_missing_is_drawn_and_the_rest_kept(folder: Path) -> None:
    before = written(folder)
    rewrite(folder, "seeds = [3]", "seeds = [3, 4]")
    result = record(folder / "suite.toml")
    assert [picture.status for picture in result.pictures] == ["kept", "kept", "recorded"]
    assert {name: found for name, found in written(folder).items() if name in before} == before


def test_update_replaces_what_changed(folder: Path) -> None:
    rewrite(folder, "seeds = [3]", "seeds = [5]")
    result = record(folder / "suite.toml", update=True, cases=["style"])
    (style,) = result.pictures
    assert style.status == "updated"
    assert style.difference is not None
    assert style.difference.tile_difference > 0.02
    assert check(folder / "suite.toml").ok


def test_a_check_passes_strictly_on_the_machine_that_recorded(folder: Path) -> None:
    result = check(folder / "suite.toml")
    assert result.ok
    assert result.findings == ()
    assert [(picture.status, picture.level) for picture in result.pictures] == [("pass", "strict")] * 2
    assert all(picture.difference is not None and not picture.difference.flip for picture in result.pictures)
    assert json.loads(json.dumps(result.as_dict()))["status"] == "pass"


def test_a_changed_picture_is_told_with_the_figures_that_are_too_far_off(folder: Path) -> None:
    before = golden(folder, "style/00")
    pixels = np.array(before.image)
    pixels[16:40, 16:40] ^= 0x40
    write_golden(folder / "golden", "style/00", replace(before, image=Image.fromarray(pixels)))
    result = check(folder / "suite.toml")
    assert not result.ok
    base, style = result.pictures
    assert (base.status, style.status) == ("pass", "fail")
    (finding,) = style.findings
    assert (finding.name, finding.severity, finding.subject) == ("picture-mismatch", "error", "style/00")
    for said in ("tile difference 0.", "(at most 0.0010)", "tile SSIM ", "FLIP "):
        assert said in finding.message


CHANGES = {
    "prompt": ("a red circle", "a blue square", "prompt 'a red circle', now 'a blue square'"),
    "negative prompt": ("seeds", 'negative_prompt = "x"\nseeds', "negative prompt '', now 'x'"),
    "seed": ("[3]", "[4]", "seed 3, now 4"),
    "steps": ("steps = 2", "steps = 3", "steps 2, now 3"),
    "guidance": ("seeds", "guidance = 2\nseeds", "guidance 4.0, now 2.0"),
    "size": ("size = 64", "size = [64, 72]", "height 64, now 72"),
    "scheduler": ("seeds", 'scheduler = "euler"\nseeds', "now EulerDiscreteScheduler"),
    "scale": ("seeds", "scale = 0.9\nseeds", "scale of style.safetensors 1.0, now 0.9"),
    "one more adapter": (
        '"style.safetensors"',
        '["style.safetensors", "style.safetensors"]',
        "1 adapter, now 2",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_no_mismatch_of_pictures(folder: Path, change: str) -> None:
    old, new, said = CHANGES[change]
    rewrite(folder, old, new)
    style = check(folder / "suite.toml", cases=["style"]).pictures[0]
    assert names_of(style.findings) == {"golden-outdated"}
    assert said in style.findings[0].message
    assert "record it again with --update" in style.findings[0].fix


def test_another_adapter_file_is_told_by_its_hash(folder: Path) -> None:
    adapter(folder / "style.safetensors", 0.5, seed=1)
    style = check(folder / "suite.toml", cases=["style"]).pictures[0]
    assert names_of(style.findings) == {"golden-outdated"}
    assert "style.safetensors is another file (sha256 " in style.findings[0].message


def test_an_adapter_may_be_renamed(folder: Path) -> None:
    (folder / "style.safetensors").rename(folder / "neon.safetensors")
    rewrite(folder, "style.safetensors", "neon.safetensors")
    assert check(folder / "suite.toml", cases=["style"]).ok


def test_another_base_model_is_told_by_its_weights(folder: Path) -> None:
    touch_sidecar(folder, "base/00", lambda content: content["record"]["base"].update(sha256="0" * 64))
    base = check(folder / "suite.toml", cases=["base"]).pictures[0]
    assert names_of(base.findings) == {"golden-outdated"}
    assert "with other weights" in base.findings[0].message


ELSEWHERE: dict[str, tuple[dict[str, Any], str, str]] = {
    "processor": ({"device": {"kind": "cpu", "name": "x86_64 AVX2"}}, "loose", "note"),
    "torch": ({"versions": {"torch": "2.1.0"}}, "loose", "warning"),
    "device": ({"device": {"kind": "cuda", "name": "a card"}}, "wide", "warning"),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_goldens_of_other_conditions_get_the_policys_level(folder: Path, where: str) -> None:
    change, level, severity = ELSEWHERE[where]
    touch_sidecar(folder, "base/00", lambda content: content["record"].update(change))
    result = check(folder / "suite.toml", cases=["base"])
    assert result.ok
    assert [(picture.status, picture.level) for picture in result.pictures] == [("pass", level)]
    assert result.pictures[0].tolerance == POLICY[level].tolerance
    (finding,) = result.findings
    assert (finding.name, finding.severity) == ("other-conditions", severity)


def test_another_dtype_is_not_comparable_unless_the_case_says_how(folder: Path) -> None:
    touch_sidecar(folder, "base/00", lambda content: content["record"].update(dtype="bf16"))
    base = check(folder / "suite.toml", cases=["base"]).pictures[0]
    assert names_of(base.findings) == {"golden-outdated"}
    assert "drawn in bf16 and this one in fp32" in base.findings[0].message
    assert "--dtype bf16" in base.findings[0].fix
    rewrite(folder, 'name = "base"', 'name = "base"\ntolerance = { flip = 0.3 }')
    base = check(folder / "suite.toml", cases=["base"]).pictures[0]
    assert (base.status, base.level) == ("pass", "wide")
    assert base.tolerance == replace(POLICY["wide"].tolerance, flip=0.3)


def test_a_tolerance_wider_than_the_adapters_effect_is_told(folder: Path) -> None:
    rewrite(folder, "seeds = [3]", "tolerance = { tile_difference = 1, tile_ssim = -1, flip = 1 }\nseeds = [3]")
    result = check(folder / "suite.toml", cases=["style"])
    assert result.ok
    assert [(finding.name, finding.severity) for finding in result.findings] == [("no-effect", "warning")]


def test_missing_goldens_are_told_without_drawing(folder: Path, opened: list[str]) -> None:
    shutil.rmtree(folder / "golden")
    opened.clear()
    result = check(folder / "suite.toml")
    assert [names_of(picture.findings) for picture in result.pictures] == [{"golden-missing"}] * 2
    assert "lora-convert golden record" in result.findings[0].fix
    assert opened == []


def damage_picture(folder: Path) -> None:
    (folder / "golden/base/00.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "damaged picture": damage_picture,
    "no picture": lambda folder: (folder / "golden/base/00.png").unlink(),
    "no sidecar": lambda folder: (folder / "golden/base/00.json").unlink(),
    "another picture": lambda folder: shutil.copy(folder / "golden/style/00.png", folder / "golden/base/00.png"),
    "no JSON": lambda folder: (folder / "golden/base/00.json").write_text("{"),
    "JSON of something else": lambda folder: (folder / "golden/base/00.json").write_text('{"schema": 1}'),
    "a list": lambda folder: (folder / "golden/base/00.json").write_text("[]"),
    "a later schema": lambda folder: touch_sidecar(folder, "base/00", lambda content: content.update(schema=2)),
    "no conditions": lambda folder: touch_sidecar(folder, "base/00", lambda content: content["record"].pop("device")),
    "no adapters": lambda folder: touch_sidecar(folder, "base/00", lambda content: content["record"].pop("adapters")),
    "odd noise": lambda folder: touch_sidecar(folder, "base/00", lambda content: content.update(noise={"repeated": 3})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_goldens_are_told_and_drawn_anew_when_asked(folder: Path, damage: str) -> None:
    before = (folder / "golden/base/00.png").read_bytes()
    DAMAGE[damage](folder)
    for result in (check(folder / "suite.toml", cases=["base"]), record(folder / "suite.toml", cases=["base"])):
        assert [names_of(picture.findings) for picture in result.pictures] == [{"golden-damaged"}]
        assert not result.ok
    assert record(folder / "suite.toml", cases=["base"], update=True).pictures[0].status == "updated"
    assert (folder / "golden/base/00.png").read_bytes() == before
    assert read_golden(folder / "golden", "base/00") is not None


def test_a_picture_packed_otherwise_is_the_same(folder: Path) -> None:
    path = folder / "golden/base/00.png"
    with Image.open(path) as picture:
        picture.load()
    picture.convert("RGBA").save(path, compress_level=0)
    assert check(folder / "suite.toml", cases=["base"]).ok


def test_a_golden_whose_adapter_does_nothing_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "golden/style")
    rewrite(folder, "seeds = [3]", "scale = 0\nseeds = [3]")
    result = record(folder / "suite.toml")
    assert not result.ok
    base, style = result.pictures
    assert (base.status, style.status) == ("kept", "refused")
    assert [(finding.name, finding.severity) for finding in style.findings] == [("no-effect", "error")]
    assert not (folder / "golden/style").exists()
    rewrite(folder, "scale = 0", "scale = 0\neffect = false")
    assert record(folder / "suite.toml").pictures[1].status == "recorded"
    assert check(folder / "suite.toml").findings == ()


def test_between_no_effect_and_a_visible_one_there_is_a_warning(folder: Path) -> None:
    low, high = 0.0, 1.0
    for _ in range(12):
        scale = (low + high) / 2
        (folder / "suite.toml").write_text(SUITE + f"scale = {scale}\n")
        (style,) = record(folder / "suite.toml", update=True, cases=["style"]).pictures
        severity = next((finding.severity for finding in style.findings if finding.name == "no-effect"), None)
        if severity == "warning":
            break
        low, high = (scale, high) if severity == "error" else (low, scale)
    assert severity == "warning"
    assert style.status in ("updated", "unchanged")


def test_a_picture_that_hangs_on_last_bits_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def much_disturbed(pipeline: Any) -> Iterator[None]:
        weight = pipeline.unet.conv_out.weight
        before = weight.clone()
        with torch.no_grad():
            weight.mul_(0.5)
            yield
            weight.copy_(before)

    monkeypatch.setattr(golden_module, "disturbed", much_disturbed)
    (base,) = record(folder / "suite.toml", update=True, cases=["base"]).pictures
    assert base.status == "updated"  # the picture is the same, and its sidecar knows more
    assert [(finding.name, finding.severity) for finding in base.findings] == [("unsteady-picture", "warning")]
    found = golden(folder, "base/00")
    assert found.tolerances["strict"] == POLICY["strict"].tolerance
    assert found.tolerances["loose"].tile_difference == POLICY["loose"].noise * found.disturbed.tile_difference


def test_files_that_no_case_draws_are_told(folder: Path) -> None:
    (folder / "golden/old").mkdir()
    shutil.copy(folder / "golden/base/00.png", folder / "golden/old/07.png")
    (folder / "golden/old/notes.json").write_text("{}")  # not ours
    for result in (check(folder / "suite.toml"), record(folder / "suite.toml")):
        assert result.ok
        (finding,) = result.findings
        assert (finding.name, finding.severity) == ("golden-unused", "warning")
        assert "1 file in golden that no case draws: old/07.png" in finding.message
    assert check(folder / "suite.toml", cases=["base"]).findings == ()


def test_an_adapter_that_cannot_be_loaded_fails_its_case_alone(folder: Path) -> None:
    (folder / "style.safetensors").write_bytes(b"nothing of the kind")
    result = check(folder / "suite.toml")
    base, style = result.pictures
    assert (base.status, style.status) == ("pass", "fail")
    assert names_of(style.findings) == {"malformed-header"}


def test_an_adapter_of_another_family_is_wrong_use_and_names_the_case(folder: Path) -> None:
    adapter(folder / "style.safetensors", 0.5, family="tiny-sdxl")
    with pytest.raises(UsageError, match=r'suite\.toml: case "style": .*tiny-sdxl'):
        check(folder / "suite.toml")


def test_a_base_that_is_not_there_is_wrong_use_and_names_the_case(folder: Path) -> None:
    rewrite(folder, "tiny-sd15", "no-such-model")
    with pytest.raises(UsageError, match=r'suite\.toml: case "base": .*no-such-model'):
        check(folder / "suite.toml")


def test_each_base_is_opened_once_and_results_keep_the_suites_order(folder: Path, opened: list[str]) -> None:
    (folder / "copy").symlink_to(bases.folder("tiny-sd15"))
    cases = "".join(
        f'[[case]]\nname = "{name}"\nbase = "{base}"\n' for name, base in (("b", "copy"), ("c", "tiny-sd15"))
    )
    (folder / "suite.toml").write_text(SUITE + cases)
    opened.clear()
    result = record(folder / "suite.toml", update=True)
    assert opened == ["tiny-sd15", str(folder / "copy")]
    assert [picture.id for picture in result.pictures] == ["base/00", "style/00", "b/00", "c/00"]
    images = {picture.id: (folder / f"golden/{picture.id}.png").read_bytes() for picture in result.pictures}
    assert images["b/00"] == images["c/00"] == images["base/00"] != images["style/00"]


def test_an_interrupted_recording_leaves_whole_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / "golden")
    drawn, draw = [], studio.render

    def interrupted(*arguments: Any) -> Any:
        drawn.append(arguments)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(studio, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(folder / "suite.toml")
    assert sorted(written(folder)) == ["golden/base/00.json", "golden/base/00.png"]
    assert read_golden(folder / "golden", "base/00") is not None
    monkeypatch.undo()


def test_progress_counts_pictures(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    check(folder / "suite.toml", progress=lambda *step: seen.append(step))
    assert seen == [("drawing", 1, 2), ("drawing", 2, 2)]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_disturbance_moves_every_weight_by_its_last_bit_and_takes_it_back(dtype: str) -> None:
    pipeline = pipelines.open_pipeline("tiny-sd15", "cpu", dtype)
    weights = dict(pipeline.unet.named_parameters())
    bits = {2: torch.int16, 4: torch.int32}[next(iter(weights.values())).element_size()]
    before = {name: weight.clone() for name, weight in weights.items()}
    with disturbed(pipeline):
        steps = torch.cat(
            [(weight.view(bits) - before[name].view(bits))[before[name] != 0] for name, weight in weights.items()]
        )
        assert set(steps.unique().tolist()) == {-1, 1}
        assert abs(steps.float().mean().item()) < 0.01  # up and down alike
        assert all(weight.isfinite().all() for weight in weights.values())
        with pytest.raises(RuntimeError, match="passes through"), disturbed(pipeline):
            raise RuntimeError("passes through")
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_the_report_shows_what_failed_and_is_safe_to_open(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, "a red circle", "<script>alert(1)</script>\\u202e")
    result = check(folder / "suite.toml")
    golden_report.write_report(tmp_path / "out" / "report.html", result)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "2 of 2 pictures failed" in page
    assert page.count("data:image/png;base64,") == 6
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in page
    assert "\u202e" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_report_of_a_passing_suite_lists_its_pictures(folder: Path) -> None:
    page = golden_report.report_html(check(folder / "suite.toml"))
    assert "2 of 2 pictures are as they were" in page
    assert "style/00" in page
    assert "data:image" not in page


def test_junit_has_a_case_per_picture(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, "seeds = [3]", "seeds = [3, 4]")
    (folder / "golden/old").mkdir()
    shutil.copy(folder / "golden/base/00.png", folder / "golden/old/07.png")
    golden_report.write_junit(tmp_path / "out.xml", check(folder / "suite.toml"))
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    cases = {f"{case.get('classname')}/{case.get('name')}": case for case in suite.iter("testcase")}
    assert list(cases) == ["base/00", "style/00", "style/01"]
    failures = {id: case.find("failure") for id, case in cases.items()}
    assert failures["base/00"] is None
    assert failures["style/01"] is not None
    assert failures["style/01"].get("type") == "golden-missing"
    assert "golden-unused" in (suite.findtext("system-out") or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_goldens_of_the_cpu_pass_on_a_gpu_at_the_wide_level(folder: Path) -> None:
    result = check(folder / "suite.toml", device="cuda")
    assert result.ok
    assert {picture.level for picture in result.pictures} == {"wide"}
    assert [(finding.name, finding.severity) for finding in result.findings] == [("other-conditions", "warning")]
