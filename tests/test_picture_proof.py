"""The proof by pictures catches what is wrong and nothing that is right, with adapters trained on tiny-sd15."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, LORA
from safetensors.numpy import load_file, save_file

from lora_convert import convert, validate
from lora_convert.containers import opened
from lora_convert.inspect.detect import detect

pytest.importorskip("diffusers")
from lora_convert.runtime.climb import climb
from lora_convert.runtime.picture import PictureProof, disturbance_of, prompts_for, verdict
from lora_convert.runtime.pipelines import open_pipeline
from lora_convert.runtime.rendering import Settings

TINY = FIXTURES / "tiny"
NEON, LOCON, PROBE = "neon_kohya.safetensors", "striped_locon.safetensors", "probe_sd15.safetensors"
Tensors = dict[str, np.ndarray]

pytestmark = pytest.mark.xdist_group("pictures")


@pytest.fixture(scope="module")
def pipeline():
    return open_pipeline("tiny-sd15", "cpu")


@pytest.fixture(scope="module")
def proofs(pipeline):
    """What is drawn for a source, once; every use opens the source anew."""
    base = []

    @functools.cache
    def made(name: str) -> PictureProof:
        with opened(TINY / name) as source:
            found = detect(source)
            settings = Settings("", steps=6)
            proof = PictureProof(pipeline, source, found, settings, prompts_for("tiny-sd15"))
            if base:
                proof.__dict__["base"] = base[0]
            base[:] = [proof.base]
            assert proof.reference
            return proof

    return made


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    @functools.cache
    def made(name: str, **options: str) -> Path:
        out = tmp_path_factory.mktemp("converted") / "pytorch_lora_weights.safetensors"
        assert convert(TINY / name, out, **options).ok
        return out

    return made


def judged(proofs, name: str, file: Path):
    """The rung `picture`, without any other."""
    proof = proofs(name)
    with opened(TINY / name) as source, opened(file) as output:
        proof.source = source
        files = [(source, proof.found), (output, detect(output))]
        disturbance = disturbance_of(files)
        dtypes = {tensor.dtype for tensor in output.header.tensors.values()}
        return verdict(proof.compare(proof.converted(file), disturbance), median="BF16" in dtypes)


def halved(tensors: Tensors) -> Tensors:
    return {name: value * (0.5 if "lora_B" in name else 1) for name, value in tensors.items()}


def half_dropped(tensors: Tensors) -> Tensors:
    modules = sorted({name.partition(".lora_")[0] for name in tensors})
    return {name: value for name, value in tensors.items() if name.partition(".lora_")[0] in modules[::2]}


def keys_and_values_swapped(tensors: Tensors) -> Tensors:
    other = {"to_k": "to_v", "to_v": "to_k"}
    swapped = {}
    for name, value in tensors.items():
        parts = [other.get(part, part) for part in name.split(".")]
        swapped[".".join(parts)] = value
    return swapped


def text_encoder_dropped(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith("text_encoder")}


def one_scaled(tensors: Tensors) -> Tensors:
    one = "unet.up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_v.lora_B.weight"
    return tensors | {one: tensors[one] * np.float16(1.5)}


def signs_flipped(tensors: Tensors) -> Tensors:
    return {name: -value if "lora_B" in name else value for name, value in tensors.items()}


def kernels_transposed(tensors: Tensors) -> Tensors:
    return {name: value.swapaxes(-1, -2).copy() if value.ndim == 4 else value for name, value in tensors.items()}


SABOTAGES: list[tuple[Callable[[Tensors], Tensors], str, bool]] = [
    (halved, NEON, True),
    (half_dropped, NEON, True),
    (keys_and_values_swapped, NEON, True),
    (text_encoder_dropped, NEON, True),
    (one_scaled, NEON, False),  # one module hardly shows in a picture: that is what the delta rung is for
    (signs_flipped, NEON, True),
    (kernels_transposed, LOCON, True),
    (text_encoder_dropped, LOCON, True),
    (half_dropped, LOCON, True),
]


@pytest.mark.parametrize(("sabotage", "name", "visible"), SABOTAGES)
def test_a_sabotaged_conversion_is_caught(sabotage, name, visible, converted, proofs, tmp_path):
    right = converted(name)
    wrong = tmp_path / "wrong.safetensors"
    # Without our header, which would list the modules: alpha is folded, so that nothing else depends on it.
    save_file({key: np.ascontiguousarray(value) for key, value in sabotage(load_file(right)).items()}, wrong)

    result = validate(wrong, against=TINY / name)
    assert result.rungs["delta"].status == "fail"
    assert "delta-mismatch" in {finding.name for finding in result.findings}

    if visible:
        rung = judged(proofs, name, wrong)
        assert rung.status == "fail"
        assert rung.figures["excess"] > 3  # clear of the limit, not just above it
        assert [finding.name for finding in rung.findings] == ["picture-mismatch"]


SOURCES = (NEON, LOCON, PROBE, "neon.safetensors")
RIGHT = [
    *((name, {"dtype": dtype}) for name in SOURCES for dtype in ("fp16", "bf16", "fp32")),
    *((name, {"alpha": "header"}) for name in SOURCES),
    *((name, {"alpha": "header", "dtype": "bf16"}) for name in (NEON, LOCON)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), RIGHT)
def test_a_right_conversion_raises_no_alarm(name, options, converted, proofs):
    rung = judged(proofs, name, converted(name, **options))
    assert rung.status == "pass", rung.findings
    assert rung.figures["excess"] <= 1


@pytest.mark.parametrize("seed", [7, 8])
def test_other_seeds_raise_no_alarm(seed, pipeline, converted):
    with opened(TINY / LOCON) as source:
        settings = Settings("", steps=6, seed=1000 * seed)
        proof = PictureProof(pipeline, source, detect(source), settings, prompts_for("tiny-sd15"))
        rung = verdict(proof.compare(proof.converted(converted(LOCON)), disturbance_of([(source, proof.found)])))
    assert rung.status == "pass", rung.findings


def test_an_adapter_that_does_nothing_is_no_proof(converted, proofs, tmp_path):
    """Two equal pictures prove nothing if the base alone draws them too."""
    same = tmp_path / "idle.safetensors"
    save_file({name: np.zeros_like(value) for name, value in load_file(converted(NEON)).items()}, same)
    result = climb(same, base="tiny-sd15")
    assert result.rungs["picture"].status == "fail"
    assert "no-effect" in {finding.name for finding in result.findings}


def test_a_base_of_other_widths_is_a_note(sdxl_file):
    """A real SDXL file cannot be drawn with tiny-sdxl: the proof stops after loading, and says so."""
    result = climb(sdxl_file, base="tiny-sdxl")
    assert result.status == "pass"
    assert result.rungs["load"].status == "pass"
    assert result.rungs["picture"].status == "skipped"
    assert [finding.name for finding in result.findings if finding.name == "base-widths"] == ["base-widths"]


def test_single_modules_are_told_apart_by_latents(pipeline, tmp_path):
    """The probe changes every module: dropping any one of them moves the latents, however little the picture."""
    tensors = load_file(TINY / PROBE)
    modules = sorted({name.partition(".lora_")[0] for name in tensors})
    with opened(TINY / PROBE) as source:
        found = detect(source)
        settings = Settings("", steps=2)
        proof = PictureProof(pipeline, source, found, settings, prompts_for("tiny-sd15")[:1])
        reference = proof.reference.latents
        for module in modules[:: len(modules) // 12]:
            fewer = tmp_path / "fewer.safetensors"
            save_file({name: value for name, value in tensors.items() if name.partition(".lora_")[0] != module}, fewer)
            moved = np.abs(proof.converted(fewer).latents - reference).max()
            assert moved > 1e-5, module


@pytest.fixture
def sdxl_file(tmp_path):
    """A canonical file for the real SDXL."""
    source = LORA / "k_sdxl_excerpt_f32.safetensors"
    out = tmp_path / "sdxl.safetensors"
    assert convert(source, out).ok
    return out
