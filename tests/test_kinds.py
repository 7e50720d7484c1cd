"""The adapters of every kind among the fixtures: what they are, and that their algebra is their trainer's forward."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from conftest import FIXTURES, read_all

from lora_convert.containers import open_source
from lora_convert.converters.adapters import read_adapter
from lora_convert.inspect.detect import detect

pytest.importorskip("lycoris")
pytest.importorskip("torch")
from training import kinds

FOLDER = FIXTURES / "tiny" / "kinds"

ALGORITHMS: Mapping[str, Mapping[str, int]] = {
    "locon": {"lora": 8},
    "locon_tucker": {"lora": 12},
    "locon_rslora": {"lora": 8},
    "lora_bias": {"lora+full": 5},
    "loha": {"loha": 8},
    "loha_tucker": {"loha": 12},
    "lokr": {"lokr": 12},
    "lokr_full": {"lokr": 12},
    "lokr_tucker": {"lokr": 12},
    "lokr_decompose_both": {"lokr": 12},
    "lokr_unbalanced": {"lokr": 12},
    "dora_out": {"lora+dora": 12},
    "dora_in": {"lora+dora": 12},
    "loha_dora_out": {"loha+dora": 8},
    "lokr_dora_out": {"lokr+dora": 12},
    "partial_dora": {"lora": 5, "lora+dora": 3},
    "glora": {"glora": 12},
    "tlora": {"tlora": 9},
    "ia3": {"ia3": 12},
    "diag_oft": {"oft": 12},
    "diag_oft_constraint": {"oft": 12},
    "boft": {"boft": 8},
    "oft_r": {"oft": 7},
    "full": {"full": 6},
    "norm": {"norm": 4, "lora": 3},
}

TOLERANCES = {"tlora": 5e-5}
"""T-LoRA subtracts a part of the weight's SVD, which its trainer takes in float32."""


def detected(name: str):
    return detect(open_source(FOLDER / f"{name}.safetensors"), family="tiny-sd15")


@pytest.fixture(scope="module")
def pipeline():
    return kinds.loaded()


def test_every_kind_has_a_file():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(kinds.KINDS) == set(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_it_is(name):
    found = detected(name)
    assert found.kind == "lora"
    assert found.algorithms == ALGORITHMS[name]
    assert not found.unexplained
    assert not found.findings
    assert set(found.components) == {"unet", "text_encoder"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_shapes_tell_the_family(name):
    assert detect(open_source(FOLDER / f"{name}.safetensors")).family == "tiny-sd15"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_deltas_are_what_the_trainers_forward_does(name, pipeline):
    path = FOLDER / f"{name}.safetensors"
    source, layers, tensors = open_source(path), kinds.layers(pipeline), read_all(path)
    trained = kinds.read(name, path, pipeline)
    assert len(trained) == len(detected(name).payload)
    for module in detected(name).payload:
        flat = next(iter(module.tensors.values())).partition(".")[0]
        layer = layers[flat]
        base = {part: values.detach().numpy() for part, values in layer.named_parameters()}
        expected = {part: values.numpy() for part, values in kinds.changes(trained[flat], layer).items()}
        if f"{flat}.diff_b" in tensors and "bias" not in expected:
            expected["bias"] = tensors[f"{flat}.diff_b"]
        deltas = read_adapter(source, module).deltas(base)
        assert deltas.keys() == expected.keys(), flat
        for part, values in expected.items():
            assert deltas[part].shape == base[part].shape
            error = np.linalg.norm(deltas[part] - values) / np.linalg.norm(values)
            assert error <= TOLERANCES.get(name, 1e-5), (flat, part)


@pytest.mark.parametrize("name", ["locon_tucker", "lokr", "ia3", "oft_r"])
def test_the_files_are_made_again_bit_by_bit(name, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    kinds.write(name, path)
    assert path.read_bytes() == (FOLDER / path.name).read_bytes()
