"""Embeddings on a live pipeline, against prompts put together by hand; what is left when they go; their proof."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from conftest import FIXTURES, names_of, read_all  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from test_runtime_applying import factors, state, write_canonical  # noqa: E402

from lora_convert import apply, climb, convert  # noqa: E402
from lora_convert.cli import run  # noqa: E402
from lora_convert.errors import FileError, UsageError  # noqa: E402
from lora_convert.families.encoders import EMBEDDING_FAMILIES  # noqa: E402
from lora_convert.report import Finding  # noqa: E402
from lora_convert.runtime.applying import applied  # noqa: E402
from lora_convert.runtime.architectures import TEXT_ENCODERS  # noqa: E402
from lora_convert.runtime.embedding import Word, _Reader, place, take_off  # noqa: E402
from lora_convert.runtime.embedding_proof import (  # noqa: E402
    check_loaded,
    encode,
    loaded,
    placements,
    words_of,
)
from lora_convert.runtime.picture import Drawing  # noqa: E402
from lora_convert.runtime.pipelines import open_pipeline  # noqa: E402
from lora_convert.runtime.rendering import Settings, render  # noqa: E402

pytestmark = pytest.mark.xdist_group("pictures")

Vectors = Mapping[str, np.ndarray]
WIDTHS = {family: {e.key: e.width for e in EMBEDDING_FAMILIES[family]} for family in ("tiny-sd15", "tiny-sdxl")}


def vectors(family: str, count: int, seed: int = 0, dtype: str = "f4") -> dict[str, np.ndarray]:
    """Random vectors as long as those of words."""
    random = np.random.default_rng(seed)
    return {key: (random.standard_normal((count, width)) * 0.02).astype(dtype) for key, width in WIDTHS[family].items()}


def write(path: Path, held: Vectors) -> Path:
    """A file of the field: Kohya's for one encoder, ComfyUI's for two. Its name is the token."""
    tensors = dict(held) if len(held) > 1 else {"emb_params": next(iter(held.values()))}
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module", params=["tiny-sd15", "tiny-sdxl"])
def pipeline(request):
    return open_pipeline(request.param, "cpu")


@pytest.fixture
def sd15():
    return open_pipeline("tiny-sd15", "cpu")


@pytest.fixture
def sdxl():
    return open_pipeline("tiny-sdxl", "cpu")


def family_of(pipeline: Any) -> str:
    return "tiny-sdxl" if hasattr(pipeline, "text_encoder_2") else "tiny-sd15"


def encoded(pipeline: Any, prompts: list[str], negative: list[str]) -> list[Any]:
    """What the pipeline makes of prompts and negative prompts, pooled outputs included."""
    with torch.no_grad():
        made = pipeline.encode_prompt(
            prompt=prompts,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt=negative,
        )
    return list(made)


def by_hand(pipeline: Any, words: list[Word], prompts: list[str], negative: list[str]) -> list[Any]:
    """The same by the definition, without anything applied."""
    encoders = EMBEDDING_FAMILIES[family_of(pipeline)]
    with torch.no_grad():
        both = [encode(pipeline, encoders, words, texts) for texts in (prompts, negative)]
    return [made[part] for part in range(len(encoders)) for made in both]


def equal(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


CASES = {
    "one vector": ({"neon": 1}, "a red neon circle"),
    "capitals": ({"NeonStyle": 4}, "NeonStyle, a circle"),
    "other capitals in the prompt": ({"EasyNegative": 3}, "a easynegative b, EASYNEGATIVE"),
    "both spellings": ({"Cat": 2, "cat": 3}, "a Cat and a cat"),
    "in the vocabulary": ({"style": 2, "red": 1}, "a red circle in the style of red"),
    "a sign": ({"*": 2}, "a * circle, *"),
    "brackets": ({"<neon>": 3}, "a <neon>, b<neon>c"),
    "part of a word": ({"a1": 2}, "a a11, ba1 and a1_1 but a1!"),
    "part of another": ({"a1": 2, "a1 b": 3, "bad": 1, "bad-hands-5": 4}, "a1, a1 b, bad-hands-5, bad, bad-hands"),
    "with spaces": ({"my style": 2}, "a my style and My   Style, mystyle"),
    "other scripts": ({"画风": 2, "Überstil": 2}, "a 画风, überstil U\u0308berstil"),
    "beside punctuation": ({"neon": 2}, "(neon), neon; neon's [neon:1.2] neon."),
    "nothing else": ({"neon": 5}, "neon"),
    "more than there is room for": ({"long": 90}, "a circle, long, and more"),
    "truncated within": ({"long": 40}, "long long"),
    "part of a word in another script": ({"हि": 2}, "a हिन्दी, हि"),
    "a script without blanks": ({"画风": 2}, "一画风一, 画风"),
    "special signs": ({"a.c(d)\\e": 2, "$1": 2}, "abc(d)\\e a.c(d)\\e $1 1"),
    "not there": ({"neon": 2}, "a red circle"),
}


@pytest.mark.parametrize(("tokens", "prompt"), CASES.values(), ids=CASES)
def test_every_vector_is_read_where_the_token_stands(pipeline, tokens, prompt):
    family = family_of(pipeline)
    words = [Word(token, vectors(family, count, seed)) for seed, (token, count) in enumerate(tokens.items())]
    plain = encoded(pipeline, [prompt], [""])
    place(pipeline, family, words)
    try:
        found = encoded(pipeline, [prompt, "a red circle"], ["a blue star", prompt])
    finally:
        take_off(pipeline, words)
    assert equal(found, spelled(pipeline, words, [prompt, "a red circle"], ["a blue star", prompt]))
    assert torch.equal(found[0][:1], plain[0]) == (prompt == "a red circle")
    assert equal(encoded(pipeline, [prompt], [""]), plain)


def spelled(pipeline: Any, words: list[Word], prompts: list[str], negative: list[str]) -> list[Any]:
    """`by_hand`, for prompts in which a token stands in several spellings: each is replaced by what is meant first."""
    known = {word.token for word in words}
    if len({token.lower() for token in known}) < len(known):
        # what differs in capitals alone: by hand they are two words that differ otherwise
        renamed = {token: f"zq{'zq' * number}" for number, token in enumerate(sorted(known))}
        words = [Word(renamed[word.token], word.vectors) for word in words]
        pattern = re.compile("|".join(rf"\b{re.escape(token)}\b" for token in known))
        texts = [[pattern.sub(lambda found: renamed[found[0]], text) for text in some] for some in (prompts, negative)]
        return by_hand(pipeline, words, *texts)
    texts = [[re.sub(r"\s+", " ", text.replace("U\u0308", "Ü")) for text in some] for some in (prompts, negative)]
    return by_hand(pipeline, words, *texts)


def test_several_files_in_any_order_and_all_is_as_before(pipeline, tmp_path):
    family = family_of(pipeline)
    by_hand(pipeline, [], ["a circle"], [""])  # transformers remembers that it gave hidden states
    before, tokenizer, length = state(pipeline), pipeline.tokenizer, len(pipeline.tokenizer)
    attributes = set(vars(pipeline)) | {"_lora_convert_applied"}
    files = {token: write(tmp_path / f"{token}.safetensors", vectors(family, 3, k)) for k, token in enumerate("PQR")}
    live = {token: apply(pipeline, file) for token, file in files.items()}
    assert [adapter.tokens for adapter in applied(pipeline)] == [("P",), ("Q",), ("R",)]
    for token in "QPR":
        words = [word for adapter in applied(pipeline) for word in adapter._words]
        prompts, negative = ["p q r circle"], ["R"]
        found = encoded(pipeline, prompts, negative)
        assert live[token].is_live()
        live[token].remove()
        assert not live[token].is_live()
        live[token].remove()
        others = list(applied(pipeline))
        with_all = open_pipeline(family, "cpu")
        assert equal(found, by_hand(with_all, words, prompts, negative))
        assert [adapter.tokens[0] for adapter in others] == [t for t in "PQR" if t in {a.tokens[0] for a in others}]
    assert pipeline.tokenizer is tokenizer and len(tokenizer) == length
    assert state(pipeline) == before
    assert set(vars(pipeline)) <= attributes
    assert tokenizer.tokenize("p") == open_pipeline(family, "cpu").tokenizer.tokenize("p")


def test_weights_do_not_change_meanwhile(pipeline, tmp_path):
    before = {name: weight.clone() for name, weight in pipeline.text_encoder.state_dict().items()}
    with apply(pipeline, write(tmp_path / "neon.safetensors", vectors(family_of(pipeline), 2))):
        now = pipeline.text_encoder.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def test_a_deep_copy_has_its_own(pipeline, tmp_path):
    adapter = apply(pipeline, write(tmp_path / "neon.safetensors", vectors(family_of(pipeline), 2)))
    with_it = encoded(pipeline, ["a neon"], [""])
    other = copy.deepcopy(pipeline)
    adapter.remove()
    without = encoded(pipeline, ["a neon"], [""])
    assert equal(encoded(other, ["a neon"], [""]), with_it) and not equal(with_it, without)
    (copied,) = applied(other)
    copied.remove()
    assert equal(encoded(other, ["a neon"], [""]), without)


def test_another_pipeline_of_the_same_parts_reads_it_too(sd15, tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**sd15.components, requires_safety_checker=False)
    with apply(sd15, write(tmp_path / "neon.safetensors", vectors("tiny-sd15", 2))):
        assert torch.equal(encoded(other, ["a neon"], [""])[0], encoded(sd15, ["a neon"], [""])[0])


def other_encoder(pipeline: Any) -> None:
    pipeline.text_encoder = open_pipeline("tiny-sd15", "cpu").text_encoder


def compiled(pipeline: Any) -> None:
    pipeline.text_encoder.compile(backend="eager")


def larger_table(pipeline: Any) -> None:
    table = copy.deepcopy(pipeline.text_encoder.get_input_embeddings())
    pipeline.text_encoder.set_input_embeddings(table)


def lora_on_the_table(pipeline: Any) -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["token_embedding"], init_lora_weights=False)
    pipeline.text_encoder.add_adapter(config, "mine")


def offloaded(pipeline: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipeline.text_encoder, execution_device="cpu")


CHANGES = [compiled, larger_table, lora_on_the_table, offloaded]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_encoder_that_others_change(sd15, tmp_path, change, when):
    """Vectors come where the table's would, and go again, whoever changed the encoder and when."""
    held = vectors("tiny-sd15", 3)
    file = write(tmp_path / "neon.safetensors", held)
    if when == "before":
        change(sd15)
    adapter = apply(sd15, file)
    assert not equal(encoded(sd15, ["a neon"], [""]), encoded(sd15, ["a circle"], [""]))
    if when == "after":
        change(sd15)
    with pytest.raises(UsageError, match="in use"):
        apply(sd15, file)
    found = encoded(sd15, ["a neon"], [""])
    adapter.remove()
    plain = encoded(sd15, ["a neon"], [""])
    same = sd15 if change is lora_on_the_table else open_pipeline("tiny-sd15", "cpu")
    assert equal(found, by_hand(same, [Word("neon", held)], ["a neon"], [""])) and not equal(found, plain)
    assert equal(plain, by_hand(same, [], ["a neon"], [""]))


def test_an_encoder_that_is_exchanged(sd15, tmp_path):
    """Its tokenizer is what it was when the embeddings go; with the encoder that it has no vectors for it adds none."""
    file = write(tmp_path / "neon.safetensors", vectors("tiny-sd15", 3))
    tokens, attributes = sd15.tokenizer.tokenize("a neon"), set(vars(sd15)) | {"_lora_convert_applied"}
    adapter = apply(sd15, file)
    other_encoder(sd15)
    with pytest.raises(UsageError, match="another text_encoder that has the same tokenizer"):
        apply(sd15, file, token="dark")
    assert adapter.is_live()
    adapter.remove()
    assert sd15.tokenizer.tokenize("a neon") == tokens and set(vars(sd15)) <= attributes
    with apply(sd15, file):
        assert sd15.tokenizer.tokenize("a neon") != tokens


def test_an_encoder_that_is_wrapped_meanwhile(sd15, tmp_path):
    own, plain = sd15.text_encoder, encoded(sd15, ["a neon"], [""])
    with apply(sd15, write(tmp_path / "neon.safetensors", vectors("tiny-sd15", 3))):
        found = encoded(sd15, ["a neon"], [""])
        sd15.text_encoder = torch.compile(own, backend="eager")
        assert equal(encoded(sd15, ["a neon"], [""]), found) and not equal(found, plain)
    assert equal(encoded(sd15, ["a neon"], [""]), plain) and not own._forward_pre_hooks


def test_threads_that_share_an_encoder(sd15):
    """As servers do, with a pipeline each around the same parts."""
    words = [Word("neon", vectors("tiny-sd15", 3)), Word("dark", vectors("tiny-sd15", 2, 1))]
    place(sd15, "tiny-sd15", words)
    given = [
        sd15.tokenizer(text, padding="max_length", return_tensors="pt").input_ids for text in ("neon", "a", "dark")
    ]

    def states(ids: Any) -> Any:
        with torch.no_grad():
            return sd15.text_encoder(ids)[0]

    expected = [states(ids) for ids in given]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(states, given * 100))
    take_off(sd15, words)
    assert all(torch.equal(one, expected[k % 3]) for k, one in enumerate(found))


def test_a_pipeline_that_was_pickled(sd15, tmp_path):
    with apply(sd15, write(tmp_path / "neon.safetensors", vectors("tiny-sd15", 2))):
        other, found = pickle.loads(pickle.dumps(sd15)), encoded(sd15, ["a neon"], [""])
    assert equal(encoded(other, ["a neon"], [""]), found)
    (adapter,) = applied(other)
    adapter.remove()
    assert equal(encoded(other, ["a neon"], [""]), encoded(sd15, ["a neon"], [""]))


def test_prompts_for_both_encoders_of_sdxl(sdxl, tmp_path):
    words = [Word("neon", vectors("tiny-sdxl", 3)), Word("dark", vectors("tiny-sdxl", 2, 1))]
    place(sdxl, "tiny-sdxl", words)
    prompts = {"prompt": "a neon", "prompt_2": "a dark", "negative_prompt": "dark", "negative_prompt_2": "x neon"}
    with torch.no_grad():
        found = sdxl.encode_prompt(**prompts, device="cpu")
    take_off(sdxl, words)
    first, second = EMBEDDING_FAMILIES["tiny-sdxl"]
    with torch.no_grad():
        for k, (one, two) in enumerate((("a neon", "a dark"), ("dark", "x neon"))):
            left, right = encode(sdxl, [first, first], words, [one])[0], encode(sdxl, [second, second], words, [two])
            assert torch.equal(found[k], torch.cat([left[..., : first.width], right[0][..., : second.width]], -1))
            assert torch.equal(found[2 + k], right[1])


def test_half_an_embedding(sdxl, tmp_path):
    """The second encoder reads the word as such."""
    half = {"clip_l": vectors("tiny-sdxl", 2)["clip_l"]}
    save_file(half, tmp_path / "neon.safetensors")
    with apply(sdxl, tmp_path / "neon.safetensors") as adapter:
        assert "half-embedding" in names_of(adapter.findings)
        found = encoded(sdxl, ["a neon"], [""])
    assert equal(found, by_hand(sdxl, [Word("neon", half)], ["a neon"], [""]))


def test_the_pooled_output_is_that_of_the_end(sdxl, tmp_path):
    """SDXL's own encoders have the configuration by which transformers takes the largest id for the end of the text."""
    held = vectors("tiny-sdxl", 3)
    sdxl.text_encoder_2.text_model.eos_token_id = 2
    plain = encoded(sdxl, ["a circle"], [""])
    with apply(sdxl, write(tmp_path / "neon.safetensors", held)):
        found = encoded(sdxl, ["a neon circle"], [""])
    sdxl.text_encoder_2.text_model.eos_token_id = sdxl.tokenizer_2.eos_token_id
    assert equal(found, by_hand(sdxl, [Word("neon", held)], ["a neon circle"], [""]))
    assert not torch.equal(found[2], plain[2])


@pytest.mark.parametrize("first", ["lora", "embedding"])
@pytest.mark.parametrize("off_first", ["lora", "embedding"])
def test_beside_a_lora_on_the_text_encoder(sd15, tmp_path, first, off_first):
    by_hand(sd15, [], ["a circle"], [""])  # transformers remembers that it gave hidden states
    before = state(sd15)
    held = vectors("tiny-sd15", 3)
    names = [f"text_encoder.text_model.encoder.layers.{layer}.mlp.fc1" for layer in (0, 1)]
    files = {
        "embedding": write(tmp_path / "Neon.safetensors", held),
        "lora": write_canonical(tmp_path / "pytorch_lora_weights.safetensors", factors("tiny-sd15", names)),
    }
    live = {kind: apply(sd15, files[kind]) for kind in sorted(files, reverse=first == "lora")}
    both = encoded(sd15, ["a neon"], ["neon"])
    live["embedding"].remove()
    assert equal(both, by_hand(sd15, [Word("neon", held)], ["a neon"], ["neon"]))  # with the LoRA
    live["embedding"] = apply(sd15, files["embedding"])
    live.pop(off_first).remove()
    for adapter in live.values():
        adapter.remove()
    assert state(sd15) == before


def test_a_lora_that_carries_an_embedding_gives_both(sd15, tmp_path):
    before = state(sd15)
    made = factors("tiny-sd15", ["unet.conv_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1"])
    lora = write_canonical(tmp_path / "x.safetensors", made)
    held = vectors("tiny-sd15", 2)["clip_l"]
    tensors = read_all(lora) | {"bundle_emb.Neon.emb_params": held}
    from safetensors import safe_open

    with safe_open(lora, "np") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "both.safetensors", metadata)
    with apply(sd15, tmp_path / "both.safetensors", 0.5) as adapter:
        assert (adapter.tokens, adapter.modules, adapter.scale) == (("Neon",), 2, 0.5)
        both = encoded(sd15, ["a neon"], [""])
        assert "Neon" in repr(adapter) and len(adapter.names) == 1
    assert state(sd15) == before
    with apply(sd15, lora, 0.5):
        assert equal(both, by_hand(sd15, [Word("Neon", {"clip_l": held})], ["a neon"], [""]))


FILES = {
    "kohya": {"emb_params": (3, 64)},
    "onetrainer": {"emp_params": (3, 64)},
    "diffusers": {"<neon>": (3, 64)},
    "one vector without rows": {"<neon>": (64,)},
    "comfy": {"clip_l": (3, 64)},
}


@pytest.mark.parametrize("shapes", FILES.values(), ids=FILES)
def test_files_of_every_origin(sd15, tmp_path, shapes):
    tensors = {
        name: vectors("tiny-sd15", 3)["clip_l"][: shape[0] if len(shape) > 1 else 1] for name, shape in shapes.items()
    }
    held = next(iter(tensors.values()))
    save_file({name: values.reshape(shapes[name]) for name, values in tensors.items()}, tmp_path / "x.safetensors")
    with apply(sd15, tmp_path / "x.safetensors", token="Neon") as adapter:
        assert adapter.tokens == adapter.names == ("Neon",) and adapter.name == "Neon"
        assert (adapter.modules, adapter.scale, adapter.file) == (0, 1.0, "x.safetensors")
        found = encoded(sd15, ["a neon"], [""])
    assert equal(found, by_hand(sd15, [Word("neon", {"clip_l": held})], ["a neon"], [""]))


def test_a_picture_and_a_pickle(sd15, tmp_path):
    held = vectors("tiny-sd15", 3)["clip_l"]
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.from_numpy(held)},
        "name": "Neon",
        "step": 7,
    }
    torch.save(content, tmp_path / "other.pt")
    with apply(sd15, tmp_path / "other.pt") as adapter:
        assert adapter.tokens == ("Neon",)
        found = encoded(sd15, ["a neon"], [""])
    assert equal(found, by_hand(sd15, [Word("neon", {"clip_l": held})], ["a neon"], [""]))


def test_a_folder_that_convert_wrote(pipeline, tmp_path):
    family = family_of(pipeline)
    held = vectors(family, 3)
    source = write(tmp_path / "NeonStyle.safetensors", held)
    assert convert(source, tmp_path / "out").ok
    with apply(pipeline, tmp_path / "out") as adapter:
        assert adapter.tokens == ("neonstyle",) and "half-embedding" not in names_of(adapter.findings)
        found = encoded(pipeline, ["a NeonStyle"], [""])
    assert equal(found, by_hand(pipeline, [Word("neonstyle", held)], ["a NeonStyle"], [""]))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32"])
def test_vectors_are_rounded_once(tmp_path, dtype, precision):
    pipeline = open_pipeline("tiny-sd15", "cpu", precision)
    held = vectors("tiny-sd15", 3, dtype=dtype)
    with apply(pipeline, write(tmp_path / "neon.safetensors", held)):
        found = encoded(pipeline, ["a neon"], [""])
    assert equal(found, by_hand(pipeline, [Word("neon", held)], ["a neon"], [""]))


def test_what_does_not_fit_is_refused(tmp_path):
    pipeline = open_pipeline("tiny-sd15", "cpu", "float16")
    held = vectors("tiny-sd15", 2)["clip_l"]
    for name, value, finding in (("big", 1e6, "overflow"), ("nan", np.nan, "not-finite"), ("tiny", None, "underflow")):
        values = held * 1e-9 if value is None else np.where(np.arange(64) == 3, value, held).astype("f4")
        file = write(tmp_path / f"{name}.safetensors", {"clip_l": values})
        if finding == "underflow":
            with apply(pipeline, file) as adapter:
                assert finding in names_of(adapter.findings)
            continue
        with pytest.raises(FileError) as raised:
            apply(pipeline, file)
        assert finding in names_of(raised.value.findings)
    assert not applied(pipeline) and not pipeline.text_encoder._forward_pre_hooks


def test_the_real_widths(tmp_path):
    """Encoders as wide as Stable Diffusion's, one layer deep."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    tiny = open_pipeline("tiny-sd15", "cpu")
    for table, family, key in (("clip_l", "sd15", "clip_l"), ("openclip_h", "sd21", "clip_h")):
        shape = TEXT_ENCODERS[table] | {"num_hidden_layers": 1, "vocab_size": len(tiny.tokenizer)}
        ends = {"bos_token_id": tiny.tokenizer.bos_token_id, "eos_token_id": tiny.tokenizer.eos_token_id}
        model = CLIPTextModel(CLIPTextConfig(**(shape | ends))).eval()
        parts = {**tiny.components, "text_encoder": model}
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        held = {key: np.random.default_rng(0).standard_normal((5, shape["hidden_size"])).astype("f2")}
        words = [Word("Neon", held)]
        place(pipeline, family, words)
        found = encoded(pipeline, ["a neon, b"], ["neon"])
        take_off(pipeline, words)
        with torch.no_grad():
            expected = [
                encode(pipeline, EMBEDDING_FAMILIES[family], words, [text])[0] for text in ("a neon, b", "neon")
            ]
        assert equal(found, expected)


def test_beside_the_pipelines_own_loader(sd15, tmp_path):
    """What `load_textual_inversion` loaded before goes on working; afterwards it is refused, until ours are gone."""
    own, other = vectors("tiny-sd15", 2)["clip_l"], vectors("tiny-sd15", 3, 1)["clip_l"]
    sd15.load_textual_inversion({"<cat>": torch.from_numpy(own)})
    expected = encoded(sd15, ["a <cat> b"], [""])
    with apply(sd15, write(tmp_path / "cat.safetensors", {"clip_l": other})):
        assert equal(encoded(sd15, ["a <cat> b"], [""]), expected)
        both = encoded(sd15, ["a <cat> cat"], [""])
        for call in (sd15.load_textual_inversion, sd15.unload_textual_inversion):
            with pytest.raises(UsageError, match="load_textual_inversion"):
                call({"<dog>": torch.from_numpy(own)})
        with pytest.raises(UsageError, match="in use"):
            apply(sd15, write(tmp_path / "x.safetensors", {"clip_l": other}), token="<cat>")
    assert equal(encoded(sd15, ["a <cat> b"], [""]), expected)
    sd15.unload_textual_inversion()
    words = [Word("<cat>", {"clip_l": own}), Word("cat", {"clip_l": other})]
    assert equal(both, by_hand(sd15, words, ["a <cat> cat"], [""]))
    sd15.load_textual_inversion({"<dog>": torch.from_numpy(own)})


WRONG = {
    "scale": ({"scale": 0.5}, "no strength"),
    "scale by block": ({"scale": {"text_encoder": 1.0}}, "no strength"),
    "two names for one": ({"token": ["a", "b"]}, "2 names"),
    "an option that there is not": ({"steps": 3}, "no option 'steps'"),
    "no name": ({"token": "  "}, "cannot be a token"),
    "private characters": ({"token": "\U00100000"}, "cannot be a token"),
    "half a character": ({"token": "neon\ud800"}, "cannot be a token"),
    "a sign of the tokenizer": ({"token": "<|endoftext|>"}, "in use"),
}


@pytest.mark.parametrize(("options", "said"), WRONG.values(), ids=WRONG)
def test_wrong_calls(sd15, tmp_path, options, said):
    before = state(sd15)
    file = write(tmp_path / "neon.safetensors", vectors("tiny-sd15", 2))
    with pytest.raises(UsageError, match=said):
        apply(sd15, file, **options)
    assert not applied(sd15) and state(sd15) == before and len(sd15.tokenizer) == 618


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_an_interruption_leaves_nothing(sdxl, tmp_path, monkeypatch, number):
    """When the first or second tokenizer is given another backend, and within an encoder."""
    encoded(sdxl, ["a circle"], [""])  # transformers remembers that it gave hidden states
    before, calls = state(sdxl), []
    tokenizers = [sdxl.tokenizer._tokenizer, sdxl.tokenizer_2._tokenizer]

    def interrupted(self: Any, *arguments: Any) -> Any:
        calls.append(self)
        if len(calls) == number:
            raise KeyboardInterrupt
        return own(self, *arguments)

    name = "read" if number < 3 else "_ours"
    own = getattr(_Reader, name)
    monkeypatch.setattr(_Reader, name, interrupted)
    with pytest.raises(KeyboardInterrupt), apply(sdxl, write(tmp_path / "neon.safetensors", vectors("tiny-sdxl", 2))):
        encoded(sdxl, ["neon"], ["neon"])
    assert not applied(sdxl) and state(sdxl) == before
    assert [sdxl.tokenizer._tokenizer, sdxl.tokenizer_2._tokenizer] == tokenizers
    assert not sdxl.text_encoder._forward_pre_hooks and not sdxl.text_encoder_2._forward_pre_hooks


def test_two_of_one_name(sd15, tmp_path):
    file = write(tmp_path / "neon.safetensors", vectors("tiny-sd15", 2))
    with apply(sd15, file), pytest.raises(UsageError, match="neon is in use"):
        apply(sd15, file)
    with apply(sd15, file), apply(sd15, file, token="other"):
        pass


@pytest.mark.parametrize(("family", "width"), [("tiny-sd15", 768), ("tiny-sd15", 1024), ("tiny-sdxl", 64)])
def test_for_another_base_model(family, width, tmp_path):
    save_file({"emb_params": np.ones((2, width), "f4")}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="open a base model of the family"):
        apply(open_pipeline(family, "cpu"), tmp_path / "x.safetensors")


def test_names_for_a_lora_without_embeddings(sd15, tmp_path):
    lora = write_canonical(tmp_path / "x.safetensors", factors("tiny-sd15", ["unet.conv_in"]))
    with pytest.raises(UsageError, match="0 embeddings"):
        apply(sd15, lora, token="neon")


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_render_says_what_the_prompt_lacks(sd15, tmp_path):
    file = write(tmp_path / "Neon.safetensors", vectors("tiny-sd15", 40))
    settings = Settings("a red circle", steps=1, width=64, height=64)
    with apply(sd15, file):
        for prompt, negative, guidance, expected in (
            ("a red circle", "", 4.0, {"token-unused"}),
            ("a neon circle", "", 4.0, set()),
            ("a red circle", "NEON", 4.0, set()),
            ("a red circle", "NEON", 1.0, {"token-unused"}),
            ("neons", "", 4.0, {"token-unused"}),
            ("neon neon", "", 4.0, {"prompt-truncated"}),
        ):
            asked = Settings(prompt, negative, 1, guidance, 64, 64)
            assert names_of(render(sd15, asked).findings) == expected, (prompt, negative)
        record = render(sd15, settings).record
    assert record["adapters"][0]["tokens"] == ["Neon"] and record["adapters"][0]["modules"] == 0
    assert render(sd15, settings).findings == ()


def test_the_command_draws_with_an_embedding(tmp_path, capsys, sd15):
    held = vectors("tiny-sd15", 3)
    file = write(tmp_path / "Neon.safetensors", held)
    options = ["--base", "tiny-sd15", "--steps", "2", "--width", "64", "--height", "64", "--json"]
    asked = ["--prompt", "a neon circle", "--negative", "a NEON"]
    assert run(["render", str(file), *asked, "-o", str(tmp_path / "a.png"), *options]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["adapters"][0]["tokens"] == ["Neon"] and content["findings"] == []
    with apply(sd15, file):
        drawn = render(sd15, Settings("a neon circle", "a NEON", 2, width=64, height=64))
    from PIL import Image

    assert Image.open(tmp_path / "a.png").tobytes() == drawn.images[0].tobytes()
    assert run(["render", str(file), "--prompt", "a circle", "-o", str(tmp_path / "b.png"), *options[:-1]]) == 0
    said = capsys.readouterr().out
    assert "token-unused" in said and "1 token (Neon) applied" in said


# --- the proof --------------------------------------------------------------------------------------------------------


def proof(out: Path, source: Path, base: str | None = None, **options: Any) -> Any:
    drawing = Drawing(device="cpu", steps=2, width=64, height=64) if base else None
    return climb(out, source, base=base, drawing=drawing, **options)


@pytest.mark.parametrize("family", ["tiny-sd15", "tiny-sdxl"])
def test_a_converted_embedding_passes_every_rung(tmp_path, family):
    source = write(tmp_path / "NeonStyle.safetensors", {k: v * 4 for k, v in vectors(family, 4).items()})
    assert convert(source, tmp_path / "out").ok
    pages = {"report": tmp_path / "proof.html", "sheet": tmp_path / "sheet.png"}
    result = proof(tmp_path / "out", source, family, **pages)
    assert {name: rung.status for name, rung in result.rungs.items()} == dict.fromkeys(
        ("structure", "numbers", "vectors", "load", "picture"), "pass"
    )
    count = 4 * len(WIDTHS[family])
    assert (result.rungs["load"].figures["vectors"], result.rungs["load"].figures["loaded_vectors"]) == (count, count)
    assert result.rungs["load"].figures["warnings"] == []
    prompts = [picture["prompt"] for picture in result.rungs["picture"].figures["pictures"]]
    assert len(prompts) == 8 and all("neonstyle" in prompt for prompt in prompts)
    assert sum("negative: neonstyle" in prompt for prompt in prompts) == 4
    page = pages["report"].read_text(encoding="utf-8")
    assert "Proved" in page and ">neonstyle<" in page and ">clip_l<" in page
    assert 'id="modules"' not in page and "0 modules" not in page


def test_a_page_shows_tokens_as_text():
    from lora_convert.runtime.page import EmbeddingRow, ReportPage, page_html

    row = EmbeddingRow("</td><script>\u202e", "clip_l", 768, "F16", (0.1, float("nan")), 0.4, float("inf"))
    page = page_html(ReportPage("a", "fail", "Failed: x", "", {}, embeddings=[row]))
    assert "&lt;/td&gt;&lt;script&gt;\\u202e" in page and 'id="embeddings"' in page and 'id="blocks"' not in page


@pytest.mark.parametrize("stored", ["f2", "f4", "f8"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_vectors_that_were_rounded_when_converted_pass(tmp_path, stored, dtype):
    source = write(tmp_path / "neon.safetensors", {"clip_l": vectors("tiny-sd15", 3, dtype=stored)["clip_l"]})
    assert convert(source, tmp_path / "out", dtype=dtype).ok
    load = climb(tmp_path / "out", source).rungs["load"]
    assert (load.status, load.figures["loaded_vectors"]) == ("pass", 3)


def test_prompts_of_the_user_in_any_capitals(tmp_path):
    """The output has the token in lower case, and in capitals Diffusers would read one vector of it."""
    source = write(tmp_path / "NeonStyle.safetensors", {k: v * 4 for k, v in vectors("tiny-sd15", 3).items()})
    assert convert(source, tmp_path / "out").ok
    drawing = Drawing(prompts=["a NeonStyle", "NEONSTYLE, a star"], device="cpu", steps=1, width=64, height=64)
    picture = climb(tmp_path / "out", source, base="tiny-sd15", drawing=drawing).rungs["picture"]
    assert picture.status == "pass"
    prompts = {made["prompt"] for made in picture.figures["pictures"]}
    assert prompts == {"a neonstyle", "neonstyle, a star"}


def test_tokens_given_by_hand_are_proved_as_such(tmp_path):
    """Three of a file: each output file is compared with the vectors that had its token before."""
    random = np.random.default_rng(0)
    tensors = {f"<s{k}>": random.standard_normal((2, 64)).astype("f4") for k in range(3)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert convert(tmp_path / "x.safetensors", tmp_path / "out", token=["<s2>", "other", "<s0>"], family="tiny-sd15").ok
    load = proof(tmp_path / "out", tmp_path / "x.safetensors").rungs["load"]
    assert (load.status, load.figures["loaded_vectors"], load.figures["files"]) == ("pass", 6, 3)


def changed(out: Path, name: str, change: Any) -> None:
    """Write a file of an output again, with other vectors."""
    from safetensors import safe_open

    path = out / name
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(change(read_all(path)), path, metadata)


def one_vector_off(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The third one negated. A constant added to it would not show: the encoder normalises it away."""
    return {name: np.where(np.arange(len(values))[:, None] == 2, -values, values) for name, values in tensors.items()}


def only_the_first(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values[:1].copy() for name, values in tensors.items()}


def other_token(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip(["other"], tensors.values(), strict=True))


def reversed_order(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values[::-1].copy() for name, values in tensors.items()}


FAULTS = {"one vector": one_vector_off, "only the first": only_the_first, "order": reversed_order}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_show_at_load_and_in_pictures(tmp_path, fault):
    from lora_convert.runtime.climb import _opened
    from lora_convert.runtime.picture import prove

    source = write(tmp_path / "neon.safetensors", {k: v * 4 for k, v in vectors("tiny-sd15", 4).items()})
    assert convert(source, tmp_path / "out").ok
    changed(tmp_path / "out", "learned_embeds.safetensors", fault)
    assert not proof(tmp_path / "out", source).ok
    with _opened(tmp_path / "out", source, {}) as files:
        words = words_of(files.outputs, [(files.source, files.truth)])
        load = check_loaded(tmp_path / "out", "tiny-sd15", words)
        drawing = Drawing(device="cpu", steps=2, width=64, height=64)
        picture, _ = prove(tmp_path / "out", files.outputs, files.source, files.truth, "tiny-sd15", drawing)
    assert (load.status, names_of(load.findings)) == ("fail", {"module-not-loaded"})
    assert (picture.status, names_of(picture.findings)) == ("fail", {"picture-mismatch"})


def test_capitals_lose_all_vectors_but_the_first(tmp_path):
    """What diffusers does of a token with capitals: the reason why `convert` writes it in lower case."""
    source = tmp_path / "source.safetensors"
    held = vectors("tiny-sd15", 4)["clip_l"]
    save_file({"<NeonStyle>": held}, source)
    result = climb(source)
    assert result.rungs["load"].status == "fail"
    assert "1 vector; there are 4" in result.rungs["load"].findings[0].message


def test_files_for_the_wrong_encoder(tmp_path):
    source = write(tmp_path / "neon.safetensors", vectors("tiny-sdxl", 2))
    assert convert(source, tmp_path / "out").ok
    record = tmp_path / "out" / "learned_embeds.json"
    content = json.loads(record.read_text())
    first, second = content["embeddings"][0]["files"]
    first["file"], second["file"] = second["file"], first["file"]
    record.write_text(json.dumps(content))
    assert proof(tmp_path / "out", source).rungs["vectors"].status == "fail"
    rung = check_loaded(tmp_path / "out", "tiny-sdxl", [Word("neon", vectors("tiny-sdxl", 2))])
    assert rung.status == "fail" and "incorrect shape" in rung.findings[0].message


@pytest.mark.parametrize("content", ["{", "[]", '{"embeddings": [{"files": [{"encoder": "x"}]}]}', "[" * 5000])
def test_a_record_that_is_none(tmp_path, content):
    source = write(tmp_path / "neon.safetensors", vectors("tiny-sd15", 2))
    assert convert(source, tmp_path / "out").ok
    (tmp_path / "out" / "learned_embeds.json").write_text(content)
    assert not proof(tmp_path / "out", source).ok
    rung = check_loaded(tmp_path / "out", "tiny-sd15", ())
    assert rung.status == "fail" and rung.findings[0].subject == "learned_embeds.json"


def test_the_snippet_of_the_record_does_what_the_proof_does(pipeline, tmp_path):
    """Run as it stands, beside the files, for both bases; the proof loads by the record's entries."""
    family = family_of(pipeline)
    held = vectors(family, 3)
    assert convert(write(tmp_path / "NeonStyle.safetensors", held), tmp_path / "out").ok
    record = json.loads((tmp_path / "out" / "learned_embeds.json").read_text(encoding="utf-8"))
    by_hand(pipeline, [], ["a circle"], [""])  # transformers remembers that it gave hidden states
    before = state(pipeline)
    with loaded(pipeline, placements(tmp_path / "out", family)):
        found = encoded(pipeline, ["a neonstyle"], ["neonstyle, b"])
    assert state(pipeline) == before
    assert equal(found, by_hand(pipeline, [Word("neonstyle", held)], ["a neonstyle"], ["neonstyle, b"]))
    fresh = open_pipeline(family, "cpu")
    lines = [line for line in record["snippet"].splitlines() if not line.startswith(("folder", "image"))]
    exec("\n".join(lines), {"pipe": fresh, "folder": str(tmp_path / "out")})
    assert equal(encoded(fresh, ["a neonstyle"], ["neonstyle, b"]), found)


def test_the_proof_takes_the_pooled_output_at_the_end(sdxl, tmp_path):
    held = vectors("tiny-sdxl", 3)
    assert convert(write(tmp_path / "neon.safetensors", held), tmp_path / "out").ok
    expected = by_hand(sdxl, [Word("neon", held)], ["a neon"], [""])
    sdxl.text_encoder_2.text_model.eos_token_id = 2
    with loaded(sdxl, placements(tmp_path / "out", "tiny-sdxl")):
        assert equal(encoded(sdxl, ["a neon"], [""]), expected)
    assert sdxl.text_encoder_2.text_model.eos_token_id == 2


def test_without_a_source_and_in_another_layout(tmp_path):
    source = write(tmp_path / "neon.safetensors", vectors("tiny-sdxl", 2))
    assert convert(source, tmp_path / "out").ok
    assert climb(tmp_path / "out").rungs["load"].status == "pass"
    result = climb(source)
    assert result.ok and result.rungs["load"].status == "skipped"


@pytest.mark.parametrize("recorded", [False, True])
def test_no_pickle_is_given_to_diffusers(tmp_path, monkeypatch, recorded):
    """Its loader would give it to torch.load; `apply` reads it itself."""
    held = vectors("tiny-sd15", 2)
    file = tmp_path / "out" / "learned_embeds.bin"
    assert convert(write(tmp_path / "neon.safetensors", held), tmp_path / "out").ok
    torch.save({"neon": torch.from_numpy(held["clip_l"])}, file)
    record = tmp_path / "out" / "learned_embeds.json"
    record.write_text(record.read_text().replace("learned_embeds.safetensors", file.name))
    if not recorded:
        record.unlink()
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("torch.load was called"))
    load = check_loaded(file, "tiny-sd15", [Word("neon", held)])
    assert (load.status, load.reason) == (
        ("fail", "the loader raised")
        if recorded
        else ("skipped", "only safetensors files in the Diffusers layout are loaded")
    )
    assert climb(file, family="tiny-sd15").rungs["load"].status == load.status
    pipeline = open_pipeline("tiny-sd15", "cpu")
    with apply(pipeline, file) as adapter:
        assert adapter.tokens == ("neon",)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "lora.pt", "named.safetensors"])
def test_a_lora_that_was_pickled(sd15, tmp_path, name):
    """Under the names of the canonical layout, which the loader takes as they are from safetensors files alone."""
    lora = write_canonical(tmp_path / "x.safetensors", factors("tiny-sd15", ["unet.conv_in"]))
    torch.save({key: torch.from_numpy(value) for key, value in read_all(lora).items()}, tmp_path / name)
    with apply(sd15, tmp_path / name) as adapter:
        assert adapter.modules == 1
    result = climb(tmp_path / name, family="tiny-sd15")
    assert result.ok and result.rungs["load"].status == "skipped"


def test_the_base_decides_what_the_file_leaves_open(tmp_path):
    """768 numbers are SD 1.x's or half of SDXL's."""
    save_file({"<neon>": np.random.default_rng(0).standard_normal((2, 768)).astype("f4")}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="sd15"):
        proof(tmp_path / "x.safetensors", tmp_path / "x.safetensors", "tiny-sd15")


def test_a_base_of_another_kind(tmp_path):
    save_file({"clip_l": np.ones((2, 768), "f4"), "t5xxl": np.ones((2, 4096), "f4")}, tmp_path / "neon.safetensors")
    assert convert(tmp_path / "neon.safetensors", tmp_path / "out").ok
    with pytest.raises(UsageError, match="for Flux"):
        climb(tmp_path / "out", tmp_path / "neon.safetensors", base="tiny-sd15")


FORMATS = json.loads((FIXTURES / "embeddings" / "formats" / "cases.json").read_text())


@pytest.mark.parametrize(
    "case",
    [case for case in FORMATS if case["kind"] == "embedding" and "t5" not in json.dumps(case)],
    ids=lambda case: case["id"],
)
def test_files_of_real_widths_arrive_in_diffusers(tmp_path, case):
    source = FIXTURES / "embeddings" / "formats" / case["files"][0]
    source = source.parent if len(case["files"]) > 1 else source
    assert convert(source, tmp_path).ok
    load = climb(tmp_path, source).rungs["load"]
    assert (load.status, load.figures["warnings"]) == ("pass", [])
    count = sum(truth["shape"][0] for name, truth in case["truth"].items() if not name.endswith("out"))
    assert load.figures["loaded_vectors"] == load.figures["vectors"] == count


def test_an_embedding_has_no_scale(tmp_path):
    source = write(tmp_path / "neon.safetensors", vectors("tiny-sd15", 2))
    assert convert(source, tmp_path / "out").ok
    with pytest.raises(UsageError, match="no strength"):
        climb(tmp_path / "out", source, base="tiny-sd15", drawing=Drawing(scale=0.5, device="cpu", steps=1))


def test_golden_cases_take_embeddings(tmp_path):
    from lora_convert.runtime.golden import check, record

    write(tmp_path / "Neon.safetensors", {k: v * 6 for k, v in vectors("tiny-sd15", 4).items()})
    assert convert(tmp_path / "Neon.safetensors", tmp_path / "out").ok
    lines = ['[suite]\nbase = "tiny-sd15"\nsteps = 2\nsize = 64\ndevice = "cpu"']
    for name, adapter, prompt, negative in (
        ("positive", "Neon.safetensors", "a neon circle", ""),
        ("negative", "out", "a red circle", "neon"),
        ("forgotten", "out", "a red circle", ""),
    ):
        case = {"name": name, "adapter": adapter, "prompts": [prompt], "negative_prompt": negative}
        lines.append("[[case]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in case.items()))
    suite = tmp_path / "suite.toml"
    suite.write_text("\n".join(lines))
    done = record(suite)
    assert [picture.status for picture in done.pictures] == ["recorded", "recorded", "refused"]
    assert names_of(done.pictures[2].findings) >= {"no-effect", "token-unused"}
    assert check(suite, cases=["positive", "negative"]).ok
    content: Finding | dict[str, Any] = json.loads((tmp_path / "golden" / "positive" / "00.json").read_text())
    assert content["record"]["adapters"][0]["tokens"] == ["Neon"]


def test_a_token_is_text(pipeline, tmp_path):
    with pytest.raises(UsageError, match="token must be text"):
        apply(pipeline, write(tmp_path / "neon.safetensors", vectors(family_of(pipeline), 1)), token=5)
