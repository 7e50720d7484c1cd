"""The embedded base models: small, complete, and able to draw what their cards say."""

from __future__ import annotations

import numpy as np
import pytest

from lora_convert.families import FAMILIES
from lora_convert.runtime import bases

pytest.importorskip("skimage")
from training.classifier import Seen, classify
from training.pictures import COLOURS, SHAPES, caption, draw, jittered, random_scene
from training.score import PROMPTS, other_scenes, score

AT_LEAST = {"tiny-sd15": 21, "tiny-sdxl": 23}


@pytest.fixture(params=bases.NAMES)
def base(request):
    return request.param


@pytest.fixture
def pipeline(base):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(bases.folder(base), local_files_only=True)


def test_a_base_fits_into_eight_megabytes(base):
    assert sum(path.stat().st_size for path in bases.folder(base).rglob("*") if path.is_file()) <= 8_000_000


def test_a_base_is_a_family_of_its_own(base, pipeline):
    from lora_convert.runtime.pipelines import family_of

    assert family_of(pipeline) == base
    ours, theirs = (set(FAMILIES[name].component("unet").modules) for name in (base, base.removeprefix("tiny-")))
    # widths 64, 64 where SD 1.5 has 640, 1280: this one needs no shortcut there
    assert theirs - ours == ({"down_blocks.2.resnets.0.conv_shortcut"} if base == "tiny-sd15" else set())
    assert ours <= theirs


def test_the_classifier_gets_drawn_truths_right():
    rng = np.random.default_rng(3)
    for scene in (random_scene(rng) for _ in range(300)):
        assert classify(draw(scene)) == Seen.of(scene), scene


def test_captions_say_what_is_drawn():
    rng = np.random.default_rng(4)
    for scene in (random_scene(rng) for _ in range(50)):
        words = caption(scene)
        assert all(word in words for word in (scene.shape, scene.colour, scene.background, scene.size, scene.position))
        assert caption(jittered(scene, rng)) == words


def test_every_word_of_the_captions_is_one_token(base):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(bases.folder(base) / "tokenizer")
    for word in (*COLOURS, *SHAPES, "background", "small", "big", "style"):
        assert len(tokenizer.tokenize(word)) == 1, word


def test_prompts_draw_what_they_say(base, pipeline):
    """Eight of the 24 prompts; all of them, and 96 others, in `make test-slow`."""
    results = score(pipeline, PROMPTS[::3])
    assert sum(seen == Seen.of(scene) for scene, _, seen in results) >= 7


@pytest.mark.slow
def test_the_score_of_the_card(base, pipeline):
    assert sum(seen == Seen.of(scene) for scene, _, seen in score(pipeline, PROMPTS)) >= AT_LEAST[base]
    others = score(pipeline, other_scenes(), 1000)
    assert sum(seen == Seen.of(scene) for scene, _, seen in others) >= 90
