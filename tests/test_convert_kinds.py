"""convert() of every kind of adapter: exact LoRAs, DoRA, cut ranks, what needs a base model, peft's own forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, lora, names_of, read_all
from safetensors import safe_open
from safetensors.numpy import save_file

import lora_convert
from lora_convert.cli import run
from lora_convert.containers import open_source
from lora_convert.converters.adapters import Dora, read_adapter
from lora_convert.converters.base import open_base
from lora_convert.converters.convert import output_files
from lora_convert.converters.targets import by_target
from lora_convert.errors import UsageError
from lora_convert.inspect.detect import detect

KINDS = FIXTURES / "tiny" / "kinds"
BASE = "tiny-sd15"
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"

EXACT = (
    "locon", "locon_tucker", "locon_rslora", "lora_bias", "loha", "loha_tucker", "lokr", "lokr_tucker",
    "lokr_decompose_both", "dora_out", "loha_dora_out", "lokr_dora_out", "partial_dora",
)  # fmt: skip
REFUSED: Mapping[str, str] = {
    "lokr_full": "rank-needed", "lokr_unbalanced": "rank-needed", "full": "rank-needed", "norm": "unsupported-kind",
    "glora": "base-needed", "tlora": "base-needed", "ia3": "base-needed", "dora_in": "base-needed",
    "diag_oft": "base-needed", "diag_oft_constraint": "base-needed", "boft": "base-needed", "oft_r": "base-needed",
}  # fmt: skip
WITH_BASE = ("glora", "tlora")
NATIVE: Mapping[str, int] = {
    "locon": 2, "loha": 2, "loha_tucker": 2, "lokr": 2, "lokr_decompose_both": 2, "dora_out": 2, "loha_dora_out": 2,
    "partial_dora": 3, "oft_r": 2, "lora_bias": 2,
}  # fmt: skip
LIMITS = {"F16": 5e-4, "F32": 1e-5}


def file_of(name: str) -> Path:
    return KINDS / f"{name}.safetensors"


@pytest.fixture(scope="module")
def weights():
    with open_base(BASE) as opened:
        yield opened


def changes(path: Path | str, weights, family: str = BASE) -> dict[str, dict[str, np.ndarray]]:
    """What a file changes, by target: the whole ΔW and Δb on the base model, float64."""
    found = {}
    with open_source(path) as source:
        for module in detect(source, family=family).payload:
            base = weights.of(module.modules)
            for target, adapter, part in by_target(read_adapter(source, module), module, base):
                found[target.name] = dict(adapter.deltas(part))
    return found


def all_changes(result, weights, family: str = BASE) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for output in result.outputs:
        changed = changes(output.path, weights, family)
        assert not found.keys() & changed.keys()
        found |= changed
    return found


def worst_error(ours, theirs) -> float:
    assert ours.keys() == theirs.keys()
    errors = []
    for name, deltas in theirs.items():
        for part, delta in deltas.items():
            other = ours[name].get(part, np.zeros_like(delta))
            errors.append(np.linalg.norm(other - delta) / (np.linalg.norm(delta) or 1.0))
    return max(errors)


def limit_of(path: Path) -> float:
    with open_source(path) as source:
        return max(LIMITS[info.dtype] for info in source.header.tensors.values() if info.shape)


def test_every_kind_is_tried():
    assert {path.stem for path in KINDS.glob("*.safetensors")} == {*EXACT, *REFUSED}


@pytest.mark.parametrize("name", EXACT)
def test_exact_kinds_become_loras(name, tmp_path, weights):
    result = lora_convert.convert(file_of(name), tmp_path / "o")
    assert result.ok, result.findings
    limit = limit_of(file_of(name))
    assert result.worst_delta_error <= limit
    # DoRA divides by ‖W+ΔW‖, where a rounded ΔW counts once more
    assert worst_error(all_changes(result, weights), changes(file_of(name), weights)) <= 3 * limit
    for output in result.outputs:
        assert {key.rsplit(".", 2)[-2] for key in read_all(output.path)} <= {
            "lora_A", "lora_B", "lora_magnitude_vector"
        }  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lora_is_refused_with_the_ways_out(name, tmp_path):
    result = lora_convert.convert(file_of(name), tmp_path / "o")
    assert result.status == "refused" and not (tmp_path / "o").exists()
    errors = [finding for finding in result.findings if finding.severity == "error"]
    assert names_of(errors) == {REFUSED[name]}
    assert all("lora-convert merge" in finding.fix for finding in errors)
    assert lora_convert.plan(file_of(name)).status == "refused"


@pytest.mark.parametrize("name", WITH_BASE)
def test_kinds_that_the_base_makes_exact(name, tmp_path, weights):
    result = lora_convert.convert(file_of(name), tmp_path / "o", base=BASE)
    assert result.ok, result.findings
    assert worst_error(all_changes(result, weights), changes(file_of(name), weights)) <= limit_of(file_of(name))


@pytest.mark.parametrize("error", [0.3, 1e-2])
@pytest.mark.parametrize("name", [name for name in REFUSED if name != "norm"])
def test_max_error_is_kept_over_every_module(name, error, tmp_path, weights):
    result = lora_convert.convert(file_of(name), tmp_path / "o", base=BASE, max_error=error)
    assert result.ok, result.findings
    assert worst_error(all_changes(result, weights), changes(file_of(name), weights)) <= error
    (delta,) = (rung for rung_name, rung in result.proof.rungs.items() if rung_name == "delta")
    assert delta.status == "pass"
    if result.truncations:
        assert "rank-truncated" in names_of(result.findings) or not any(item.error for item in result.truncations)
        with safe_open(result.outputs[0].path, "np") as file:
            assert file.metadata()["lora_convert.max_error"] == f"{error:g}"


@pytest.mark.parametrize("name", ["loha", "lokr", "lokr_full", "full", "locon", "dora_out", "loha_dora_out"])
def test_a_rank_is_the_best_of_its_size(name, tmp_path, weights):
    source = file_of(name)
    result = lora_convert.convert(source, tmp_path / "o", rank=3, max_error=0.99)
    assert result.ok, result.findings
    with open_source(source) as opened:
        best = {}
        for module in detect(opened, family=BASE).payload:
            adapter = read_adapter(opened, module)
            inner = adapter.inner if isinstance(adapter, Dora) else adapter
            delta = inner.deltas()["weight"]
            values = np.linalg.svd(delta.reshape(delta.shape[0], -1), compute_uv=False)
            best[module.modules[0].name] = np.linalg.norm(values[3:]) / np.linalg.norm(values)
    found = {item.module: item for item in result.truncations}
    for name_of_module, error in best.items():
        if error > 1e-6:
            assert found[name_of_module].error == pytest.approx(error, rel=1e-6)
            assert found[name_of_module].kept == pytest.approx(1 - error**2, rel=1e-6)
    for key, values in read_all(result.outputs[0].path).items():
        if ".lora_A." in key:
            assert values.shape[0] <= 3
    assert result.as_dict()["truncated"] == [item.as_dict() for item in result.truncations]


def test_a_rank_that_loses_too_much_is_refused(tmp_path):
    result = lora_convert.convert(file_of("lokr_full"), tmp_path / "o", rank=4)
    assert result.status == "refused" and not (tmp_path / "o").exists()
    errors = [finding for finding in result.findings if finding.severity == "error"]
    assert names_of(errors) == {"rank-truncated"} and all("--max-error" in finding.fix for finding in errors)
    assert lora_convert.convert(file_of("lokr_full"), tmp_path / "o", rank=4, max_error=0.95).ok


def test_a_worse_lora_than_the_best_of_its_rank_fails_the_proof(tmp_path):
    result = lora_convert.convert(file_of("loha"), tmp_path / "o", rank=4, max_error=0.9, dtype="fp32")
    path = Path(result.outputs[0].path)
    assert lora_convert.validate(path, file_of("loha")).ok
    worse = lora_convert.validate(tampered(path, ".lora_B.weight", 1.05), file_of("loha"))
    assert not worse.ok and names_of(worse.findings) == {"delta-mismatch"}


def tampered(path: Path | str, ending: str, factor: float) -> Path:
    """A copy of a file with the metadata of the original in which one tensor is multiplied."""
    tensors = read_all(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    key = max((key for key in tensors if key.endswith(ending)), key=lambda key: float(np.abs(tensors[key]).max()))
    changed = Path(path).with_name("tampered.safetensors")
    save_file({**tensors, key: tensors[key] * np.float32(factor)}, changed, metadata)
    return changed


@pytest.mark.parametrize(("name", "ending"), [("dora", "lora_magnitude_vector.weight"), ("bias", "lora_B.bias")])
def test_a_cut_rank_excuses_no_other_magnitude_or_bias(name, ending, tmp_path, write):
    loha = {
        f"{K}.hada_{part}": value
        for part, value in zip(
            ("w1_a", "w1_b", "w2_a", "w2_b"),
            (np.random.default_rng(0).standard_normal(s, np.float32) for s in ((320, 3), (3, 768)) * 2),
            strict=True,
        )
    }
    beside = {"dora": {"dora_scale": np.ones((320, 1), np.float32)}, "bias": {"diff_b": np.ones(320, np.float32)}}[name]
    source = write({**loha, **{f"{K}.{part}": value for part, value in beside.items()}})
    result = lora_convert.convert(source, tmp_path / "o", rank=4, max_error=0.9)
    assert lora_convert.validate(result.outputs[0].path, source).ok
    worse = lora_convert.validate(tampered(result.outputs[0].path, ending, 1.1), source)
    assert not worse.ok and "delta-mismatch" in names_of(worse.findings)


def test_validate_says_what_a_cut_rank_lost(tmp_path):
    result = lora_convert.convert(file_of("lokr_full"), tmp_path / "o", rank=2, max_error=0.99)
    (said,) = lora_convert.validate(result.outputs[0].path, file_of("lokr_full")).findings
    worst = max(result.truncations, key=lambda item: item.error)
    assert (said.name, said.severity, said.subject) == ("rank-truncated", "warning", worst.module)
    assert f"{worst.error:.2e}" in said.message


def empty_lora() -> dict[str, np.ndarray]:
    shapes = {"lora_down.weight": (0, 768), "lora_up.weight": (320, 0)}
    return {f"{K}.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("beside", ["dora_scale", "diff_b"])
def test_a_rank_of_zero_does_not_take_what_stands_beside_it_away(beside, to, tmp_path, write):
    values = np.linspace(1, 2, 320, dtype=np.float32)
    source = write({**empty_lora(), f"{K}.{beside}": values.reshape(320, 1) if beside == "dora_scale" else values})
    result = lora_convert.convert(source, tmp_path / "o", to=to)
    assert result.ok and result.worst_delta_error == 0.0, result.findings
    assert "no-effect" not in names_of(result.findings)
    assert any(np.array_equal(tensor.reshape(-1), values) for tensor in read_all(result.outputs[0].path).values())


def test_peft_loads_no_dora_with_biases(tmp_path, write):
    pair, bias = lora(K, 320, 768), {f"{K}.diff_b": np.ones(320, np.float16)}
    dora = {f"{K}.dora_scale": np.ones((320, 1), np.float16)}
    both = write({**pair, **bias, **dora}, name="both")
    refused = lora_convert.convert(both, tmp_path / "o")
    assert refused.status == "refused" and names_of(refused.findings) == {"unsupported-kind"}
    assert lora_convert.convert(both, tmp_path / "k", to="kohya").ok


def test_dora_and_biases_of_other_modules_are_two_files_with_the_base_too(tmp_path):
    part = "lora_te_text_model_encoder_layers_0_self_attn_{}_proj"
    source = tmp_path / "in.safetensors"
    q, k = part.format("q"), part.format("k")
    tensors = {**lora(q, 64, 64), **lora(k, 64, 64), f"{q}.diff_b": np.ones(64, np.float16)}
    save_file({**tensors, f"{k}.dora_scale": np.ones((64, 1), np.float16)}, source)
    result = lora_convert.convert(source, tmp_path / "o", base=BASE, family=BASE)
    assert len(result.outputs) == 2, result.findings
    for output in result.outputs:
        kinds = {key.split(".")[-2] + key.split(".")[-1] for key in read_all(output.path)}
        assert not {"lora_Bbias", "lora_magnitude_vectorweight"} <= kinds
    (said,) = (finding for finding in result.findings if finding.name == "two-files")
    assert not said.fix


def test_what_another_conversion_left_is_not_taken_for_a_part(tmp_path):
    assert len(lora_convert.convert(file_of("partial_dora"), tmp_path / "o").outputs) == 2
    for call in (lora_convert.convert, lora_convert.plan):
        with pytest.raises(UsageError, match="another conversion"):
            call(file_of("loha"), tmp_path / "o", force=True)
    assert lora_convert.convert(file_of("partial_dora"), tmp_path / "o", force=True).ok
    with pytest.raises(UsageError, match="another conversion"):
        lora_convert.convert(file_of("loha"), tmp_path / "o", to="peft")
    assert lora_convert.convert(file_of("loha"), tmp_path / "o" / "x.safetensors").ok


HUGE = {
    "lora": ({"lora_down.weight": (4, 768), "lora_up.weight": (320, 4)}, 1e200),
    "loha": ({"hada_w1_a": (320, 2), "hada_w1_b": (2, 768), "hada_w2_a": (320, 2), "hada_w2_b": (2, 768)}, 1e160),
    "lokr": ({"lokr_w1": (8, 8), "lokr_w2": (40, 96)}, 1e200),
    "diff": ({"diff": (320, 768)}, 1e150),
}


@pytest.mark.parametrize("options", [["--max-error", "0.5"], ["--rank", "4"], ["--rank", "4", "--no-validate"]])
@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "diff"])
def test_numbers_beyond_float32_are_a_finding(name, options, tmp_path, write, capsys, recwarn):
    shapes, size = HUGE[name]
    random = np.random.default_rng(0)
    source = write({f"{K}.{part}": size * random.standard_normal(shape) for part, shape in shapes.items()})
    assert run(["convert", str(source), "-o", str(tmp_path / "o"), "--json", *options]) == 1
    found = json.loads(capsys.readouterr().out)
    errors = {finding["name"] for finding in found["findings"] if finding["severity"] == "error"}
    assert errors and errors <= {"overflow", "unsupported-kind", "rank-truncated"} and not (tmp_path / "o").exists()
    assert not [str(warning.message) for warning in recwarn.list]


def test_factors_that_cannot_be_read_are_a_finding_under_max_error_too(tmp_path):
    module = "lora_unet_up_blocks_2_attentions_1_transformer_blocks_0_ff_net_0_proj"
    save_file(
        {f"{module}.weight": np.ones(64, np.float32), f"{module}.on_input": np.array(0)}, tmp_path / "in.safetensors"
    )
    result = lora_convert.convert(tmp_path / "in.safetensors", tmp_path / "o", family=BASE, base=BASE, max_error=0.5)
    assert result.status == "failed" and "side" in str(result.findings[-1]), result.findings


def test_an_alpha_beyond_float32_is_kept(tmp_path, write):
    source = write({**lora(K, 320, 768, dtype=np.float32), f"{K}.alpha": np.array(1e200)})
    assert lora_convert.convert(source, tmp_path / "o", to="kohya").worst_delta_error == 0.0


def test_partial_dora_is_two_files_or_one_with_the_base(tmp_path, weights):
    source = file_of("partial_dora")
    two = lora_convert.convert(source, tmp_path / "two")
    assert [Path(output.path).name for output in two.outputs] == [
        "pytorch_lora_weights.safetensors", "pytorch_lora_weights_dora.safetensors"
    ]  # fmt: skip
    (said,) = (finding for finding in two.findings if finding.name == "two-files")
    assert "set_adapters" in said.message and "--base" in said.fix
    assert output_files(tmp_path / "two") == tuple(Path(output.path) for output in two.outputs)
    assert lora_convert.validate(tmp_path / "two", source).ok
    named = lora_convert.convert(source, tmp_path / "x.safetensors")
    assert [Path(output.path).name for output in named.outputs] == ["x.safetensors", "x_dora.safetensors"]

    one = lora_convert.convert(source, tmp_path / "one", base=BASE)
    (output,) = one.outputs
    keys = read_all(output.path)
    adapted = {key.split(".lora_")[0] for key in keys if key.startswith("unet.")}
    assert all(f"{module}.lora_magnitude_vector.weight" in keys for module in adapted)
    assert worst_error(changes(output.path, weights), changes(source, weights)) <= 1e-5
    with safe_open(output.path, "np") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.use_dora"] is True
    # without the base nobody can say whether the magnitudes of plain modules change anything
    assert lora_convert.validate(output.path, source).rungs["delta"].status == "skipped"
    assert lora_convert.validate(output.path, source, base=BASE).rungs["delta"].status == "pass"


def test_a_wrong_magnitude_fails_the_proof(tmp_path):
    result = lora_convert.convert(file_of("dora_out"), tmp_path)
    wrong = tampered(result.outputs[0].path, "lora_magnitude_vector.weight", 1.001)
    found = lora_convert.validate(wrong, file_of("dora_out"))
    ours, theirs = read_all(wrong), read_all(result.outputs[0].path)
    changed = [key.split(".lora_")[0] for key in ours if not np.array_equal(ours[key], theirs[key])]
    assert not found.ok and [finding.subject for finding in found.findings] == changed


def test_biases_are_there_for_every_module_of_a_component(tmp_path, weights):
    result = lora_convert.convert(file_of("lora_bias"), tmp_path)
    keys = read_all(result.outputs[0].path)
    with safe_open(result.outputs[0].path, "np") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    for component in ("unet", "text_encoder"):
        modules = {key.split(".lora_")[0] for key in keys if key.startswith(f"{component}.")}
        biases = {key.split(".lora_")[0] for key in keys if key.endswith(".lora_B.bias")}
        assert (metadata.get(f"{component}.lora_bias") is True) == bool(modules & biases)
        assert not modules & biases or modules <= biases


@pytest.mark.parametrize("name", NATIVE)
def test_pefts_own_forms_are_exact(name, tmp_path, weights):
    result = lora_convert.convert(file_of(name), tmp_path / "o", to="peft")
    assert result.ok, result.findings
    assert len(result.outputs) == NATIVE[name]
    assert result.worst_delta_error <= limit_of(file_of(name))
    for output in result.outputs:
        config = json.loads(Path(output.path).with_name("adapter_config.json").read_text())
        assert config["peft_type"] in ("LORA", "LOHA", "LOKR", "IA3", "OFT")
    assert lora_convert.validate(tmp_path / "o", file_of(name)).ok


@pytest.mark.parametrize("name", ["boft", "diag_oft", "glora", "full", "norm", "lokr_tucker", "tlora"])
def test_what_peft_cannot_hold_is_named(name, tmp_path):
    result = lora_convert.convert(file_of(name), tmp_path / "o", to="peft")
    assert result.status == "refused" and not (tmp_path / "o").exists()
    errors = [finding for finding in result.findings if finding.severity == "error"]
    assert names_of(errors) == {"unsupported-kind"} and all("merge" in finding.fix for finding in errors)


def test_kohyas_layout_keeps_dora_and_biases(tmp_path, weights):
    for name in ("dora_out", "lora_bias", "lokr_dora_out"):
        result = lora_convert.convert(file_of(name), tmp_path / name, to="kohya")
        assert result.ok, result.findings
        ours = changes(result.outputs[0].path, weights)
        assert worst_error(ours, changes(file_of(name), weights)) <= 1e-5
    assert "not-for-comfyui" in names_of(result.findings)


def test_the_same_bytes_twice(tmp_path):
    for options in ({}, {"rank": 2, "max_error": 0.99}, {"to": "peft"}):
        both = [lora_convert.convert(file_of("loha"), tmp_path / f"{n}{len(options)}", **options) for n in "ab"]
        assert [o.sha256 for o in both[0].outputs] == [o.sha256 for o in both[1].outputs]


def test_a_plan_states_bounds_and_the_result_is_within_them(tmp_path):
    planned = lora_convert.plan(file_of("lokr_full"), max_error=0.2)
    assert planned.ok and not planned.resolved and planned.as_dict()["bounds"] is True
    result = lora_convert.convert(file_of("lokr_full"), tmp_path, max_error=0.2)
    assert result.plan.resolved and result.plan.bytes <= planned.bytes
    for bound, step in zip(planned.steps, result.plan.steps, strict=True):
        assert step.rank <= bound.rank


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "--rank"),
        ({"max_error": 1.5}, "--max-error"),
        ({"to": "peft", "rank": 4}, "does not go with"),
        ({"to": "peft", "alpha": "fold"}, "does not go with"),
        ({"base": "tiny-sdxl"}, "Stable Diffusion"),
        ({"base": "/nonexistent/model"}, "nonexistent"),
    ],
)
def test_wrong_options_are_one_sentence(options, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        lora_convert.convert(file_of("loha"), tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()


def test_a_file_name_is_no_folder_for_peft(tmp_path):
    with pytest.raises(UsageError, match="folder"):
        lora_convert.convert(file_of("loha"), tmp_path / "x.safetensors", to="peft")


def test_resize(tmp_path, capsys, write):
    tensors = lora(K, 320, 768, rank=16, alpha=8)
    path = write(tensors)
    assert run(["resize", str(path), "--rank", "4", "-o", str(tmp_path / "o"), "--json"]) == 1
    refused = json.loads(capsys.readouterr().out)
    assert refused["status"] == "refused" and {f["name"] for f in refused["findings"]} >= {"rank-truncated"}
    assert run(["resize", str(path), "--rank", "12", "--max-error", "0.9", "-o", str(tmp_path / "o"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (cut,) = record["truncated"]
    delta = tensors[f"{K}.lora_up.weight"].astype(float) @ tensors[f"{K}.lora_down.weight"].astype(float)
    values = np.linalg.svd(delta, compute_uv=False)
    assert cut["error"] == pytest.approx(np.linalg.norm(values[12:]) / np.linalg.norm(values), rel=1e-6)
    assert run(["resize", str(path), "-o", str(tmp_path / "p")]) == 2
    assert "--rank" in capsys.readouterr().err
    # what already fits stays as it is
    assert run(["resize", str(path), "--rank", "64", "-o", str(tmp_path / "q"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["truncated"] == []


def test_dora_per_input_beside_dora_per_output(tmp_path, weights, write):
    """With the base the former becomes a LoRA with magnitudes of its own, ‖W+ΔW‖, which are not the source's."""
    both = [read_all(file_of(name)) for name in ("dora_in", "dora_out")]
    first = {key: values for key, values in both[0].items() if "attn1_to_q" in key}
    source = write({**{key: values for key, values in both[1].items() if key not in first}, **first})
    assert first
    result = lora_convert.convert(source, tmp_path / "o", base=BASE, max_error=1e-2)
    assert result.ok, result.findings
    assert worst_error(all_changes(result, weights), changes(source, weights)) <= 1e-2
