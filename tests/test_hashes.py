"""The hashes by which sites know a file, against hashlib, and against kohya's own definition in sd-scripts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import LORA
from safetensors import safe_open

import lora_convert

LARGE = [LORA / "k_sd21_lora.safetensors"]  # more than 0x110000 bytes: the legacy hash is of something
SMALL = [LORA / "k_sd15_excerpt_f32.safetensors", LORA / "k_sd15_lora_bf16_r4a4.safetensors"]


def file_of(header: int, data: int) -> bytes:
    """A file with a header and data of the given sizes."""
    entry = {"a": {"dtype": "U8", "shape": [data], "data_offsets": [0, data]}}
    text = json.dumps(entry).encode().ljust(header)
    return len(text).to_bytes(8, "little") + text + np.random.default_rng(data).bytes(data)


@pytest.mark.parametrize("header", [128, (1 << 20) - 8, (1 << 20) + 100, 3 << 20])
@pytest.mark.parametrize("data", [0, 1000, 0x100000 - 72, 0x100000 + 1, 0x110000, (2 << 20) + 5])
def test_hashes_of_a_file(header, data):
    content = file_of(header, data)
    hashes = dict(lora_convert.identify(content, hashes=True).hashes)
    whole, tensors = hashlib.sha256(content).hexdigest(), hashlib.sha256(content[8 + header :]).hexdigest()
    expected = {
        "sha256": whole,
        "autov1": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
        "autov2": whole[:10],
        "autov3": tensors[:12],
        "tensors": tensors,
        "crc32": f"{zlib.crc32(content):08x}",
    }
    if importlib.util.find_spec("blake3"):
        expected["blake3"] = importlib.import_module("blake3").blake3(content).hexdigest()
    assert hashes == expected


def test_hashes_are_of_the_file_whatever_its_kind(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of(100, 5000))
    found = lora_convert.identify(path, hashes=True)
    assert found.kind == "unknown"
    assert found.hashes["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.as_dict()["hashes"] == found.hashes
    assert lora_convert.identify(path).hashes is None


def opened(path: Path | str) -> tuple[dict, dict[str, str]]:
    pytest.importorskip("torch")
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def kohya_hashes(tensors: Mapping, metadata: Mapping[str, str]) -> tuple[str, str]:
    """sd-scripts' library/train_util.py: precalculate_safetensors_hashes."""
    from safetensors.torch import save

    content = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(content[:8], "little")
    return hashlib.sha256(content[start:]).hexdigest(), hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("path", [*LARGE, *SMALL], ids=lambda path: path.stem)
def test_kohyas_definition_is_the_one_that_kohya_used(path):
    tensors, metadata = opened(path)
    assert kohya_hashes(tensors, metadata) == (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"])


@pytest.mark.parametrize("options", [{}, {"alpha": "header"}, {"to": "kohya"}, {"dtype": "fp32"}], ids=str)
@pytest.mark.parametrize("path", [*LARGE, *SMALL], ids=lambda path: path.stem)
def test_converted_files_carry_their_own_hashes(path, options, tmp_path):
    result = lora_convert.convert(path, tmp_path, validated=False, **options)
    assert result.ok, result.findings
    tensors, metadata = opened(result.outputs[0].path)
    model, legacy = kohya_hashes(tensors, metadata)
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == (model, legacy)
    hashes = lora_convert.identify(result.outputs[0].path, hashes=True).hashes
    assert hashes["tensors"] == model
    assert hashes["sha256"] == result.outputs[0].sha256
    if path in LARGE:
        assert legacy != hashlib.sha256(b"").hexdigest()[:8]


@pytest.mark.parametrize(
    "metadata",
    [
        {"sshs_model_hash": "0", "sshs_legacy_hash": "0"},  # without training metadata
        {"sshs_model_hash": "0x0", "sshs_legacy_hash": "0x0", "ss_steps": "100", "modelspec.title": "x" * 5000},
        {"sshs_legacy_hash": "0", "ss_tag_frequency": json.dumps({"é": 1}) * 9999, "unknown": "kept"},
        {"modelspec.hash_sha256": "0x0", "modelspec.architecture": "stable-diffusion-v1/lora"},
        {"modelspec.hash_sha256": "0", "sshs_model_hash": "0x0"},
        {"ss_steps": "100"},
    ],
    ids=["none", "prefixed", "legacy", "modelspec", "mixed", "no-hashes"],
)
@pytest.mark.parametrize("path", [LARGE[0], SMALL[1]], ids=lambda path: path.stem)
def test_only_hashes_that_the_source_has_are_renewed_as_they_were_spelt(path, metadata, tmp_path):
    from safetensors.torch import save_file

    save_file(opened(path)[0], tmp_path / "in.safetensors", metadata)
    result = lora_convert.convert(tmp_path / "in.safetensors", tmp_path / "out", validated=False)
    assert result.ok, result.findings
    tensors, written = opened(result.outputs[0].path)
    model, legacy = kohya_hashes(tensors, written)
    hashes = {"sshs_model_hash": model, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": model}
    for key, digest in hashes.items():
        if key in metadata:
            assert written[key] == ("0x" if metadata[key].startswith("0x") else "") + digest
        else:
            assert key not in written
    assert metadata.items() - {(key, metadata.get(key)) for key in hashes} <= written.items()


def test_onetrainers_hash_is_renewed(tmp_path):
    path = LORA / "ot_sd15_comfy.safetensors"
    assert opened(path)[1]["modelspec.hash_sha256"] == "0x" + lora_convert.identify(path, hashes=True).hashes["tensors"]
    result = lora_convert.convert(path, tmp_path)
    output = result.outputs[0].path
    tensors = lora_convert.identify(output, hashes=True).hashes["tensors"]
    assert opened(output)[1]["modelspec.hash_sha256"] == f"0x{tensors}"
