"""The whole corpus of real files, where it is: conversion, ΔW against the trainers', loading into the real classes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import CORPUS, manifest, trainer_name
from test_convert import TOLERANCE, Deltas, converted

import lora_convert
from lora_convert.converters import convert as converting

pytestmark = [
    pytest.mark.corpus,
    pytest.mark.skipif(not CORPUS.is_dir(), reason="the shared corpus is not beside this checkout"),
]

RECORDS = manifest(CORPUS / "lora") if CORPUS.is_dir() else []
LATER = ("dora", "loha", "lokr", "oft", "ia3", "glora", "tlora", "full", "norm", "diff")
PLAIN = [
    record
    for record in RECORDS
    if not any(word in record["algo"] for word in LATER)
    and not any(word in json.dumps(record["options"]).lower() for word in ("dora", "train_norm"))
    and "Config" not in record["algo"].replace("LoraConfig", "")
    and "use_dora" not in json.dumps(record["options"])
]  # fmt: skip
OTHERS = [record for record in RECORDS if record not in PLAIN]


def reference(record):
    """The corpus' own comparison of a ΔW with the truth: error over the stored block and the norm."""
    sys.path.insert(0, str(CORPUS / "lora"))
    import refdelta
    import torch

    truth = refdelta.reference(str(CORPUS / "lora" / f"{record['name']}.delta.safetensors"))
    truth = {name.removesuffix(".weight"): entry for name, entry in truth.items() if "@" not in name}

    def error(name, delta, *, sketches=False):
        entry = truth[name]
        ratios = [entry[key]["ratio"] for key in entry if key.startswith("alt_")]
        weight = torch.from_numpy(np.ascontiguousarray(delta)).double()
        weight = weight / (ratios[0] if record.get("file_semantics_note") and ratios else 1.0)
        if sketches:
            return refdelta.compare(entry, weight)
        norm = abs(float(weight.norm()) - entry["fro"]) / entry["fro"]
        if entry["whole"] is not None:
            return max(norm, float((weight - entry["whole"]).norm()) / entry["fro"])
        block = refdelta.sketch(weight, *entry["#block"].shape)["#block"]
        return max(norm, float((block - entry["#block"]).norm() / entry["#block"].norm()))

    return truth, error


def test_the_corpus_is_covered():
    assert len(PLAIN) >= 30
    assert len(PLAIN) + len(OTHERS) == len(RECORDS)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_family_and_trainer(record):
    found = lora_convert.identify(CORPUS / "lora" / record["file"])
    assert (found.kind, found.family, found.trainer, found.ok) == ("lora", record["family"], trainer_name(record), True)
    assert not found.unexplained


@pytest.mark.parametrize("record", PLAIN, ids=lambda record: record["name"])
def test_plain_loras_convert_with_the_trainers_deltas(record, tmp_path):
    source, limit = CORPUS / "lora" / record["file"], TOLERANCE[record["dtype"]]
    result = converted(source, tmp_path / "o.safetensors")
    assert result.worst_delta_error <= limit
    assert len(result.plan.steps) == record["n_modules"]
    truth, error = reference(record)
    exact = Deltas(converted(source, tmp_path / "h.safetensors", alpha="header").outputs[0].path, record["family"])
    folded = Deltas(result.outputs[0].path, record["family"])
    for name in truth:
        # with alpha in the header nothing is rounded: what is left is the truth's own fp32 arithmetic
        assert error(name, exact[name], sketches=True) <= 1e-5, name
        assert error(name, folded[name]) <= max(limit * 1.3, 1e-5), name


@pytest.mark.parametrize("record", PLAIN, ids=lambda record: record["name"])
def test_every_module_arrives_in_diffusers(record, tmp_path):
    pytest.importorskip("diffusers")
    from lora_convert.runtime.loading import load_adapter

    result = converted(CORPUS / "lora" / record["file"], tmp_path / "o.safetensors")
    loaded = load_adapter(result.outputs[0].path, record["family"])
    planned = {target.name for step in result.plan.steps for target in step.source.modules}
    assert set(loaded.deltas) == planned
    ours = Deltas(result.outputs[0].path, record["family"])
    for name in list(planned)[:: max(1, len(planned) // 40)]:
        theirs = np.asarray(loaded.deltas[name], np.float64)
        assert np.linalg.norm(theirs - ours[name]) <= 2e-6 * np.linalg.norm(ours[name]), name


NEEDS: Mapping[str, str] = {
    "c_sd15_comfy_extract": "unsupported-kind", "l_sd15_locon_norm": "unsupported-kind",
    "l_sd15_full_norm": "rank-needed unsupported-kind", "l_sd15_lokr_fullmatrix": "rank-needed",
    **dict.fromkeys(
        (
            "k_sd15_oft", "k_sdxl_oft_all", "l_sd15_boft", "l_sd15_diagoft", "l_sd15_diagoft_constraint_rescaled",
            "l_sd15_glora", "l_sd15_ia3_full", "l_sd15_locon_dora_in", "l_sd15_loha_dora_in", "l_sd15_tlora",
            "lo19_sd15_glora", "lo19_sd15_ia3", "lo19_sd15_oft_diag", "ot_sdxl_legacy_oft2",
        ),
        "base-needed",
    ),
}  # fmt: skip
"""Why files are refused without options; every other one converts."""


class ClosedForm:
    """A base model whose weights are the corpus' closed form, for the modules that are asked for."""

    def __init__(self, family: str) -> None:
        sys.path.insert(0, str(CORPUS / "lora"))
        import refdelta

        self.family, self.name, self._weight = family, "closed form", refdelta.base_weight

    def of(self, modules):
        parts = [self._weight(f"{module.name}.weight", module.shape).numpy() for module in modules]
        biases = [self._weight(f"{module.name}.bias", module.shape[:1]).numpy() for module in modules]
        return {"weight": np.concatenate(parts), "bias": np.concatenate(biases)}


def out_of_reach(source: Path, largest: float) -> tuple[str, ...]:
    """Tensors of norms, which only `merge` takes, and of modules larger than a quick test likes."""
    payload = lora_convert.identify(source).payload
    return tuple(
        tensor
        for module in payload
        for tensor in module.tensors.values()
        if len(module.modules[0].shape) == 1 or np.prod(module.modules[0].shape) > largest
    )


@pytest.mark.parametrize("record", OTHERS, ids=lambda record: record["name"])
def test_other_kinds_convert_or_say_what_they_need(record, tmp_path, monkeypatch):
    """What every ΔW is, tests/test_algebra.py compares with the trainers'; here the outputs are compared with that."""
    source = CORPUS / "lora" / record["file"]
    result = lora_convert.convert(source, tmp_path / "o")
    limit = 5e-4 if "float16" in record["dtype"] else 1e-5
    if record["name"] not in NEEDS:
        assert result.ok and result.worst_delta_error <= limit
        assert len(result.plan.steps) == record["n_modules"]
        return
    assert result.status == "refused" and not (tmp_path / "o").exists()
    errors = [finding for finding in result.findings if finding.severity == "error"]
    assert {finding.name for finding in errors} == set(NEEDS[record["name"]].split())
    assert all("lora-convert merge" in finding.fix for finding in errors)

    closed = ClosedForm(record["family"])
    monkeypatch.setattr(converting, "open_base", lambda base, family: contextlib.nullcontext(closed))
    options = {"base": "closed form", "max_error": 0.05, "skip": out_of_reach(source, 1_000_000)}
    result = lora_convert.convert(source, tmp_path / "o", **options)
    assert result.ok, result.findings
    assert result.worst_delta_error <= (0.05 if any(item.error for item in result.truncations) else limit)


@pytest.mark.parametrize("record", OTHERS, ids=lambda record: record["name"])
def test_other_kinds_load_with_every_module(record, tmp_path):
    pytest.importorskip("diffusers")
    if record["name"] in NEEDS:
        pytest.skip("it has no exact form in a file that diffusers reads")
    from lora_convert.runtime.climb import climb

    result = converted(CORPUS / "lora" / record["file"], tmp_path / "o.safetensors")
    rung = climb(result.outputs[0].path, family=record["family"]).rungs["load"]
    planned = {target.name for step in result.plan.steps for target in step.source.modules}
    assert rung.status == "pass", rung
    assert rung.figures["loaded"] == len(planned)
