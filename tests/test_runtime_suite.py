"""Suites of golden pictures as written: what they expand to, and one sentence for whatever is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_convert.errors import UsageError
from lora_convert.runtime.rendering import Settings
from lora_convert.runtime.suite import Suite, SuiteAdapter, read_suite

SMALL = '[[case]]\nname = "one"\nbase = "tiny-sd15"\nprompts = ["a"]\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def suite(folder: Path, text: str) -> Suite:
    path = folder / "suite.toml"
    path.write_text(text, encoding="utf-8")
    return read_suite(path)


def test_defaults_hold_for_cases_that_do_not_say_otherwise(folder: Path) -> None:
    found = suite(
        folder,
        """
        [suite]
        base = "tiny-sd15"
        steps = 8
        size = [64, 128]
        prompts = ["a", "b"]
        seeds = [0, 7]
        goldens = "pictures"
        device = "cpu"
        tolerance = { flip = 0.5 }

        [[case]]
        name = "plain"

        [[case]]
        name = "neon"
        adapter = "a.safetensors"
        scale = 0.5
        steps = 4
        prompts = ["c"]
        negative_prompt = "d"
        guidance = 1
        scheduler = "euler"
        seeds = [3]
        size = 64
        effect = false
        tolerance = { tile_ssim = 0.9 }
        """,
    )
    assert (found.goldens, found.device, found.dtype) == (folder / "pictures", "cpu", "fp32")
    plain, neon = found.cases
    drawn = {picture.id: (picture.settings.prompt, picture.settings.seed) for picture in plain.pictures}
    assert drawn == {"plain/00": ("a", 0), "plain/01": ("a", 7), "plain/02": ("b", 0), "plain/03": ("b", 7)}
    assert plain.pictures[0].settings == Settings("a", steps=8, width=64, height=128)
    assert (plain.adapters, plain.effect, plain.tolerance) == ((), True, {"flip": 0.5})
    assert neon.adapters == (SuiteAdapter("a.safetensors", str(folder / "a.safetensors"), 0.5),)
    assert neon.pictures[0].settings == Settings("c", "d", 4, 1, 64, 64, "euler", 3)
    assert (neon.effect, neon.tolerance) == (False, {"tile_ssim": 0.9})


def test_without_a_suite_table_a_case_says_all(folder: Path) -> None:
    found = suite(folder, SMALL)
    assert (found.goldens, found.device, found.dtype) == (folder / "golden", "auto", "fp32")
    assert found.cases[0].pictures[0].settings == Settings("a")


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ('"a.safetensors"', [("a.safetensors", 2.0)]),
        ('["a.safetensors", "b.safetensors"]', [("a.safetensors", 2.0), ("b.safetensors", 2.0)]),
        ('["a.safetensors", { file = "b.safetensors", scale = -1 }]', [("a.safetensors", 2.0), ("b.safetensors", -1)]),
        (
            '{ file = "a.safetensors", scale = { unet = { up = [0, 1.0] } } }',
            [("a.safetensors", {"unet": {"up": [0, 1.0]}})],
        ),
        ("[]", []),
        ('"hf://owner/repo/x.safetensors"', [("hf://owner/repo/x.safetensors", 2.0)]),
    ],
)
def test_adapters(folder: Path, adapter: str, expected: list[tuple[str, Any]]) -> None:
    found = suite(folder, f"[suite]\nscale = 2.0\nadapter = 'b.safetensors'\n{SMALL}adapter = {adapter}\n")
    assert [(one.written, one.scale) for one in found.cases[0].adapters] == expected


def test_a_base_beside_the_suite_goes_before_the_hub(folder: Path) -> None:
    (folder / "models" / "mine").mkdir(parents=True)
    (folder / "tiny-sdxl").mkdir()
    bases = {
        base: suite(folder, SMALL.replace("tiny-sd15", base)).cases[0].base
        for base in ("models/mine", "models/other", "tiny-sdxl")
    }
    assert bases == {
        "models/mine": str(folder / "models/mine"),
        "models/other": "models/other",
        "tiny-sdxl": "tiny-sdxl",  # what comes with the package is never something else
    }


WRONG = {
    "": "the file: it has no case; each begins with [[case]] and a name",
    "[case]\nname = 'a'": "the file: write each case under [[case]], with two brackets",
    "[[suite]]\nsteps = 1": "the file: write the defaults under [suite], once",
    "[cases]\na = 1": 'the file: there is no key "cases"; did you mean "case"?',
    "[[case]]\nbase = 'tiny-sd15'": "case 1: it has no name",
    "[[case]]\nname = 'a'\nprompts = ['a']": 'case "a": it has no base, and [suite] has none either',
    "[[case]]\nname = 'a'\nbase = 'tiny-sd15'": 'case "a": it has no prompts, and [suite] has none either',
    f"[suite]\nstep = 8\n{SMALL}": '[suite]: there is no key "step"; did you mean "steps"?',
    f"[suite]\nname = 'a'\n{SMALL}": "[suite]: name belongs to one case; write it under [[case]]",
    f"[suite]\ndtype = 'fp8'\n{SMALL}": "[suite]: dtype must be one of fp32, fp16, bf16; it is 'fp8'",
    f"[suite]\nbase = 3\n{SMALL}": "[suite]: base must be text in quotes; it is 3",
    SMALL + SMALL.replace("one", "ONE"): 'the file: the cases "one" and "ONE" need different names',
    SMALL.replace("one", "../one"): "case 1: name must be a file name",
    SMALL.replace("one", "a/b"): "case 1: name must be a file name",
    SMALL.replace("one", "nul.x"): "case 1: name must be a file name",
    SMALL.replace("one", "x" * 65): "case 1: name must be a file name",
    SMALL + "device = 'cpu'": 'case "one": device holds for all cases; write it under [suite]',
    SMALL + "prompt = 'a'": 'case "one": there is no key "prompt"; did you mean "prompts"?',
    SMALL.replace('["a"]', '"a"'): "case \"one\": prompts must be a list of prompts; it is 'a'",
    SMALL.replace('["a"]', "[]"): 'case "one": prompts must be a list of prompts; it is []',
    SMALL.replace('["a"]', "[1]"): 'case "one": prompts must be text in quotes; it is 1',
    SMALL.replace('["a"]', '["a", "a"]'): "case \"one\": prompts has 'a' twice",
    SMALL + "seeds = 3": 'case "one": seeds must be a list of whole numbers; it is 3',
    SMALL + "seeds = [1.5]": 'case "one": seeds must be a whole number; it is 1.5',
    SMALL + "seeds = [-1]": 'case "one": seed must be a whole number, 0 or more; it is -1',
    SMALL + "steps = true": 'case "one": steps must be a whole number; it is True',
    SMALL + "steps = 0": 'case "one": steps must be a whole number, 1 or more; it is 0',
    SMALL + "guidance = nan": 'case "one": guidance must be a number; it is nan',
    SMALL + "size = 60": 'case "one": width must be a multiple of 8 pixels; it is 60',
    SMALL + "size = [64]": 'case "one": size must be pixels, or [width, height]; it is [64]',
    SMALL + "scheduler = 'x'": 'case "one": there is no scheduler x',
    SMALL + "scale = 'x'": "case \"one\": scale must be a number; it is 'x'",
    SMALL + "scale = { unet = { up = true } }": 'case "one": scale.unet.up must be a number; it is True',
    SMALL + "effect = 1": 'case "one": effect must be true or false; it is 1',
    SMALL + "tolerance = 1": 'case "one": tolerance must be a table of tile_difference, tile_ssim, flip; it is 1',
    SMALL + "tolerance = { ssim = 1 }": 'case "one": tolerance: there is no key "ssim"; did you mean "tile_ssim"?',
    SMALL + "adapter = 'x.safetensors'": 'case "one": the adapter x.safetensors is not a file beside the suite',
    SMALL + "adapter = 3": 'case "one": adapter must be a path',
    SMALL + "adapter = { scale = 1 }": 'case "one": adapter has no file',
    SMALL + "adapter = { file = 'a.safetensors', weight = 1 }": 'case "one": adapter: there is no key "weight"',
    "[[case]\n": "is no TOML: ",
    "a = '\N{LATIN SMALL LETTER A}\x07'": "is no TOML: ",
}


@pytest.mark.parametrize("text", WRONG)
def test_whatever_is_wrong_is_one_sentence_that_names_the_place(folder: Path, text: str) -> None:
    with pytest.raises(UsageError) as raised:
        suite(folder, text)
    sentence = str(raised.value)
    assert "suite.toml" in sentence
    assert WRONG[text] in sentence
    assert "\n" not in sentence


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the suite .*missing.toml cannot be read: No such file"):
        read_suite(tmp_path / "missing.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_suite(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(UsageError, match="no text in UTF-8"):
        read_suite(tmp_path / "bytes.toml")


def test_only_some_cases(folder: Path) -> None:
    found = suite(folder, SMALL + SMALL.replace("one", "two"))
    assert [case.name for case in found.only(())] == ["one", "two"]
    assert [case.name for case in found.only(["two"])] == ["two"]
    with pytest.raises(UsageError, match='has no case "tow"; did you mean "two"'):
        found.only(["tow"])
