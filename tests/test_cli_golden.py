"""`lora-convert golden`: what it prints, its exit status, and what it writes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lora_convert.cli import run
from lora_convert.runtime import pipelines

SUITE = """
[suite]
base = "tiny-sd15"
device = "cpu"
size = 64
steps = 1

[[case]]
name = "shapes"
prompts = ["a red circle"]
seeds = [0, 1]

[[case]]
name = "more"
prompts = ["a blue square"]
"""


@pytest.fixture(scope="module", autouse=True)
def opened() -> Iterator[None]:
    """Every base is opened once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "open_pipeline", functools.cache(pipelines.open_pipeline))
        yield


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "suite.toml"
    path.write_text(SUITE)
    return path


def test_record_then_check(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["golden", "record", str(suite)]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[1:4]] == [
        ["shapes/00", "recorded"],
        ["shapes/01", "recorded"],
        ["more/00", "recorded"],
    ]
    assert "drawn on cpu (" in out
    assert "3 recorded" in out
    assert run(["golden", "check", str(suite)]) == 0
    out = capsys.readouterr().out
    assert "shapes/01  pass       strict  tile difference 0.0000, tile SSIM 1.0000, FLIP 0.0000" in out
    assert "3 pass" in out


def test_a_failing_check_exits_with_1_and_writes_what_is_asked(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["golden", "record", str(suite), "--case", "shapes"]) == 0
    suite.write_text(SUITE.replace("a red circle", "a red ring"))
    capsys.readouterr()
    report, junit = tmp_path / "new" / "report.html", tmp_path / "out.xml"
    assert run(["golden", "check", str(suite), "--report", str(report), "--junit", str(junit)]) == 1
    out = capsys.readouterr().out
    assert "error golden-outdated shapes/00: The golden picture was drawn with other settings: prompt" in out
    assert "error golden-missing more/00: " in out
    assert f"report: {report}" in out
    assert "3 of 3 pictures failed" in report.read_text(encoding="utf-8")
    assert ElementTree.parse(junit).getroot()[0].get("failures") == "3"


def test_json_is_one_object(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["golden", "record", str(suite), "--case", "more", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"][0]["status"] == "recorded"
    assert run(["golden", "check", str(suite), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["schema"], found["status"], found["suite"]) == (1, "fail", str(suite))
    assert [picture["status"] for picture in found["pictures"]] == ["fail", "fail", "pass"]
    assert found["pictures"][2]["difference"] == {"tile_difference": 0.0, "tile_ssim": 1.0, "flip": 0.0}
    assert found["conditions"]["device"] == "cpu"
    assert {finding["name"] for finding in found["findings"]} == {"golden-missing"}


def test_warnings_fail_where_asked(suite: Path) -> None:
    assert run(["golden", "record", str(suite), "--case", "more"]) == 0
    sidecar = suite.parent / "golden" / "more" / "00.json"
    content = json.loads(sidecar.read_text())
    content["record"]["versions"]["torch"] = "2.1.0"
    sidecar.write_text(json.dumps(content))
    assert run(["golden", "check", str(suite), "--case", "more"]) == 0
    assert run(["golden", "check", str(suite), "--case", "more", "--fail-on", "warning"]) == 1


WRONG = {
    "no suite": (["golden", "check", "missing.toml"], "the suite missing.toml cannot be read"),
    "no case": (["golden", "record", "SUITE", "--case", "shape"], 'has no case "shape"; did you mean "shapes"?'),
    "report": (["golden", "check", "SUITE", "--report", "SUITE"], "must end in .html"),
    "junit": (["golden", "check", "SUITE", "--junit", "x.html"], "must end in .xml"),
    "device": (["golden", "check", "SUITE", "--device", "tpu"], "'tpu' is not one of"),
    "dtype": (["golden", "check", "SUITE", "--dtype", "fp8"], "'fp8' is not one of"),
    "verb": (["golden", "draw", "SUITE"], "No such command 'draw'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_a_sentence_on_standard_error(case: str, suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, said = WRONG[case]
    assert run([str(suite) if argument == "SUITE" else argument for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert suite.read_text() == SUITE


def test_wrong_use_with_json_is_an_object_too(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite.write_text(SUITE.replace("steps", "step"))
    assert run(["golden", "check", str(suite), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "refused"
    assert 'there is no key "step"; did you mean "steps"?' in found["error"]


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("record", "check"):
        assert run(["golden", verb, "--help"]) == 0
        assert f"lora-convert golden {verb} golden/suite.toml" in capsys.readouterr().out
