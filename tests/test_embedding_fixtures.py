"""The embeddings that were trained on an embedded base model do what they were trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("skimage")

from conftest import FIXTURES, read_all  # noqa: E402

from lora_convert import apply, identify, open_pipeline  # noqa: E402
from training.embeddings import BASE, RECIPES, distances, drawing, save  # noqa: E402
from training.score import other_scenes  # noqa: E402

pytestmark = pytest.mark.xdist_group("pictures")

TINY = FIXTURES / "embeddings" / "tiny"
FILES: Mapping[str, tuple[str, str, int]] = {
    "NeonStyle.pt": ("a1111", "NeonStyle", 4),
    "NeonStyle.safetensors": ("kohya", "NeonStyle", 4),
    "TooDark.safetensors": ("onetrainer", "TooDark", 2),
    "too-dark/learned_embeds.safetensors": ("", "<too-dark>", 2),
}
"""File: the writer, if the file tells, its token, and how many vectors it has."""


@pytest.fixture
def pipeline() -> Any:
    opened = open_pipeline(BASE, "cpu")
    opened.set_progress_bar_config(disable=True)
    return opened


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_what_its_writer_would_have_written(file):
    trainer, token, count = FILES[file]
    found = identify(TINY / file)
    assert found.kind == "embedding"
    assert (found.trainer or "") == trainer
    assert [embedding.token for embedding in found.embeddings] == [token]
    (vectors,) = found.embeddings[0].vectors.values()
    assert (vectors.count, vectors.width) == (count, 64)


@pytest.mark.parametrize("token", RECIPES)
def test_the_script_writes_these_files(token, tmp_path):
    (stored,) = read_all(TINY / f"{token}.safetensors").values()
    save(tmp_path, token, torch.from_numpy(stored).half())
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2
    for path in written:
        if path.suffix == ".safetensors":  # torch's own files differ with its version
            assert (tmp_path / path).read_bytes() == (TINY / path).read_bytes(), path


def test_two_forms_of_an_embedding_have_the_same_values():
    state = torch.load(TINY / "NeonStyle.pt", weights_only=True)
    (kohya,) = read_all(TINY / "NeonStyle.safetensors").values()
    assert np.array_equal(state["string_to_param"]["*"].numpy(), kohya)
    (onetrainer,) = read_all(TINY / "TooDark.safetensors").values()
    (diffusers,) = read_all(TINY / "too-dark" / "learned_embeds.safetensors").values()
    assert np.array_equal(onetrainer, diffusers)


def test_a_style_is_drawn(pipeline):
    """A third of the distance remains; with the first vector alone, as under its capitals elsewhere, more than half."""
    with apply(pipeline, TINY / "NeonStyle.pt") as style:
        found = distances(drawing(pipeline, 6), RECIPES["NeonStyle"].look, style.name, other_scenes(6), negative=False)
    assert found.added.mean() < 0.4 * found.without.mean(), found
    assert (found.added < found.without).sum() >= 5, found


def test_a_defect_is_kept_away(pipeline):
    with apply(pipeline, TINY / "too-dark" / "learned_embeds.safetensors") as defect:
        found = distances(drawing(pipeline, 6), RECIPES["TooDark"].look, defect.name, other_scenes(6), negative=True)
    assert found.added.mean() > 1.15 * found.without.mean(), found
    assert (found.added > found.without).all(), found


def test_the_pictures_are_those_of_diffusers_under_a_name_without_capitals(pipeline):
    draw, prompts = drawing(pipeline, 3), ["a red circle on a blue background, {}"]
    with apply(pipeline, TINY / "NeonStyle.pt"):
        ours = draw([text.format("NeonStyle") for text in prompts], None)
    bare = draw([text.format("NeonStyle") for text in prompts], None)
    pipeline.load_textual_inversion(str(TINY / "NeonStyle.pt"), token="neonstyle")
    theirs = draw([text.format("neonstyle") for text in prompts], None)
    assert np.array_equal(ours[0], theirs[0])
    assert not np.array_equal(ours[0], bare[0])
