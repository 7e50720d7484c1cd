"""`validate --load`: a file is loaded by diffusers' own code, and every module is counted."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import LORA, lora

import lora_convert

pytest.importorskip("diffusers")

from lora_convert.cli import run
from lora_convert.runtime.climb import climb

FC = "text_encoder.text_model.encoder.layers.0.mlp.fc1"


def test_a_converted_file_passes_every_rung(tmp_path, capsys):
    source = LORA / "k_sd15_excerpt_f32.safetensors"
    output = lora_convert.convert(source, tmp_path).outputs[0].path
    assert run(["validate", output, "--against", str(source), "--load", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {name: rung["status"] for name, rung in record["rungs"].items()} == dict.fromkeys(
        ("structure", "numbers", "delta", "load"), "pass"
    )
    assert (record["rungs"]["load"]["modules"], record["rungs"]["load"]["loaded"]) == (12, 12)
    assert record["rungs"]["load"]["worst"] <= 2e-6


def test_a_file_that_diffusers_refuses_fails(write):
    """Feed-forward layers alone in peft's spelling: sound in itself, and what other tools write."""
    factors = {f"{FC}.lora_A.weight": np.ones((2, 768), "f4"), f"{FC}.lora_B.weight": np.ones((3072, 2), "f4")}
    result = climb(write(factors), family="sd15")
    assert (result.status, result.rungs["structure"].status, result.rungs["load"].status) == ("fail", "pass", "fail")
    assert [finding.name for finding in result.findings] == ["module-not-loaded"]
    assert "infer state dict type" in result.findings[0].message


def test_a_module_that_arrives_with_another_scale_is_named(write):
    """Without alpha in the header, the loader reads a full header's defaults: here r = 2, lora_alpha = 4."""
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{name}.lora_A.weight": np.ones((2, 768), "f4"), f"{name}.lora_B.weight": np.ones((320, 2), "f4")}
    header = {"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_k": 2}, "unet.target_modules": ["to_k"]}
    assert climb(write(factors, {"lora_adapter_metadata": json.dumps(header)})).ok
    header["unet.alpha_pattern"] = {"attn1.to_k": 8}  # peft matches it as a suffix: not this module
    assert climb(write(factors, {"lora_adapter_metadata": json.dumps(header)})).ok


def test_other_layouts_are_skipped(write):
    result = climb(write(lora("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768)))
    assert result.ok and result.rungs["load"].status == "skipped"


def test_an_earlier_failure_is_not_climbed_over():
    result = climb(LORA / "a_sdxl_lokr.safetensors", against=LORA / "a_sdxl_lora.safetensors")
    assert result.status == "fail" and result.rungs["load"].reason == "an earlier rung failed"


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    import importlib

    def without_runtime(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(importlib, "import_module", without_runtime)
    assert run(["validate", str(LORA / "a_sdxl_lora.safetensors"), "--load"]) == 2
    assert 'pip install "lora-convert[runtime]"' in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["file", "source"])
def test_a_report_of_what_cannot_be_read_is_not_written(broken, tmp_path, capsys):
    whole, cut, report = LORA / "a_sdxl_lora.safetensors", tmp_path / "cut.safetensors", tmp_path / "report.html"
    cut.write_bytes(whole.read_bytes()[:1000])
    files = [str(cut)] if broken == "file" else [str(whole), "--against", str(cut)]
    assert run(["validate", *files, "--report", str(report)]) == 1
    said = capsys.readouterr()
    assert "malformed-header" in said.out and not said.err
    assert not report.exists()
