"""The whole corpus of real files, where it is: conversion, ΔW against the trainers', loading into the real classes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from conftest import CORPUS, manifest, trainer_name
from test_convert import TOLERANCE, Deltas, converted

import lora_convert

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


@pytest.mark.parametrize("record", OTHERS, ids=lambda record: record["name"])
def test_other_kinds_are_refused_in_a_sentence(record, tmp_path):
    result = lora_convert.convert(CORPUS / "lora" / record["file"], tmp_path / "out")
    assert result.status == "refused" and not (tmp_path / "out").exists()
    assert {finding.name for finding in result.findings if finding.severity == "error"} == {"unsupported-kind"}


def test_bad_files_are_refused_or_read_as_their_record_says():
    bad = CORPUS / "bad"
    for record in json.loads((bad / "bad.json").read_text())["samples"]:
        found = lora_convert.identify(bad / record["file"])
        if record["expect"] == "reject" and record["file"].endswith(".safetensors"):
            assert not found.ok, record["file"]
        elif record["expect"] == "accept":
            assert found.ok or not record["file"].endswith(".safetensors"), record["file"]
