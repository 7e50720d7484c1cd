"""Embeddings of every writer: their vectors to the last bit, their names, and the files that loaders take."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import CORPUS, FIXTURES, names_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_convert
from lora_convert.cli import cli
from lora_convert.containers import hub, opened
from lora_convert.converters.embedding_record import RECORD_NAME
from lora_convert.converters.embeddings import embedding_files, read_vectors
from lora_convert.families.encoders import EMBEDDING_FAMILIES

FORMATS = FIXTURES / "embeddings" / "formats"

REFUSED = {
    "kohya_xti": "unsupported-kind",
    "odd_unknown_width": "unknown-width",
    "cloneofsimo_pti": "unexplained-tensor",
}
"""Cases without a converted form -> the finding that says why. (cloneofsimo's LoRA there is for no real model.)"""

FAMILIES = {
    "ldm": "sd15", "a1111": "sd15", "hcp": "sd15", "img": "sd15", "kohya_emb": "sd15", "onetrainer_sd_": "sd15",
    "aitoolkit_sd_": "sd15", "odd_safetensors": "sd15", "hf_sd2": "sd21", "list_of_dicts_sdxl": "sdxl", "cog": "sdxl",
    "hf_sdxl": "sdxl", "hf_advanced": "sdxl", "kohya_sdxl": "sdxl", "aitoolkit_sdxl": "sdxl",
    "bundle_onetrainer_sdxl": "sdxl", "bundle_": "sd15", "onetrainer_sd3": "sd3", "comfy_t5xxl": "sd3",
    "onetrainer_flux": "flux",
}  # fmt: skip
"""How a case's name begins -> its base model; of the others a lone 768-wide vector does not tell."""

TRAINERS = {
    "ldm": "ldm", "a1111": "a1111", "img": "a1111", "kohya_emb": "kohya", "onetrainer_sd_": "onetrainer",
    "aitoolkit": "ai-toolkit", "cog": "cog-sdxl", "odd_safetensors": "kohya",
}  # fmt: skip


def by_start(table: dict[str, str], name: str) -> str | None:
    return next((value for start, value in table.items() if name.startswith(start)), None)


class Case:
    """One writer's files, and the SHA-256 of the true vectors by `<name>/<encoder>` or `<encoder>`."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.id, self.kind, self.token = record["id"], record["kind"], record.get("stored_token", record.get("token"))
        self.files = [folder / file for file in record["files"] if not file.endswith(".optim")]
        if "truth" in record:
            self.truth = {key: entry["sha256"] for key, entry in record["truth"].items()}
        else:
            expected = load_file(folder / record["expected"]) if record["expected"] else {}
            self.truth = {key: digest(values) for key, values in expected.items()}

    @property
    def path(self) -> Path:
        """The file, or the folder of a pair."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


def cases() -> list[Any]:
    marks = [pytest.mark.corpus, pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus is not here")]
    ours = [Case(FORMATS, record) for record in json.loads((FORMATS / "cases.json").read_text())]
    found = [pytest.param(case, id=case.id) for case in ours]
    folder = CORPUS / "embeddings"
    if folder.is_dir():
        theirs = [Case(folder, record) for record in json.loads((folder / "cases.json").read_text())]
        theirs = [case for case in theirs if case.kind != "negative"]
        found += [pytest.param(case, id=f"corpus-{case.id}", marks=marks) for case in theirs]
    return found


CASES = cases()


def vectors_of(path: Path, **reading: Any) -> dict[str, str]:
    """SHA-256 of what a file's embeddings hold, named as a case's truth is; vectors behind encoders end in `.out`."""
    found = lora_convert.identify(path, **reading)
    several = len(found.embeddings) > 1 or found.kind == "lora"
    read = {}
    with opened(path) as source:
        for embedding in found.embeddings:
            values = read_vectors(source, embedding)
            values |= {f"{key}.out": source.read(part.tensor) for key, part in embedding.outputs.items()}
            for key, vectors in values.items():
                read[f"{embedding.token}/{key}" if several else key] = digest(vectors.astype(np.float32))
    return read


def normal(truth: dict[str, str]) -> dict[str, str]:
    """LDM's placeholders are symbols of the vocabulary; the tokens put them into brackets."""
    renamed = {"*": "<*>", "@": "<@>"}
    pairs = {key: key.split("/") for key in truth}
    return {
        "/".join([*(renamed.get(part, part) for part in parts[:-1]), parts[-1]]): truth[k] for k, parts in pairs.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_vectors_are_the_writers_to_the_last_bit(case):
    if REFUSED.get(case.id) in ("unsupported-kind", "unknown-width"):
        assert REFUSED[case.id] in names_of(lora_convert.identify(case.path).findings)
        return
    assert vectors_of(case.path) == normal(case.truth)


@pytest.mark.parametrize("case", CASES)
def test_what_it_is_and_what_it_is_called(case):
    if case.id in REFUSED:
        return
    found = lora_convert.identify(case.path)
    assert found.kind == ("lora" if case.kind == "bundle" else "embedding")
    assert found.family == by_start(FAMILIES, case.id) and found.ok
    if case.kind != "bundle":
        assert found.trainer == by_start(TRAINERS, case.id)
        assert bool(found.rivals) == (found.family is None or found.family in ("sdxl", "flux")) or case.id.startswith(
            "cog"
        )
    if case.token:
        assert [embedding.token for embedding in found.embeddings] == [case.token] and found.embeddings[0].stated
    for embedding in found.embeddings:
        for part in embedding.vectors.values():
            assert len(part.norms) == part.count and all(0.3 < norm < 100 for norm in part.norms)


@pytest.mark.parametrize("case", CASES)
def test_every_file_becomes_what_loaders_take(case, tmp_path):
    result = lora_convert.convert(case.path, tmp_path / "out")
    if case.id in REFUSED:
        assert not result.ok and REFUSED[case.id] in names_of(result.findings) and not (tmp_path / "out").exists()
        return
    assert result.ok and result.worst_delta_error == 0.0
    assert result.proof.rungs["vectors"].figures["exact_vectors"] == result.proof.rungs["vectors"].figures["vectors"]
    record = json.loads((tmp_path / "out" / "learned_embeds.json").read_text())
    assert record["sha256"] == (
        hashlib.sha256(case.path.read_bytes()).hexdigest() if case.path.is_file() else record["sha256"]
    )
    written: dict[str, str] = {}
    for entry in record["embeddings"]:
        for file in entry["files"]:
            with safe_open(tmp_path / "out" / file["file"], "np") as opened_file:
                assert list(opened_file.keys()) == [entry["token"]]
                assert opened_file.metadata()["lora_convert.encoder"] == file["encoder"]
            read = read_safetensors(tmp_path / "out" / file["file"])[entry["token"]]
            assert read.shape == (file["vectors"], file["width"]) and file["vectors"] == entry["vectors"]
            written[f"{entry['token']}/{file['encoder']}"] = digest(read.astype(np.float32))
            families = (
                EMBEDDING_FAMILIES.values() if record["family"] is None else [EMBEDDING_FAMILIES[record["family"]]]
            )
            places = {(e.key, e.component, e.tokenizer, e.width) for encoders in families for e in encoders}
            assert (file["encoder"], file["component"], file["tokenizer"], file["width"]) in places
    wanted = sorted(sha for key, sha in case.truth.items() if not key.endswith(".out"))
    assert sorted(written.values()) == wanted
    lost = {key for key in case.truth if key.endswith(".out")}
    assert ("output-vectors" in names_of(result.findings)) == bool(lost)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """By the reference library; bfloat16 by way of torch."""
    import safetensors.torch

    tensors = safetensors.torch.load_file(path)
    return {
        name: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if tensor.dtype == torch.bfloat16
        else tensor.numpy()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("to", ["a1111", "comfy", "kohya"])
def test_one_file_for_all_encoders_and_back(case, to, tmp_path):
    if case.id in REFUSED or case.kind == "bundle":
        return
    result = lora_convert.convert(case.path, tmp_path / "one", to=to)
    assert result.ok and not (tmp_path / "one" / "learned_embeds.json").exists()
    found = lora_convert.identify(case.path)
    assert len(result.outputs) == len(found.embeddings)
    for output, embedding in zip(result.outputs, found.embeddings, strict=True):
        names = set(read_safetensors(Path(output.path)))
        assert names == set(embedding.vectors) or (names == {"emb_params"} and len(embedding.vectors) == 1)
        again = lora_convert.convert(output.path, tmp_path / Path(output.path).stem, family=found.family)
        assert again.ok
        back = vectors_of(Path(output.path), family=found.family)
        assert back == {
            key.rsplit("/", 1)[-1]: sha
            for key, sha in vectors_of(case.path).items()
            if not key.endswith(".out") and ("/" not in key or key.rsplit("/", 1)[0] == embedding.token)
        }


# what an embedding is called


def embedding(folder: Path, name: str = "sksx.safetensors", count: int = 2, **tensors: Any) -> Path:
    path = folder / name
    if not tensors:
        tensors = {"emb_params": np.full((count, 768), 0.02, np.float32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def a1111(folder: Path, name: str, file: str = "sksx.pt", count: int = 1, **others: Any) -> Path:
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.full((count, 768), 0.02)}, "name": name}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**content, **others}, folder / file)
    return folder / file


def token_of(result: lora_convert.ConvertResult) -> str:
    assert result.ok, result.findings
    (step,) = result.plan.embeddings
    return step.token


TOKENS = {
    "the name inside": ("sks", {}, "sks", set()),
    "capitals, one vector": ("SksCat", {}, "SksCat", set()),
    "capitals, vectors": ("SksCat", {"count": 3}, "skscat", {"token-lowercased"}),
    "capitals beyond ASCII": ("Ärger", {"count": 3}, "ärger", {"token-lowercased"}),
    "spaces and signs": ("水彩 style, (v2)", {"count": 2}, "水彩 style, (v2)", set()),
    "--token": ("sks", {"token": "sksother"}, "sksother", set()),
    "--token with capitals": ("sks", {"token": ["SksOther"], "count": 2}, "sksother", {"token-lowercased"}),
    "a path": ("../../etc/passwd", {}, "etcpasswd", {"token-renamed"}),
    "a terminal's controls": ("a\x1b[31mb", {}, "a[31mb", {"token-renamed"}),
    "turned around": ("ab\u202ecd", {}, "abcd", {"token-renamed"}),
    "not in NFC": ("skse\u0301", {}, "sks\xe9", {"token-renamed"}),
    "blanks inside": ("sks \xa0 style\n2", {}, "sks style 2", {"token-renamed"}),
    "no name": ("", {}, "sksx", {"token-from-name"}),
    "blanks for a name": ("  ", {}, "sksx", {"token-from-name"}),
}


@pytest.mark.parametrize("title", TOKENS)
def test_tokens(title, tmp_path):
    name, options, token, said = TOKENS[title]
    count = options.pop("count", 1) if "count" in options else 1
    result = lora_convert.convert(
        a1111(tmp_path, name, f"{name}.pt" if name in ("sks", "SksCat") else "sksx.pt", count),
        tmp_path / "out",
        **options,
    )
    options["count"] = count
    assert token_of(result) == token
    assert names_of(result.findings) - {"token-differs"} == said
    assert list(read_safetensors(tmp_path / "out" / "learned_embeds.safetensors")) == [token]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "learned_embeds.json",
        "learned_embeds.safetensors",
    ]


def test_a1111_goes_by_the_name_of_the_file(tmp_path):
    result = lora_convert.convert(a1111(tmp_path, "sksinside", "sksoutside.pt"), tmp_path / "out")
    assert token_of(result) == "sksinside"
    (said,) = [finding for finding in result.findings if finding.name == "token-differs"]
    assert "sksoutside" in said.message and said.severity == "note"


def test_what_was_converted_goes_by_its_token(tmp_path):
    lora_convert.convert(a1111(tmp_path, "sks"), tmp_path / "out")
    again = lora_convert.convert(tmp_path / "out", tmp_path / "again", to="a1111")
    assert token_of(again) == "sks" and not again.findings


def test_training_is_told(tmp_path):
    path = a1111(tmp_path, "sks", step=500, sd_checkpoint_name="v1-5-pruned")
    training = {"title": "sks", "base model": "v1-5-pruned", "steps": "500"}
    assert lora_convert.identify(path).training.items() >= training.items()


def test_a_file_of_a_general_name_is_called_as_its_folder(tmp_path):
    path = embedding(tmp_path / "my-style", "embeddings.safetensors")
    assert token_of(lora_convert.convert(path, tmp_path / "out")) == "my-style"


def test_metadata_names_the_token(tmp_path):
    path = tmp_path / "sksx.safetensors"
    save_file({"emb_params": np.ones((1, 768), np.float32)}, path, {"modelspec.trigger_phrase": "sks"})
    assert token_of(lora_convert.convert(path, tmp_path / "out")) == "sks"


def test_bytes_have_no_name(tmp_path):
    data = embedding(tmp_path).read_bytes()
    result = lora_convert.convert(data, tmp_path / "out")
    assert not result.ok and names_of(result.findings) == {"token-missing"} and not (tmp_path / "out").exists()
    assert token_of(lora_convert.convert(data, tmp_path / "out", token="sks")) == "sks"
    assert token_of(lora_convert.convert(io.BytesIO(data), tmp_path / "two", token="sks")) == "sks"


def two_tokens(folder: Path, first: str = "<a>", second: str = "<b>") -> Path:
    return embedding(folder, **{first: np.full((1, 768), 0.5, np.float32), second: np.full((2, 768), 0.25, np.float32)})


def test_several_tokens_are_several_files(tmp_path):
    result = lora_convert.convert(two_tokens(tmp_path), tmp_path / "out")
    assert result.ok
    files = ["learned_embeds-a.safetensors", "learned_embeds-b.safetensors", "learned_embeds.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    read = read_safetensors(tmp_path / "out" / files[1])
    assert list(read) == ["<b>"] and read["<b>"].shape == (2, 768)
    assert lora_convert.validate(tmp_path / "out", tmp_path / "sksx.safetensors").ok
    folder = lora_convert.identify(tmp_path / "out")
    assert [one.token for one in folder.embeddings] == ["<a>", "<b>"]


def test_tokens_are_given_one_for_each(tmp_path):
    path = two_tokens(tmp_path)
    result = lora_convert.convert(path, tmp_path / "out", token=["sksx", "sksy"])
    assert [step.token for step in result.plan.embeddings] == ["sksx", "sksy"]
    result = lora_convert.convert(path, tmp_path / "two", token="x")
    assert not result.ok and "token-missing" in names_of(result.findings)


@pytest.mark.parametrize("token", ["", " ", "a\nb", "\x00", "a\u202eb"])
def test_words_that_nobody_can_write_are_no_tokens(token, tmp_path):
    with pytest.raises(lora_convert.UsageError, match="--token"):
        lora_convert.convert(embedding(tmp_path), tmp_path / "out", token=token)


def test_one_name_twice_is_refused(tmp_path):
    with pytest.raises(lora_convert.UsageError, match="twice"):
        lora_convert.convert(two_tokens(tmp_path), tmp_path / "out", token=["x", "X"])
    result = lora_convert.convert(two_tokens(tmp_path, "<a>", "<A>"), tmp_path / "out")
    assert not result.ok and names_of(result.findings) >= {"duplicate-module"}


def test_names_of_files_are_names_on_every_system(tmp_path):
    names = ["con", "a/b", "<?>", "*", "..", "x" * 300, "日本"]
    tensors = {f"{name}": np.full((1, 768), 0.1, np.float32) for name in names}
    result = lora_convert.convert(
        embedding(tmp_path, **tensors), tmp_path / "out", token=[f"t5{n or ''}" for n in range(7)]
    )
    assert result.ok
    result = lora_convert.convert(
        embedding(tmp_path, "y.safetensors", **{n: tensors[n] for n in names if n not in ("..",)}), tmp_path / "two"
    )
    assert result.ok, result.findings
    written = {path.name for path in (tmp_path / "two").iterdir()}
    assert len(written) == 7 and all(len(name.encode()) < 200 for name in written)
    assert {
        "learned_embeds-_con.safetensors",
        "learned_embeds-ab.safetensors",
        "learned_embeds-日本.safetensors",
    } < written


def test_a1111_calls_the_file_by_its_name(tmp_path):
    result = lora_convert.convert(a1111(tmp_path, "<Sks>", "Sks.pt", 2), tmp_path / "out", to="a1111")
    assert [Path(output.path).name for output in result.outputs] == ["Sks.safetensors"]
    assert "token-renamed" in names_of(result.findings) and "token-lowercased" not in names_of(result.findings)


# which base model, and which text encoder


def test_a_family_decides_where_the_width_does_not(tmp_path):
    path = embedding(tmp_path, **{"<x>": np.ones((1, 768), np.float32)})
    found = lora_convert.identify(path)
    assert found.family is None and {rival.family for rival in found.rivals} == {"sd15", "sdxl", "sd3", "flux"}
    assert [(said.name, said.severity) for said in found.findings] == [("ambiguous-family", "note")]
    for family in ("sd15", "sdxl"):
        result = lora_convert.convert(path, tmp_path / family, family=family)
        assert result.ok and result.detection.family == family and not result.findings
        assert json.loads((tmp_path / family / "learned_embeds.json").read_text())["family"] == family


@pytest.mark.parametrize(
    ("family", "file"), [("sd3", "learned_embeds_3.safetensors"), ("flux", "learned_embeds_2.safetensors")]
)
def test_a_lone_t5_needs_its_family(family, file, tmp_path):
    path = embedding(tmp_path, t5xxl=np.ones((1, 4096), np.float32))
    result = lora_convert.convert(path, tmp_path / "out")
    assert not result.ok and "ambiguous-family" in names_of(result.findings) and not (tmp_path / "out").exists()
    assert lora_convert.convert(path, tmp_path / "out", family=family).ok
    assert (tmp_path / "out" / file).is_file()
    assert lora_convert.convert(path, tmp_path / "one", to="comfy").ok


@pytest.mark.parametrize(
    ("width", "file"), [(1280, "learned_embeds_2.safetensors"), (1024, "learned_embeds.safetensors")]
)
def test_the_width_names_the_encoder(width, file, tmp_path):
    path = embedding(tmp_path, **{"<x>": np.ones((1, width), np.float32)})
    assert lora_convert.convert(path, tmp_path / "out").ok and (tmp_path / "out" / file).is_file()


def test_another_familys_widths_are_refused(tmp_path):
    result = lora_convert.convert(embedding(tmp_path), tmp_path / "out", family="sd21")
    assert not result.ok and names_of(result.findings) == {"shape-misfit"}
    assert "clip_h of 1024" in result.findings[0].message


def test_encoders_with_unequal_numbers_of_vectors_are_refused(tmp_path):
    path = embedding(tmp_path, clip_l=np.ones((2, 768), np.float32), clip_g=np.ones((3, 1280), np.float32))
    result = lora_convert.convert(path, tmp_path / "out")
    assert not result.ok and "shape-misfit" in names_of(result.findings)


def test_a_lora_for_no_table_is_refused_in_a_sentence(tmp_path):
    path = FIXTURES / "tiny" / "neon.safetensors"
    with pytest.raises(lora_convert.UsageError, match="flux"):
        lora_convert.identify(path, family="flux")


@pytest.mark.parametrize("shape", [(768,), (1, 768), (1, 1, 768), (1, 3, 768)])
def test_leading_axes_of_one_count_for_nothing(shape, tmp_path):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 999
    result = lora_convert.convert(embedding(tmp_path, **{"<x>": values}), tmp_path / "out")
    assert result.ok
    written = read_safetensors(tmp_path / "out" / "learned_embeds.safetensors")["<x>"]
    assert np.array_equal(written, values.reshape(-1, 768))


def test_a_vocabulary_is_no_embedding(tmp_path):
    assert lora_convert.identify(embedding(tmp_path, x=np.ones((1025, 768), np.float32))).kind == "unknown"


def test_no_vectors_are_an_empty_file(tmp_path):
    result = lora_convert.convert(embedding(tmp_path, emb_params=np.ones((0, 768), np.float32)), tmp_path / "out")
    assert result.status == "failed" and "empty-file" in names_of(result.findings)


def test_layers_of_a_unet_are_no_tokens(tmp_path):
    layers = [f"IN{n:02}" for n in (1, 2, 4, 5, 7, 8)] + ["MID"] + [f"OUT{n:02}" for n in range(3, 12)]
    result = lora_convert.convert(
        embedding(tmp_path, **{n: np.ones((2, 768), np.float32) for n in layers}), tmp_path / "o"
    )
    assert result.status == "refused" and names_of(result.findings) == {"unsupported-kind"}
    assert result.plan.detection.ok and result.plan.detection.kind == "embedding"


def test_an_optimizers_state_is_no_embedding(tmp_path):
    state = {"state": {0: {"exp_avg": torch.ones(4, 768)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"hash": "d3f2", "optimizer_state_dict": state}, tmp_path / "x.pt.optim")
    found = lora_convert.identify(tmp_path / "x.pt.optim")
    assert found.kind == "optimizer" and "without .optim" in found.findings[0].message
    assert lora_convert.convert(tmp_path / "x.pt.optim", tmp_path / "out").status == "refused"


# values


def test_values_that_are_not_finite_are_shown_and_refused(tmp_path):
    values = np.full((3, 768), 0.02, np.float32)
    values[1, 5] = np.nan
    path = embedding(tmp_path, emb_params=values)
    found = lora_convert.identify(path)
    assert found.ok and [(said.name, said.severity) for said in found.findings] == [("not-finite", "warning")]
    json.dumps(found.as_dict(), allow_nan=False)
    result = lora_convert.convert(path, tmp_path / "out")
    assert result.status == "failed" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "finding"), [(1e4, "odd-norms"), (1e-9, "odd-norms"), (0.0, "no-effect"), (0.02, None)]
)
def test_norms_that_no_word_has(value, finding, tmp_path):
    path = embedding(tmp_path, emb_params=np.full((2, 768), value, np.float32))
    assert names_of(lora_convert.identify(path).findings) == ({finding} if finding else set())
    assert lora_convert.convert(path, tmp_path / "out").ok


DTYPES = {
    "F64": (np.float64, None, "F32", 1e-7), "F32": (np.float32, None, "F32", 0), "F16": (np.float16, None, "F16", 0),
    "BF16": (ml_dtypes.bfloat16, None, "BF16", 0), "F8": (ml_dtypes.float8_e4m3fn, None, "F16", 0),
    "to fp16": (np.float32, "fp16", "F16", 5e-4), "to bf16": (np.float32, "bf16", "BF16", 4e-3),
    "to fp32": (np.float16, "fp32", "F32", 0),
}  # fmt: skip


@pytest.mark.parametrize("title", DTYPES)
def test_dtypes(title, tmp_path):
    import safetensors.torch

    dtype, asked, written, most = DTYPES[title]
    values = np.random.default_rng(0).normal(0, 0.02, (3, 768)).astype(np.float32).astype(dtype)
    names = {np.float64: torch.float64, np.float32: torch.float32, np.float16: torch.float16}
    names |= {ml_dtypes.bfloat16: torch.bfloat16, ml_dtypes.float8_e4m3fn: torch.float8_e4m3fn}
    tensor = torch.from_numpy(values.astype(np.float64)).to(names[dtype])
    safetensors.torch.save_file({"emb_params": tensor}, tmp_path / "sksx.safetensors")
    result = lora_convert.convert(tmp_path / "sksx.safetensors", tmp_path / "out", dtype=asked)
    assert result.ok, result.findings
    (output,) = result.plan.outputs
    assert output.tensors[0].dtype == written and result.worst_delta_error <= 30 * most
    read = read_safetensors(tmp_path / "out" / "learned_embeds.safetensors")["sksx"].astype(np.float64)
    assert np.allclose(read, values.astype(np.float64), rtol=0, atol=most)
    assert ("dtype-changed" in names_of(result.findings)) == (
        written != title[-2:] and title not in ("F32", "F16", "BF16")
    )


def test_values_that_do_not_fit_are_refused(tmp_path):
    path = embedding(tmp_path, emb_params=np.full((1, 768), 7e4, np.float32))
    result = lora_convert.convert(path, tmp_path / "out", dtype="fp16")
    assert not result.ok and "overflow" in names_of(result.findings) and not (tmp_path / "out").exists()


# files


def test_metadata_keeps_where_it_came_from(tmp_path):
    path = a1111(tmp_path, "sks", step=500, sd_checkpoint="81761151", sd_checkpoint_name="v1-5")
    lora_convert.convert(path, tmp_path / "out")
    with safe_open(tmp_path / "out" / "learned_embeds.safetensors", "np") as file:
        metadata = file.metadata()
    wanted = {"name": "sks", "step": "500", "sd_checkpoint": "81761151", "sd_checkpoint_name": "v1-5", "format": "pt"}
    assert metadata.items() >= wanted.items()
    assert metadata["lora_convert.source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert metadata["lora_convert.family"] == "sd15" and metadata["lora_convert.trainer"] == "a1111"


def test_stale_hashes_are_renewed(tmp_path):
    metadata = {"modelspec.hash_sha256": "0x" + "1" * 64, "sshs_model_hash": "2" * 64, "ss_tag_frequency": "{}"}
    path = tmp_path / "sksx.safetensors"
    save_file({"emb_params": np.ones((2, 768), np.float64)}, path, metadata)
    lora_convert.convert(path, tmp_path / "out")
    written = tmp_path / "out" / "learned_embeds.safetensors"
    tensors = lora_convert.identify(written, hashes=True).hashes["tensors"]
    with safe_open(written, "np") as file:
        assert file.metadata()["modelspec.hash_sha256"] == f"0x{tensors}"
        assert file.metadata()["sshs_model_hash"] == tensors and file.metadata()["ss_tag_frequency"] == "{}"


def test_our_own_output_is_copied_and_the_same_input_gives_the_same_bytes(tmp_path):
    path = a1111(tmp_path, "sks", count=3)
    for folder in ("one", "two"):
        lora_convert.convert(path, tmp_path / folder)
    lora_convert.convert(tmp_path / "one" / "learned_embeds.safetensors", tmp_path / "again")
    written = [(tmp_path / folder / "learned_embeds.safetensors").read_bytes() for folder in ("one", "two", "again")]
    assert len(set(written)) == 1
    records = [(tmp_path / folder / "learned_embeds.json").read_bytes() for folder in ("one", "two")]
    assert len(set(records)) == 1
    renamed = lora_convert.convert(tmp_path / "one" / "learned_embeds.safetensors", tmp_path / "new", token="sksother")
    assert token_of(renamed) == "sksother"


@pytest.mark.parametrize("existing", ["learned_embeds.safetensors", "learned_embeds.json"])
def test_what_exists_is_not_replaced_unasked(existing, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / existing).write_text("mine")
    with pytest.raises(lora_convert.UsageError, match="exists"):
        lora_convert.convert(embedding(tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [existing]
    assert lora_convert.convert(embedding(tmp_path), tmp_path / "out", force=True).ok


def test_a_name_for_the_file(tmp_path):
    pair = embedding(tmp_path, clip_l=np.ones((1, 768), np.float32), clip_g=np.ones((1, 1280), np.float32))
    lora_convert.convert(pair, tmp_path / "two" / "sks.safetensors")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "sks.json",
        "sks.safetensors",
        "sks_2.safetensors",
    ]
    record = json.loads((tmp_path / "two" / "sks.json").read_text())
    assert [file["file"] for file in record["embeddings"][0]["files"]] == ["sks.safetensors", "sks_2.safetensors"]
    lora_convert.convert(pair, tmp_path / "one" / "sks.safetensors", to="comfy")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["sks.safetensors"]


BUNDLE = FORMATS / "bundle_onetrainer_sdxl" / "ot_lora.safetensors"


def test_a_lora_brings_its_embeddings_along(tmp_path):
    result = lora_convert.convert(BUNDLE, tmp_path / "out")
    assert result.ok and set(result.proof.rungs) == {"structure", "numbers", "delta", "vectors"}
    names = [
        "learned_embeds.json",
        "learned_embeds.safetensors",
        "learned_embeds_2.safetensors",
        "pytorch_lora_weights.safetensors",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert not any("bundle_emb" in name for name in read_safetensors(tmp_path / "out" / names[3]))
    assert lora_convert.validate(tmp_path / "out", BUNDLE).ok
    alone = lora_convert.validate(tmp_path / "out" / names[3], BUNDLE)
    assert alone.ok and alone.rungs["vectors"].status == "skipped"


def test_a_bundle_under_another_name(tmp_path):
    lora_convert.convert(BUNDLE, tmp_path / "out" / "my.safetensors", to="kohya")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["my.safetensors", "my_embedding.safetensors"]


@pytest.mark.parametrize("change", ["a vector", "a token less", "swapped"])
def test_the_proof_can_fail(change, tmp_path):
    pair = sdxl(tmp_path)
    lora_convert.convert(pair, tmp_path / "out")
    assert lora_convert.validate(tmp_path / "out", pair).ok
    path = tmp_path / "out" / "learned_embeds_2.safetensors"
    with safe_open(path, "np") as file:
        values, metadata = file.get_tensor("sks"), file.metadata()
    if change == "a vector":
        values[1, 7] = np.nextafter(values[1, 7], np.float32(2))
        save_file({"sks": values}, path, metadata)
    elif change == "swapped":
        save_file({"sks": values[::-1].copy()}, path, metadata)
    else:
        path.unlink()
    result = lora_convert.validate(tmp_path / "out", pair)
    assert not result.ok and result.rungs["vectors"].status == "fail"
    assert "vectors-mismatch" in names_of(result.findings)


# the command line


def test_inspect_and_convert_say_it_in_plain_words(tmp_path):
    path = a1111(tmp_path, "SksCat", count=4)
    shown = CliRunner().invoke(cli, ["inspect", str(path)]).output
    assert "an embedding for Stable Diffusion 1.x (sd15), by a1111" in shown
    assert "4 vectors of 768 numbers for clip_l; norms 0.554 (of words about 0.55)" in shown
    said = CliRunner().invoke(cli, ["convert", str(path), "-o", str(tmp_path / "out"), "--token", "MyCat"])
    assert said.exit_code == 0 and "all 4 vectors are the source's, bit for bit" in said.output
    assert "mycat: 4 vectors for clip_l" in said.output
    planned = CliRunner().invoke(cli, ["convert", str(path), "--dry-run", "--json"])
    assert json.loads(planned.output)["embeddings"] == [
        {"token": "skscat", "vectors": 4, "from": {"clip_l": "string_to_param.*"}, "to": {"clip_l": "skscat"}}
    ]
    checked = CliRunner().invoke(cli, ["validate", str(tmp_path / "out"), "--against", str(path), "--json"])
    assert json.loads(checked.output)["rungs"]["vectors"]["status"] == "pass"


def test_json_of_an_embedding(tmp_path):
    content = json.loads(CliRunner().invoke(cli, ["inspect", "--json", str(a1111(tmp_path, "sks", count=2))]).output)
    (entry,) = content["embeddings"]
    assert content["kind"] == "embedding" and content["modules"] == 0 and content["trigger_words"] == ["sks"]
    assert entry["token"] == "sks" and entry["vectors"] == 2 and entry["stated"]
    part = entry["encoders"]["clip_l"]
    assert part["width"] == 768 and part["norms"]["least"] == pytest.approx(0.5543, abs=1e-3)


def test_tokens_for_a_lora_are_a_mistake(tmp_path):
    with pytest.raises(lora_convert.UsageError, match="there are none"):
        lora_convert.convert(FIXTURES / "tiny" / "neon.safetensors", tmp_path / "out", token="x")


@pytest.mark.parametrize("kind", ["embedding", "bundle"])
def test_merge_says_that_an_embedding_is_no_part_of_a_model(kind, tmp_path):
    if kind == "bundle":
        tensors = load_file(FIXTURES / "tiny" / "neon.safetensors")
        path = embedding(tmp_path, **tensors, **{"bundle_emb.sks.emb_params": np.ones((1, 64), np.float32)})
    else:
        path = embedding(tmp_path, emb_params=np.ones((1, 64), np.float32))
    result = lora_convert.merge([path], base="tiny-sd15", out=tmp_path / "out")
    assert ("not-merged" if kind == "bundle" else "unsupported-kind") in names_of(result.findings)
    assert result.ok == (kind == "bundle")


# what a stranger sends

COLLIDING = {
    "signs that file names cannot have": ["<qzq>", "qzq", ":qzq"],
    "longer than names can be": ["😀" * 70 + "x", "😀" * 70 + "y"],
    "nothing left": ["<?>", "<:>"],
}


@pytest.mark.parametrize("to", ["diffusers", "comfy"])
@pytest.mark.parametrize("title", COLLIDING)
def test_no_token_takes_the_place_of_another(title, to, tmp_path):
    tokens = COLLIDING[title]
    path = embedding(tmp_path, **{token: np.random.rand(1, 768).astype(np.float32) for token in tokens})
    result = lora_convert.convert(path, tmp_path / "out", to=to)
    assert result.ok and len(list((tmp_path / "out").glob("*.safetensors"))) == len(tokens)
    if to == "diffusers":
        assert lora_convert.validate(tmp_path / "out", path).ok
        assert {one.token for one in lora_convert.identify(tmp_path / "out").embeddings} == set(tokens)
    else:
        assert "token-renamed" in names_of(result.findings)


LIKE_NAMES = [
    "2.5d", "0.5", "clip_l", "clip_g", "t5", "emb_params", "string_to_param.x", "string_to_token.*", "in01",
    "text_encoders_0", "w.weight", "x.lora_up.weight", "lora_unet_x.alpha", "bundle_emb.a.emb_params",
    "optimizer_state_dict.x", "learned_embeds", "embeddings.token_embedding.weight", "tensor",
]  # fmt: skip


@pytest.mark.parametrize("encoders", [("clip_l",), ("clip_l", "clip_g")])
@pytest.mark.parametrize("token", LIKE_NAMES)
def test_a_token_may_look_like_anything(token, encoders, tmp_path):
    widths = {"clip_l": 768, "clip_g": 1280}
    pair = {key: np.random.rand(2, widths[key]).astype(np.float32) for key in encoders}
    file = source = embedding(tmp_path, **pair)
    options: dict[str, Any] = {"token": token}
    for turn, to in enumerate(["diffusers", "a1111", "diffusers", "diffusers", "a1111", "a1111"]):
        result = lora_convert.convert(file, tmp_path / f"{turn}", to=to, **options)
        assert token_of(result) == token
        file = tmp_path / f"{turn}" if to == "diffusers" else Path(result.outputs[0].path)
        assert lora_convert.validate(file, source).ok
        options = {}


def test_numbers_and_dots_of_a_token_are_kept(tmp_path):
    torch.save([{"sks": torch.ones(1, 768)}, {"sks": torch.ones(1, 1280)}], tmp_path / "list.bin")
    assert [one.token for one in lora_convert.identify(tmp_path / "list.bin").embeddings] == ["sks"]
    torch.save({"2.5d": torch.ones(1, 768)}, tmp_path / "one.bin")
    assert [one.token for one in lora_convert.identify(tmp_path / "one.bin").embeddings] == ["2.5d"]
    path = embedding(tmp_path, **{"0.5": np.ones((1, 768), np.float32), "1.5": np.ones((1, 768), np.float32)})
    assert [one.token for one in lora_convert.identify(path).embeddings] == ["0.5", "1.5"]


NO_EMBEDDINGS = {
    "a matrix": {"weight": (768, 768)},
    "a normalisation": {"weight": (768,), "bias": (768,)},
    "a projection": {"text_projection": (768, 768)},
    "prompts that were encoded": {"hidden_state1": (77, 768), "hidden_state2": (77, 1280), "pool2": (1280,)},
    "positions": {"positional_embedding": (77, 768)},
    "an aesthetic predictor": {"layers.0.weight": (1024, 768), "layers.0.bias": (1024,)},
    "a hypernetwork": {"768.0.linear.0.weight": (1536, 768), "768.0.linear.0.bias": (1536,)},
}


@pytest.mark.parametrize("title", NO_EMBEDDINGS)
def test_what_is_no_embedding(title, tmp_path):
    shapes = NO_EMBEDDINGS[title]
    path = embedding(tmp_path, **{name: np.full(shape, 0.02, np.float32) for name, shape in shapes.items()})
    found = lora_convert.identify(path)
    assert found.kind == "unknown" and not found.embeddings


@pytest.mark.parametrize("shape", [(4, 3, 4), (2000, 4), (), (0, 768)])
def test_a_file_that_says_it_is_ours(shape, tmp_path):
    path = tmp_path / "sksx.safetensors"
    save_file({"t": np.ones(shape, np.float32)}, path, {"lora_convert.version": "1", "lora_convert.token": "t"})
    result = lora_convert.convert(path, tmp_path / "out")
    assert result.status == "failed" and "empty-file" in names_of(result.findings) and not (tmp_path / "out").exists()


def test_half_a_surrogate_pair_is_written_nowhere(tmp_path):
    path = tmp_path / "sksx.safetensors"
    save_file({"emb_params": np.ones((1, 768), np.float32)}, path, {"name": '"\\ud800sks"'})
    assert token_of(lora_convert.convert(path, tmp_path / "out")) == "sks"
    assert lora_convert.validate(tmp_path / "out", path).ok


# folders


def test_diffusers_files_of_the_training_are_left_alone(tmp_path):
    for name in ("learned_embeds", "learned_embeds-steps-500"):
        embedding(tmp_path, f"{name}.safetensors", sks=np.full((1, 768), 0.5 if "steps" in name else 0.25, np.float32))
    assert [path.name for path in embedding_files(tmp_path)] == ["learned_embeds.safetensors"]
    assert lora_convert.identify(tmp_path).ok
    (tmp_path / "learned_embeds.safetensors").unlink()
    assert [path.name for path in embedding_files(tmp_path)] == ["learned_embeds-steps-500.safetensors"]


def test_a_pair_of_two_containers(tmp_path):
    torch.save({"sks": torch.ones(1, 768)}, tmp_path / "learned_embeds.bin")
    embedding(tmp_path, "learned_embeds_2.safetensors", sks=np.ones((1, 1280), np.float32))
    (found,) = lora_convert.identify(tmp_path).embeddings
    assert set(found.vectors) == {"clip_l", "clip_g"}
    embedding(tmp_path, "learned_embeds.safetensors", sks=np.ones((1, 768), np.float32))
    assert {path.suffix for path in embedding_files(tmp_path)} == {".safetensors"}


def sdxl(folder: Path) -> Path:
    rows = {"clip_l": np.random.rand(2, 768), "clip_g": np.random.rand(2, 1280)}
    return embedding(folder, "sks.safetensors", **{key: values.astype(np.float32) for key, values in rows.items()})


def test_what_another_conversion_left_is_not_mixed_in(tmp_path):
    lora_convert.convert(sdxl(tmp_path), tmp_path / "out")
    with pytest.raises(lora_convert.UsageError, match="another conversion"):
        lora_convert.convert(embedding(tmp_path), tmp_path / "out", force=True)
    assert lora_convert.validate(tmp_path / "out", tmp_path / "sks.safetensors").ok


def test_a_folder_is_not_written_over_itself(tmp_path):
    lora_convert.convert(sdxl(tmp_path), tmp_path / "out")
    with pytest.raises(lora_convert.UsageError, match="is an input"):
        lora_convert.convert(tmp_path / "out", tmp_path / "out", force=True)


def test_another_family_is_written_into_the_header(tmp_path):
    path = embedding(tmp_path, sks=np.ones((1, 768), np.float32))
    lora_convert.convert(path, tmp_path / "one", family="sd15")
    lora_convert.convert(tmp_path / "one" / "learned_embeds.safetensors", tmp_path / "two", family="sdxl")
    assert lora_convert.identify(tmp_path / "two").family == "sdxl"


def test_names_of_files_are_words_to_prompt(tmp_path):
    path = embedding(tmp_path, "sks.safetensors")
    said = lora_convert.convert(path, tmp_path / "sksother.safetensors", to="a1111").findings
    assert "sksother" in next(finding.message for finding in said if finding.name == "token-differs")
    assert "token-differs" not in names_of(lora_convert.convert(path, tmp_path / "out", to="a1111").findings)


# the proof


def test_tokens_that_change_places_are_still_proved(tmp_path):
    path = two_tokens(tmp_path)
    for number, tokens in enumerate((["<b>", "<a>"], ["yqy", "xqx"])):
        result = lora_convert.convert(path, tmp_path / f"{number}", token=tokens)
        assert result.ok and [step.token for step in result.plan.embeddings] == tokens
        assert lora_convert.validate(tmp_path / f"{number}", path).ok


def _exchanged(first: Path, second: Path) -> None:
    beside = first.with_suffix(".other")
    first.rename(beside)
    second.rename(first)
    beside.rename(second)


def _renamed(path: Path) -> None:
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    (values,) = load_file(path).values()
    save_file({"sksother": values}, path, metadata)


def _edited(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


WRONG_FOLDERS = {
    "encoders exchanged": ("pair", lambda one, two, rest: _exchanged(one, two)),
    "tokens exchanged": ("two tokens", lambda one, two, rest: _exchanged(one, two)),
    "another token": ("pair", lambda one, two, rest: [_renamed(path) for path in (one, two)]),
    "a file twice": (
        "pair", lambda one, two, rest: one.with_name("learned_embeds-0.safetensors").write_bytes(one.read_bytes())
    ),
    "another record": ("pair", lambda one, two, rest: rest.write_text(rest.read_text().replace('"sks"', '"sksother"'))),
    "other encoders in the record": ("pair", lambda one, two, rest: _edited(rest, '"clip_l"', '"clip_g"')),
    "another source in the record": ("pair", lambda one, two, rest: _edited(rest, '"sha256": "', '"sha256": "0')),
    "other lines in the record": ("pair", lambda one, two, rest: _edited(rest, 'folder = ', 'import os; folder = ')),
    "lists for names in the record": ("pair", lambda one, two, rest: _edited(rest, '"token": "sks"', '"token": []')),
    "a broken record": ("pair", lambda one, two, rest: rest.write_text("[" * 100_000)),
    "no embedding": ("bundle", lambda one, two, rest: [path.unlink() for path in (one, two)]),
    "one that is not the LoRA's": ("LoRA", lambda one, two, rest: None),
}  # fmt: skip


@pytest.mark.parametrize("title", WRONG_FOLDERS)
def test_a_wrong_folder_is_no_proof(title, tmp_path):
    kind, spoil = WRONG_FOLDERS[title]
    source = {
        "pair": lambda: sdxl(tmp_path), "two tokens": lambda: two_tokens(tmp_path), "bundle": lambda: BUNDLE,
        "LoRA": lambda: FIXTURES / "tiny" / "neon.safetensors",
    }[kind]()  # fmt: skip
    lora_convert.convert(source, tmp_path / "out")
    assert lora_convert.validate(tmp_path / "out", source).ok
    if kind == "LoRA":
        other = embedding(tmp_path, sks=np.ones((1, 64), np.float32))
        lora_convert.convert(other, tmp_path / "out", family="tiny-sd15")
    spoil(*[*sorted((tmp_path / "out").glob("learned*.safetensors")), None, None][:2], tmp_path / "out" / RECORD_NAME)
    result = lora_convert.validate(tmp_path / "out", source)
    assert not result.ok and "vectors-mismatch" in names_of(result.findings)


def test_a_name_from_the_hub_is_not_that_of_its_cache(tmp_path, monkeypatch):
    commit = "a" * 40
    cached = embedding(tmp_path / "snapshots" / commit, "embeddings.safetensors")
    monkeypatch.setattr(hub, "download", lambda address, quiet: cached)
    assert token_of(lora_convert.convert("hf://owner/sks-repo/embeddings.safetensors", tmp_path / "1")) == "sks-repo"
    assert token_of(lora_convert.convert("hf://owner/sks-repo", tmp_path / "2")) == "sks-repo"


def test_an_embedding_has_no_rank(tmp_path):
    result = lora_convert.convert(embedding(tmp_path), tmp_path / "out", rank=4)
    assert result.status == "refused" and names_of(result.findings) >= {"unsupported-kind"}
    said = CliRunner().invoke(cli, ["resize", str(embedding(tmp_path)), "--rank", "4", "-o", str(tmp_path / "out")])
    assert "no rank" in said.output and not (tmp_path / "out").exists()


def test_the_sign_of_a_zero_is_a_bit_too(tmp_path):
    source = embedding(tmp_path, emb_params=np.array([[0.0, 0.5] * 384], np.float32))
    lora_convert.convert(source, tmp_path / "out")
    path = tmp_path / "out" / "learned_embeds.safetensors"
    with safe_open(path, "np") as file:
        values, metadata = file.get_tensor("sksx"), file.metadata()
    values[0, 0] = -0.0
    save_file({"sksx": values}, path, metadata)
    assert not lora_convert.validate(tmp_path / "out", source).ok


def test_a_token_that_diffusers_gives_to_another_ones_vector(tmp_path):
    path = embedding(tmp_path, sks=np.full((2, 768), 0.5, np.float32), sks_1=np.full((1, 768), 0.2, np.float32))
    result = lora_convert.convert(path, tmp_path / "out")
    assert not result.ok and "duplicate-module" in names_of(result.findings)
    assert lora_convert.convert(path, tmp_path / "one", to="comfy").ok
