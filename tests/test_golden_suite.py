"""This repository's own golden pictures, by the public command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import FIXTURES

from lora_convert.cli import run

SUITE = FIXTURES / "golden" / "suite.toml"


def test_the_embedded_models_draw_what_they_drew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "golden.html"
    status = run(["golden", "check", str(SUITE), "--json", "--report", str(report)])
    found = json.loads(capsys.readouterr().out)
    said = [f"{finding['name']} {finding['subject']}: {finding['message']}" for finding in found["findings"]]
    assert status == 0, "\n".join([*said, f"see {report}, and docs/golden.md"])
    assert {finding["severity"] for finding in found["findings"]} <= {"note", "warning"}
    assert {picture["level"] for picture in found["pictures"]} <= {"strict", "loose"}
