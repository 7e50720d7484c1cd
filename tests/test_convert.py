"""convert() end to end: ΔW of the outputs, names, headers, odd inputs, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import LORA, Truth, lora, manifest, names_of, read_all
from safetensors import safe_open

import lora_convert
from lora_convert.containers import open_source
from lora_convert.converters.adapters import read_adapter
from lora_convert.families import FAMILIES
from lora_convert.inspect.detect import detect

TOLERANCE = {"torch.float16": 3e-4, "float16": 3e-4, "torch.bfloat16": 2e-3, "torch.float32": 1e-6}
CONVERTED = [record for record in manifest(LORA) if record["delta"]]
OTHERS = [record for record in manifest(LORA) if not record["delta"]]
UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
K, V = f"{UNET}attn2_to_k", f"{UNET}attn2_to_v"
TE = "lora_te_text_model_encoder_layers_0_"


class Deltas(Mapping[str, np.ndarray]):
    """ΔW of a file's modules, dense, float64; made one at a time, since all of SDXL's would fill the memory."""

    def __init__(self, path: Path | str, family: str | None = None) -> None:
        self.path = path
        with open_source(path) as source:
            found = detect(source, family=family)
        assert found.ok, found.findings
        self._places = {}
        for module in found.payload:
            row = 0
            for target in module.modules:
                self._places[target.name] = module, row, row + target.shape[0]
                row += target.shape[0]

    def __getitem__(self, name: str) -> np.ndarray:
        module, start, stop = self._places[name]
        with open_source(self.path) as source:
            return read_adapter(source, module).rows(start, stop).deltas()["weight"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def converted(path: Path, out: Path, **options) -> lora_convert.ConvertResult:
    result = lora_convert.convert(path, out, **options)
    assert result.ok, result.findings
    return result


def header_of(path: Path | str) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return file.metadata()


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("record", CONVERTED, ids=lambda record: record["name"])
def test_deltas_are_the_trainers(record, to, tmp_path):
    result = converted(LORA / record["file"], tmp_path, to=to)
    assert result.detection.family == record["family"]
    limit = TOLERANCE[record["dtype"]]
    assert result.worst_delta_error <= limit
    truth = Truth(LORA / f"{record['name']}.truth.safetensors")
    ours = Deltas(result.outputs[0].path, record["family"])
    assert len(ours) == record["n_modules"]
    # the truth itself is fp32 arithmetic; few entries are compared, so rounding shows a little more than in the norm
    for name in truth.names():
        error = truth.error(name, ours[name], as_consumers=bool(record["file_semantics_note"]))
        assert error <= max(1.5 * limit, 1e-5), name


@pytest.mark.parametrize("record", OTHERS, ids=lambda record: record["name"])
def test_other_kinds_convert_or_are_refused_with_a_way_out(record, tmp_path):
    result = lora_convert.convert(LORA / record["file"], tmp_path / "out")
    if record["name"] in ("a_sdxl_lokr", "d_sdxl_peft_dora", "l_sd15_lokr_f8"):
        assert result.ok and result.worst_delta_error <= 1e-6
        return
    assert result.status == "refused"
    assert not (tmp_path / "out").exists()
    errors = [finding for finding in result.findings if finding.severity == "error"]
    assert names_of(errors) <= {"unsupported-kind", "base-needed"}
    assert all(finding.message.endswith(".") and "lora-convert merge" in finding.fix for finding in errors)


def test_canonical_names_shapes_and_header(tmp_path):
    result = converted(LORA / "k_sdxl_excerpt_f32.safetensors", tmp_path)
    assert Path(result.outputs[0].path).name == "pytorch_lora_weights.safetensors"
    tensors, metadata = read_all(result.outputs[0].path), header_of(result.outputs[0].path)
    modules = FAMILIES["sdxl"].modules
    for name, values in tensors.items():
        module, _, half = name.removesuffix(".weight").rpartition(".")
        shape = modules[module].shape
        rank = values.shape[0] if half == "lora_A" else values.shape[1]
        assert values.shape == ((rank, *shape[1:]) if half == "lora_A" else (shape[0], rank, *(1 for _ in shape[2:])))
    adapter = json.loads(metadata["lora_adapter_metadata"])
    components = {key.split(".")[0] for key in adapter}
    assert components == {name.split(".")[0] for name in tensors}
    assert {key.partition(".")[2] for key in adapter} == {
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"
    }  # fmt: skip
    assert len(adapter["unet.target_modules"]) == sum(name.startswith("unet.") for name in tensors) / 2
    source = header_of(LORA / "k_sdxl_excerpt_f32.safetensors")
    for key, value in source.items():
        if not key.startswith(("sshs_", "modelspec.hash", "modelspec.implementation")):
            assert metadata[key] == value
    assert metadata["modelspec.implementation"] == "diffusers"
    assert metadata["format"] == "pt"
    assert metadata["lora_convert.source_sha256"]
    assert not any("time" in key or "date" in key for key in metadata.keys() - source.keys())


def test_same_input_same_bytes(tmp_path):
    source = LORA / "a_sdxl_lora.safetensors"
    outputs = [Path(converted(source, tmp_path / str(n)).outputs[0].path).read_bytes() for n in range(2)]
    outputs.append(Path(converted(source.read_bytes(), tmp_path / "bytes").outputs[0].path).read_bytes())
    with source.open("rb") as file:
        outputs.append(Path(converted(file, tmp_path / "file").outputs[0].path).read_bytes())
    assert len(set(outputs)) == 1


@pytest.mark.parametrize(
    "name", ["k_sd15_excerpt_f32", "a_sdxl_lora", "k_sd15_lora_bf16_r4a4", "tlb_sdxl_merged_excerpt"]
)
def test_alpha_header_keeps_every_matrix(name, tmp_path):
    result = converted(LORA / f"{name}.safetensors", tmp_path, alpha="header")
    before = {
        values.tobytes() for key, values in read_all(LORA / f"{name}.safetensors").items() if "lora_" in key[-17:]
    }
    assert {values.tobytes() for values in read_all(result.outputs[0].path).values()} == before
    assert result.worst_delta_error == 0.0


@pytest.mark.parametrize("record", CONVERTED, ids=lambda record: record["name"])
def test_kohya_to_diffusers_to_kohya(record, tmp_path):
    """ΔW survives the way there and back; with alpha in the header the tensors do, bit for bit."""
    family = record["family"]
    kohya = converted(LORA / record["file"], tmp_path / "k.safetensors", to="kohya")
    there = converted(kohya.outputs[0].path, tmp_path / "d.safetensors", alpha="header", family=family)
    back = converted(there.outputs[0].path, tmp_path / "b.safetensors", to="kohya", family=family)
    first, second = read_all(kohya.outputs[0].path), read_all(back.outputs[0].path)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert (values.dtype, values.shape, values.tobytes()) == (
            second[name].dtype, second[name].shape, second[name].tobytes()
        )  # fmt: skip
    folded = converted(kohya.outputs[0].path, tmp_path / "f.safetensors", family=family)
    again = converted(folded.outputs[0].path, tmp_path / "g.safetensors", to="kohya", family=family)
    assert lora_convert.validate(again.outputs[0].path, against=LORA / record["file"], family=family).ok


@pytest.mark.parametrize("family", FAMILIES)
def test_kohya_names_lead_back_to_their_modules(family, write, tmp_path):
    """Every module of a family, written in both layouts, is found again under the names that readers know."""
    tensors = {}
    for module in FAMILIES[family].modules.values():
        if len(module.shape) == 1 or module.mark == "embedding":
            continue
        tensors[f"{module.name}.lora_A.weight"] = np.ones((1, *module.shape[1:]), np.float16)
        tensors[f"{module.name}.lora_B.weight"] = np.ones((module.shape[0], 1, *(1 for _ in module.shape[2:])), "f2")
    path = write(tensors)
    result = converted(path, tmp_path / "k.safetensors", to="kohya", family=family, validated=False)
    found = lora_convert.identify(result.outputs[0].path)
    assert (found.family, found.ok) == (family, True)
    assert {m.modules[0].name for m in found.payload} == {name.rsplit(".", 2)[0] for name in tensors}
    for name in read_all(result.outputs[0].path):
        stem, dot, _ = name.partition(".")
        assert dot and stem.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"))
        if FAMILIES[family].sgm_names and stem.startswith("lora_unet_"):
            assert stem.startswith(tuple(f"lora_unet_{part}" for part in (
                "input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out_"
            )))  # fmt: skip


def test_canonical_files_keep_their_tensors(tmp_path):
    first = converted(LORA / "k_sd15_excerpt_f32.safetensors", tmp_path / "a.safetensors")
    stripped = tmp_path / "plain.safetensors"
    from safetensors.numpy import save_file

    tensors = read_all(first.outputs[0].path)
    save_file(tensors, stripped, {"format": "pt"})  # a canonical file by someone else, without a header
    second = converted(stripped, tmp_path / "b.safetensors")
    assert {n: v.tobytes() for n, v in read_all(second.outputs[0].path).items()} == {
        n: v.tobytes() for n, v in tensors.items()
    }


def test_a_canonical_header_alpha_stays_in_the_header(tmp_path):
    first = converted(LORA / "k_sd15_excerpt_f32.safetensors", tmp_path / "a.safetensors", alpha="header")
    again = converted(first.outputs[0].path, tmp_path / "b.safetensors")
    assert read_all(first.outputs[0].path).keys() == read_all(again.outputs[0].path).keys()
    assert again.worst_delta_error == 0.0


def test_our_own_output_is_copied_byte_for_byte(tmp_path):
    first = converted(LORA / "a_sdxl_lora.safetensors", tmp_path / "a.safetensors")
    again = converted(first.outputs[0].path, tmp_path / "b.safetensors")
    assert Path(again.outputs[0].path).read_bytes() == Path(first.outputs[0].path).read_bytes()
    assert again.outputs[0].sha256 == first.outputs[0].sha256


@pytest.mark.parametrize("alpha", [1, 2, 3, 7, 0.5, 16, 300])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_missing_and_mixed_alphas(write, tmp_path, alpha, dtype):
    path = write(lora(K, 320, 768, alpha=alpha, dtype=dtype) | lora(V, 320, 768, rank=8, seed=1, dtype=dtype))
    truth = Deltas(path)
    result = converted(path, tmp_path / "o.safetensors")
    for name, delta in Deltas(result.outputs[0].path).items():
        error = np.linalg.norm(delta - truth[name]) / np.linalg.norm(truth[name])
        assert error <= (3e-4 if dtype is np.float16 else 1e-6)
    stored = read_all(path)
    plain = stored[f"{V}.lora_up.weight"].astype("f8") @ stored[f"{V}.lora_down.weight"].astype("f8")
    np.testing.assert_allclose(truth["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"], plain)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.int32])
def test_alpha_of_any_one_number_type(write, tmp_path, shape, dtype):
    tensors = lora(K, 320, 768) | {f"{K}.alpha": np.full(shape, 2, dtype)}
    result = converted(write(tensors), tmp_path / "o.safetensors")
    assert {module.scale for module in result.detection.payload} == {0.5}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_alpha_that_is_no_number_is_named_and_nothing_is_written(write, tmp_path, value):
    tensors = lora(K, 320, 768, alpha=1) | lora(V, 320, 768, alpha=float(value))
    result = lora_convert.convert(write(tensors), tmp_path / "out")
    assert (result.status, [(f.name, f.subject) for f in result.findings]) == ("failed", [("not-finite", f"{V}.alpha")])
    assert not (tmp_path / "out").exists()
    mended = lora_convert.convert(write(tensors), tmp_path / "out", skip=[f"{V}.alpha"])
    assert mended.ok and "skipped" in names_of(mended.findings)


@pytest.mark.parametrize("alpha", [0, -2])
def test_zero_and_negative_alphas_are_kept_and_named(write, tmp_path, alpha):
    path = write(lora(K, 320, 768, alpha=alpha) | lora(V, 320, 768, alpha=1))
    result = converted(path, tmp_path / "o.safetensors")
    assert "odd-alpha" in names_of(result.findings)
    truth, ours = Deltas(path), Deltas(result.outputs[0].path)
    for name in truth:
        np.testing.assert_allclose(ours[name], truth[name], rtol=1e-3, atol=1e-7)


def test_rank_zero_is_left_out_and_named(write, tmp_path):
    tensors = lora(K, 320, 768, alpha=1)
    tensors |= {f"{V}.lora_down.weight": np.ones((0, 768), "f2"), f"{V}.lora_up.weight": np.ones((320, 0), "f2")}
    result = converted(write(tensors), tmp_path / "o.safetensors")
    assert len(read_all(result.outputs[0].path)) == 2
    assert [f.subject for f in result.findings if f.name == "no-effect"] == [f"{V}.lora_up.weight"]
    del tensors[f"{K}.lora_down.weight"], tensors[f"{K}.lora_up.weight"], tensors[f"{K}.alpha"]
    assert lora_convert.convert(write(tensors), tmp_path / "p", family="sd15").status == "failed"


def test_matrices_of_two_dtypes_stay_so(write, tmp_path):
    tensors = lora(K, 320, 768, alpha=1)
    tensors[f"{K}.lora_up.weight"] = tensors[f"{K}.lora_up.weight"].astype(np.float32)
    result = converted(write(tensors), tmp_path / "o.safetensors")
    assert {values.dtype.name for values in read_all(result.outputs[0].path).values()} == {"float16", "float32"}


@pytest.mark.parametrize(("stored", "written"), [("F8_E4M3", "F16"), ("F8_E5M2", "F16"), ("F64", "F32")])
def test_wide_and_short_floats_become_usable_ones(tmp_path, stored, written):
    import torch
    from safetensors.torch import save_file

    kinds = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F64": torch.float64}
    values = {
        name: torch.from_numpy(array.astype(np.float32)).to(kinds[stored]) for name, array in lora(K, 320, 768).items()
    }
    values[f"{K}.alpha"] = torch.tensor(2.0)
    path = tmp_path / "in.safetensors"
    save_file(values, path)
    result = converted(path, tmp_path / "o.safetensors")
    assert set(lora_convert.identify(result.outputs[0].path).dtypes) == {written}
    assert "dtype-changed" in names_of(result.findings)
    assert result.worst_delta_error <= (0.0 if stored != "F64" else 1e-7)


@pytest.mark.parametrize(("dtype", "name"), [("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32")])
def test_dtype_option(tmp_path, dtype, name):
    result = converted(LORA / "k_sd15_excerpt_f32.safetensors", tmp_path / "o.safetensors", dtype=dtype)
    assert set(lora_convert.identify(result.outputs[0].path).dtypes) == {name}


def test_overflow_is_an_error_with_a_way_out(write, tmp_path):
    tensors = lora(K, 320, 768) | {f"{K}.alpha": np.array(4e9, np.float32)}
    tensors[f"{K}.lora_up.weight"][:] = 60000
    tensors[f"{K}.lora_down.weight"][:] = 60000
    result = lora_convert.convert(write(tensors), tmp_path / "out")
    assert result.status == "failed" and "overflow" in names_of(result.findings)
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    assert lora_convert.convert(write(tensors), tmp_path / "out", dtype="fp32").ok


def test_nan_in_a_matrix_names_the_tensor_and_writes_nothing(write, tmp_path):
    tensors = lora(K, 320, 768, alpha=1) | lora(V, 320, 768, alpha=1)
    tensors[f"{K}.lora_up.weight"][3, 1] = np.nan
    tensors[f"{V}.lora_down.weight"][1, 3] = np.inf
    result = lora_convert.convert(write(tensors), tmp_path / "out")
    subjects = {finding.subject for finding in result.findings if finding.name == "not-finite"}
    assert subjects == {f"{K}.lora_up.weight", f"{V}.lora_down.weight"}
    assert result.status == "failed" and not list((tmp_path / "out").glob("*"))


def test_a_file_that_changes_nothing_says_so(write, tmp_path):
    tensors = lora(K, 320, 768, alpha=1)
    tensors[f"{K}.lora_up.weight"][:] = 0
    result = converted(write(tensors), tmp_path / "o.safetensors")
    assert [(f.name, f.severity) for f in result.findings if f.name == "no-effect"] == [("no-effect", "warning")]


def test_scalar_multiplies_the_change(write, tmp_path):
    plain, scaled = lora(K, 320, 768, alpha=2), lora(K, 320, 768, alpha=2)
    scaled[f"{K}.scalar"] = np.array(0.25, np.float32)
    one, two = (converted(write(t, name=n), tmp_path / f"o{n}.safetensors") for n, t in (("a", plain), ("b", scaled)))
    for name, delta in Deltas(one.outputs[0].path).items():
        np.testing.assert_allclose(Deltas(two.outputs[0].path)[name], delta * 0.25, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("four_dimensional", [True, False])
def test_matrices_and_4d_spellings_of_one_weight(write, tmp_path, four_dimensional):
    proj_in = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = lora(K, 320, 768, alpha=1) | lora(proj_in, 320, 320, alpha=1, seed=2)
    wanted = Deltas(write(tensors), "sd15")
    turned = {
        name: values if values.ndim < 2 or not four_dimensional else values[:, :, None, None]
        for name, values in tensors.items()
    }
    result = converted(write(turned, name="turned"), tmp_path / "o.safetensors", family="sd15")
    assert read_all(result.outputs[0].path)["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"].shape == (
        4,
        320,
        1,
        1,
    )
    for name, delta in Deltas(result.outputs[0].path).items():
        np.testing.assert_allclose(delta, wanted[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("modules", "suffix"),
    [
        (["self_attn_q_proj"], "lora_A.weight"),
        (["self_attn_q_proj", "mlp_fc1"], "lora_A.weight"),
        (["mlp_fc1", "mlp_fc2"], "lora_linear_layer.down.weight"),
        (["mlp_fc2"], "lora_linear_layer.down.weight"),
    ],
)
def test_text_encoders_are_spelt_as_they_load(write, tmp_path, modules, suffix):
    shapes = {"self_attn_q_proj": (768, 768), "mlp_fc1": (3072, 768), "mlp_fc2": (768, 3072)}
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        tensors |= lora(TE + module, *shapes[module], alpha=1)
    result = converted(write(tensors), tmp_path / "o.safetensors", family="sd15")
    assert sum(name.endswith(suffix) for name in read_all(result.outputs[0].path)) == len(modules)
    assert lora_convert.identify(result.outputs[0].path).family == "sd15"  # our provenance decides the tie


def test_a_projection_alone_is_spelt_as_it_loads(write, tmp_path):
    path = write(lora("lora_te2_text_projection", 1280, 1280, alpha=1))
    result = converted(path, tmp_path / "o.safetensors", family="sdxl")
    assert "text_encoder_2.text_projection.lora_linear_layer.up.weight" in read_all(result.outputs[0].path)


def test_a_fused_text_encoder_original_is_split_exactly(write, tmp_path):
    tensors = lora("lora_te2_transformer_resblocks_0_attn_in_proj", 3840, 1280, alpha=2)
    path = write(tensors)
    result = converted(path, tmp_path / "o.safetensors", family="sdxl")
    whole = tensors["lora_te2_transformer_resblocks_0_attn_in_proj.lora_up.weight"].astype("f8") @ tensors[
        "lora_te2_transformer_resblocks_0_attn_in_proj.lora_down.weight"
    ].astype("f8")
    for row, part in enumerate("qkv"):
        delta = Deltas(result.outputs[0].path)[f"text_encoder_2.text_model.encoder.layers.0.self_attn.{part}_proj"]
        np.testing.assert_allclose(delta, whole[row * 1280 : (row + 1) * 1280] / 2, atol=1e-6)
    assert result.worst_delta_error == 0.0


def test_an_inpainting_lora_converts_for_its_variant(write, tmp_path):
    tensors = lora(K, 320, 768, alpha=1)
    tensors["lora_unet_conv_in.lora_down.weight"] = np.ones((4, 9, 3, 3), np.float16)
    tensors["lora_unet_conv_in.lora_up.weight"] = np.ones((320, 4, 1, 1), np.float16)
    result = converted(write(tensors), tmp_path / "o.safetensors")
    assert "base-variant" in names_of(result.findings)
    assert read_all(result.outputs[0].path)["unet.conv_in.lora_A.weight"].shape == (4, 9, 3, 3)


def test_comfyui_users_are_told(tmp_path):
    result = converted(LORA / "k_sd15_dylora.safetensors", tmp_path)
    assert "not-for-comfyui" in names_of(result.findings)
    result = converted(LORA / "k_sd15_dylora.safetensors", tmp_path, to="comfy")
    assert "not-for-comfyui" not in names_of(result.findings)


def test_skip_drops_by_pattern_and_says_what(write, tmp_path):
    path = write(lora(K, 320, 768) | lora(V, 320, 768) | {"stray": np.ones(3, np.float32)})
    assert lora_convert.convert(path, tmp_path / "o").status == "failed"
    result = converted(path, tmp_path / "o", skip=["stray"])
    (finding,) = [finding for finding in result.findings if finding.name == "skipped"]
    assert "1 of 5 tensors" in finding.message and "stray" in finding.message
    with pytest.raises(lora_convert.UsageError, match="matches no tensor"):
        lora_convert.convert(path, tmp_path / "p", skip=["nothing*"])


def test_plan_reads_no_matrix(tmp_path):
    """Only the header and the alphas are touched: everything else may be garbage that cannot even be read."""
    data = (LORA / "a_sdxl_lora.safetensors").read_bytes()

    class Watched:
        name = "watched"

        def __init__(self) -> None:
            import io

            self._file, self.read_bytes = io.BytesIO(data), 0

        def read(self, size: int = -1) -> bytes:
            chunk = self._file.read(size)
            self.read_bytes += len(chunk)
            return chunk

        def seek(self, *where: int) -> int:
            return self._file.seek(*where)

        def tell(self) -> int:
            return self._file.tell()

    watched = Watched()
    planned = lora_convert.plan(watched)
    assert planned.ok and len(planned.steps) == 16
    header = 8 + int.from_bytes(data[:8], "little")
    assert watched.read_bytes <= header + 64 + 2 * 16
    content = json.loads(json.dumps(planned.as_dict()))
    assert content["outputs"][0]["tensors"] == 32
    accounted = [name for step in content["steps"] for name in step["from"]]
    assert sorted(accounted) == sorted(read_all(LORA / "a_sdxl_lora.safetensors"))


def test_planned_shapes_are_the_written_ones(tmp_path):
    source = LORA / "l_sd15_locon_tucker.safetensors"
    planned = lora_convert.plan(source)
    result = converted(source, tmp_path)
    written = read_all(result.outputs[0].path)
    assert {tensor.name: tensor.shape for tensor in planned.tensors} == {n: v.shape for n, v in written.items()}


def test_outputs_are_never_overwritten_by_surprise(tmp_path):
    source = tmp_path / "in.safetensors"
    source.write_bytes((LORA / "k_sd15_dylora.safetensors").read_bytes())
    converted(source, tmp_path)
    with pytest.raises(lora_convert.UsageError, match="--force"):
        lora_convert.convert(source, tmp_path)
    converted(source, tmp_path, force=True)
    with pytest.raises(lora_convert.UsageError, match="is an input"):
        lora_convert.convert(source, source, force=True)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(lora_convert.UsageError, match="folder"):
        lora_convert.convert(source, tmp_path / "folder.safetensors", force=True)


def test_wrong_options_are_usage_errors(tmp_path):
    for options in ({"to": "x"}, {"alpha": "x"}, {"dtype": "x"}, {"family": "x"}, {"to": "kohya", "alpha": "fold"}):
        with pytest.raises(lora_convert.UsageError):
            lora_convert.convert(LORA / "k_sd15_dylora.safetensors", tmp_path / "o", **options)


def test_validate_finds_what_is_wrong(write, tmp_path):
    source = write(lora(K, 320, 768, alpha=2) | lora(V, 320, 768, alpha=2, seed=1))
    good = converted(source, tmp_path / "o.safetensors").outputs[0].path
    tensors, metadata = read_all(good), header_of(good)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    broken = {
        "scale": tensors | {f"{name}.lora_B.weight": tensors[f"{name}.lora_B.weight"] * np.float16(1.01)},
        "swap": tensors | {f"{name}.lora_B.weight": tensors[f"{name[:-1]}v.lora_B.weight"]},
    }
    for kind, changed in broken.items():
        result = lora_convert.validate(write(changed, metadata, name=kind), against=source)
        assert result.status == "fail"
        assert [(f.name, f.subject) for f in result.findings] == [("delta-mismatch", name)]
        assert result.rungs["delta"].figures["worst_modules"][0]["module"] == name
    fewer = {key: value for key, value in tensors.items() if name not in key}
    metadata = {"format": "pt"}
    result = lora_convert.validate(write(fewer, metadata, name="fewer"), against=source)
    assert result.status == "fail" and name in result.findings[0].message
    assert lora_convert.validate(good, against=source).ok
    alone = lora_convert.validate(good)
    assert alone.ok and alone.rungs["delta"].status == "skipped"


def test_skipping_in_our_own_output_leaves_the_tensors_out(write, tmp_path):
    first = converted(write(lora(K, 320, 768) | lora(V, 320, 768)), tmp_path / "a.safetensors")
    again = converted(first.outputs[0].path, tmp_path / "b.safetensors", skip="*to_v*")
    assert {name.split(".")[-3] for name in read_all(again.outputs[0].path)} == {"to_k"}
    with pytest.raises(lora_convert.UsageError):
        lora_convert.plan(first.outputs[0].path, skip="nothing")


def test_a_config_may_be_named_by_text():
    config = str(LORA / "p_sd15_lora.adapter_config.json")
    assert lora_convert.plan(LORA / "p_sd15_lora.safetensors", config=config).ok


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scalar_that_is_no_number_is_named_before_anything_is_read(write, tmp_path, value, to):
    path = write(lora(K, 320, 768, alpha=2) | {f"{K}.scalar": np.array(value, "f4")})
    planned = lora_convert.plan(path, to=to)
    assert [(f.name, f.subject) for f in planned.findings] == [("not-finite", f"{K}.scalar")]
    json.dumps(planned.as_dict(), allow_nan=False)
    assert lora_convert.convert(path, tmp_path / "out", to=to).status == "failed" and not (tmp_path / "out").exists()
    assert lora_convert.convert(path, tmp_path / "out", to=to, skip="*.scalar").ok


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_scale_of_zero_changes_nothing_in_either_layout(write, tmp_path, to):
    path = write(lora(K, 320, 768, alpha=2) | {f"{K}.scalar": np.array(0, "f4")})
    assert "no-effect" in names_of(converted(path, tmp_path / "o.safetensors", to=to).findings)
