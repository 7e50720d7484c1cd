"""The record's snippet, run as it stands: diffusers' own loader puts every vector under its token."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.numpy import save_file
from test_embeddings import CASES, REFUSED
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import lora_convert
from lora_convert.containers import opened
from lora_convert.converters.embeddings import read_vectors
from lora_convert.families import embedded, vocabulary
from lora_convert.families.encoders import EMBEDDING_FAMILIES

TOKENIZER = embedded.folder("tiny-sd15") / "tokenizer"


class Reading(TextualInversionLoaderMixin):
    """What a pipeline does with a prompt before its text encoders run, for the widths of a family.

    The encoders have one layer and random values; what is looked at is what their token tables give.
    """

    hf_device_map = None

    def __init__(self, family: str) -> None:
        self.components: dict[str, Any] = {}
        self.encoders = EMBEDDING_FAMILIES[family]
        for encoder in self.encoders:
            tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
            config = CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=encoder.width, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=1, bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            self.components |= {encoder.component: CLIPTextModel(config), encoder.tokenizer: tokenizer}
        for name, part in self.components.items():
            setattr(self, name, part)
        for name in ("text_encoder", "tokenizer"):
            if name not in self.components:
                setattr(self, name, None)

    def __call__(self, prompt: str) -> Any:
        self.read: dict[str, np.ndarray] = {}
        for encoder in self.encoders:
            tokenizer, model = self.components[encoder.tokenizer], self.components[encoder.component]
            converted = self.maybe_convert_prompt(prompt, tokenizer)
            ids = tokenizer(converted, return_tensors="pt").input_ids
            self.read[encoder.key] = model.get_input_embeddings()(ids)[0].detach().numpy()
        return SimpleNamespace(images=[None])


def run(record: dict[str, Any], folder: Path, pipe: Any) -> None:
    first, *rest = record["snippet"].splitlines()
    assert first.startswith('folder = "."')
    exec("\n".join([f"folder = {str(folder)!r}", *rest]), {"pipe": pipe})


def holds(rows: np.ndarray, vectors: np.ndarray) -> bool:
    """Whether the vectors stand among the rows, in their order and without a gap."""
    starts = range(len(rows) - len(vectors) + 1)
    return any(np.array_equal(rows[start : start + len(vectors)], vectors) for start in starts)


@pytest.mark.parametrize("case", CASES)
def test_every_vector_is_read_in_its_place(case, tmp_path):
    if case.id in REFUSED:
        pytest.skip("it has no converted form")
    result = lora_convert.convert(case.path, tmp_path)
    assert result.ok
    record = json.loads((tmp_path / "learned_embeds.json").read_text())
    if result.detection.family == "sd3":
        assert record["snippet"] is None  # diffusers' pipeline has no loader
        return
    for family in [record["family"]] if record["family"] else ["sd15", "sdxl"]:
        pipe = Reading(family)
        run(record, tmp_path, pipe)
        with opened(case.path) as source:
            for embedding in result.detection.embeddings:
                for key, vectors in read_vectors(source, embedding).items():
                    assert holds(pipe.read[key], vectors.astype(np.float32)), (family, embedding.token, key)


@pytest.mark.parametrize("token", ["sks", "<sks>", "SksCat", "my style (v2)", "水彩", "it's", 'say "x"', "a{b}c"])
@pytest.mark.parametrize("count", [1, 3])
def test_tokens_of_every_sort_can_be_written(token, count, tmp_path):
    values = np.random.default_rng(0).normal(0, 0.02, (count, 768)).astype(np.float32)
    save_file({"emb_params": values}, tmp_path / "x.safetensors")
    assert lora_convert.convert(tmp_path / "x.safetensors", tmp_path / "out", token=token).ok
    record = json.loads((tmp_path / "out" / "learned_embeds.json").read_text())
    pipe = Reading("sd15")
    run(record, tmp_path / "out", pipe)
    assert holds(pipe.read["clip_l"], values)


@pytest.mark.parametrize("base", ["tiny-sd15", "tiny-sdxl"])
def test_pipelines_draw_with_it(base, tmp_path):
    """The snippet on a whole pipeline; its picture is another one than the word alone gives."""
    rng = np.random.default_rng(1)
    tensors = {e.key: rng.normal(0, 0.1, (2, e.width)).astype(np.float32) for e in EMBEDDING_FAMILIES[base]}
    save_file(tensors, tmp_path / "x.safetensors")
    result = lora_convert.convert(tmp_path / "x.safetensors", tmp_path / "out", family=base, token="a red circle")
    assert result.ok and result.detection.family == base
    pipe = DiffusionPipeline.from_pretrained(embedded.folder(base))
    pipe.set_progress_bar_config(disable=True)
    draw = {"num_inference_steps": 2, "output_type": "np"}
    before = pipe("a picture of a red circle", generator=torch.Generator().manual_seed(0), **draw).images
    record = json.loads((tmp_path / "out" / "learned_embeds.json").read_text())
    drawn = []

    class Few:
        """The pipeline, with few steps and the seed of before."""

        def __getattr__(self, name: str) -> Any:
            return getattr(pipe, name)

        def __call__(self, prompt: str) -> Any:
            drawn.append(pipe(prompt, generator=torch.Generator().manual_seed(0), **draw).images)
            return SimpleNamespace(images=drawn)

    run(record, tmp_path / "out", Few())
    assert np.isfinite(drawn[0]).all() and np.abs(drawn[0] - before).max() > 1 / 255


def test_fixtures_are_read_where_the_corpus_is_not():
    assert sum(str(case.id).startswith("corpus-") is False for case in CASES) >= 20
    assert (FIXTURES / "embeddings" / "formats").is_dir()


def pooled(pipe: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)[2]


def test_the_pooled_output_is_taken_at_the_end_of_the_text(tmp_path):
    """SDXL's second encoder looks for it at the largest id, which an added token has; the snippet puts that right."""
    rng = np.random.default_rng(1)
    tensors = {e.key: rng.normal(0, 0.1, (2, e.width)).astype(np.float32) for e in EMBEDDING_FAMILIES["tiny-sdxl"]}
    save_file(tensors, tmp_path / "sks.safetensors")
    assert lora_convert.convert(tmp_path / "sks.safetensors", tmp_path / "out", family="tiny-sdxl").ok
    record = json.loads((tmp_path / "out" / "learned_embeds.json").read_text())
    lines = record["snippet"].splitlines()
    (end,) = [line for line in lines if "eos_token_id" in line]
    found = {}
    for title, kept in {"whole": lines, "without": [line for line in lines if line != end]}.items():
        pipe = DiffusionPipeline.from_pretrained(embedded.folder("tiny-sdxl"))
        own = pipe.text_encoder_2.text_model.eos_token_id
        pipe.text_encoder_2.text_model.eos_token_id = 2  # as in the configuration that was published
        run({"snippet": "\n".join(kept[:-1])}, tmp_path / "out", pipe)
        found[title] = pooled(pipe, "sks on a table")
        pipe.text_encoder_2.text_model.eos_token_id = own
        found["true"] = pooled(pipe, "sks on a table")
    assert torch.equal(found["whole"], found["true"]) and not torch.equal(found["without"], found["true"])


@pytest.mark.parametrize(
    ("token", "known"), [("style", True), ("cat", True), ("*", True), ("sks", False), ("Cat", False)]
)
def test_words_of_the_vocabulary_are_put_into_brackets(token, known, tmp_path):
    torch.save({"string_to_param": {"*": torch.full((1, 768), 0.02)}, "name": token}, tmp_path / "file.pt")
    result = lora_convert.convert(tmp_path / "file.pt", tmp_path / "out")
    said = {finding.name for finding in result.findings}
    assert result.ok and result.plan.embeddings[0].token == (f"<{token}>" if known else token)
    assert ("token-renamed" in said) == known
    assert lora_convert.validate(tmp_path / "out", tmp_path / "file.pt").ok
    asked = lora_convert.convert(tmp_path / "file.pt", tmp_path / "asked", token=token)
    assert asked.plan.embeddings[0].token == token
    assert ("token-known" in {finding.name for finding in asked.findings}) == known
    one = lora_convert.convert(tmp_path / "file.pt", tmp_path / "one", to="a1111", token="cat")
    assert [Path(output.path).name for output in one.outputs] == ["cat.safetensors"] and not one.findings


def test_the_vocabulary_is_clips():
    """CLIP's has 256 bytes, 14,667 other pieces that end no word, and two signs; the embedded models have their own."""
    path = Path(vocabulary.__file__).with_name("clip_vocabulary.txt")
    pieces = path.read_text(encoding="utf-8").split("\n")[1:-1]
    assert len(pieces) == len(set(pieces)) == 256 + 14_667 + 2 and not any(piece.endswith("</w>") for piece in pieces)
    assert {"photo", "style", "#", "<|endoftext|>", "Ġ"} <= set(pieces) and "easynegative" not in pieces
    for name in embedded.NAMES:
        tokens = CLIPTokenizer.from_pretrained(embedded.folder(name) / "tokenizer").get_vocab()
        assert all(vocabulary.is_known(token, name) for token in tokens) and not vocabulary.is_known("style", name)
    assert vocabulary.is_known("style", None) and not vocabulary.is_known("style</w>", "sd15")
