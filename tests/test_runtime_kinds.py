"""Every kind of adapter on a live tiny-sd15: the reference is LyCORIS' network, and what applies is the reference."""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, names_of, read_all
from safetensors.numpy import load_file, save_file

pytest.importorskip("lycoris")
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from test_runtime_applying import draw, errors_of, sabotaged, scaled, state, without  # noqa: E402

import lora_convert  # noqa: E402
from lora_convert.containers import open_source, opened  # noqa: E402
from lora_convert.errors import UsageError  # noqa: E402
from lora_convert.inspect.detect import detect  # noqa: E402
from lora_convert.runtime import bases  # noqa: E402
from lora_convert.runtime.applying import applied, apply  # noqa: E402
from lora_convert.runtime.climb import climb  # noqa: E402
from lora_convert.runtime.picture import Drawing, prove  # noqa: E402
from lora_convert.runtime.pipelines import live_components, open_pipeline  # noqa: E402
from lora_convert.runtime.reference import merged  # noqa: E402
from training import kinds  # noqa: E402

pytestmark = pytest.mark.xdist_group("pictures")

FOLDER = FIXTURES / "tiny" / "kinds"
TOLERANCES = {"tlora": 5e-5}
"""T-LoRA subtracts a part of the weight's SVD, which its trainer takes in float32."""


@pytest.fixture(scope="module")
def opened_base() -> Any:
    return open_pipeline("tiny-sd15", "cpu")


@pytest.fixture
def pipeline(opened_base: Any) -> Iterator[Any]:
    """The base model; whatever a test does, it must leave it as it was."""
    before = state(opened_base)
    yield opened_base
    assert state(opened_base) == before


def parameters(pipeline: Any) -> dict[str, Any]:
    """Copies of all weights and biases, by component and name."""
    return {
        f"{component}.{name}": parameter.detach().clone()
        for component, model in live_components(pipeline).items()
        for name, parameter in model.named_parameters()
    }


def moved(pipeline: Any, before: dict[str, Any]) -> dict[str, Any]:
    """The parameters that are not what they were, less what they were."""
    return {
        name: now - before[name] for name, now in parameters(pipeline).items() if not torch.equal(now, before[name])
    }


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_reference_changes_the_weights_as_the_trainers_own_modules_do(kind, pipeline):
    """And nothing else: every parameter that moved is accounted for."""
    path, before = FOLDER / f"{kind}.safetensors", parameters(pipeline)
    places = kinds.layers(pipeline)
    names = {
        id(module): f"{component}.{name}"
        for component, model in live_components(pipeline).items()
        for name, module in model.named_modules()
    }
    wanted = {}
    for flat, module in kinds.read(kind, path, pipeline).items():
        for part, change in kinds.changes(module, places[flat]).items():
            wanted[f"{names[id(places[flat])]}.{part}"] = change
    source = open_source(path)
    with merged(pipeline, source, detect(source, family="tiny-sd15")):
        found = moved(pipeline, before)
    if kinds.KINDS[kind].biases:  # LyCORIS does not read the `diff_b` that are beside its own tensors
        found = {name: change for name, change in found.items() if not name.endswith(".bias")}
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        error = float((found[name] - change).norm() / change.norm())
        assert error <= TOLERANCES.get(kind, 1e-5), (name, error)


@pytest.mark.parametrize("kind", [name for name, kind in kinds.KINDS.items() if kind.algorithm != "peft"])
def test_the_reference_draws_what_lycoris_own_network_draws(kind, pipeline):
    path, alone = FOLDER / f"{kind}.safetensors", draw(pipeline)
    modules = kinds.read(kind, path, pipeline).values()
    try:
        for module in modules:
            module.apply_to()
        expected = draw(pipeline)
    finally:
        for module in modules:
            module.restore()
        for model in live_components(pipeline).values():
            model.requires_grad_(False)  # LyCORIS puts new parameters in place of those that it took away
    found = reference(pipeline, path, skip=("*.diff_b",) if kinds.KINDS[kind].biases else ())
    assert float((found - expected).norm()) <= 1e-4 * float((expected - alone).norm())
    assert float((expected - alone).norm()) > 5e-4 * float(alone.norm())


def kind_file(kind: str) -> Path:
    return FOLDER / f"{kind}.safetensors"


def reference(pipeline: Any, file: Path, scale: float = 1.0, skip: tuple[str, ...] = ()) -> Any:
    """What is drawn with the source merged into the weights by its definition."""
    with opened(file, skip=skip) as source, merged(pipeline, source, detect(source, family="tiny-sd15"), scale):
        return draw(pipeline)


def assert_same(found: Any, expected: Any, alone: Any) -> None:
    """Equal pictures, measured by what the adapter does."""
    assert float((found - expected).norm()) <= 2e-4 * float((expected - alone).norm())


EXACT: Mapping[str, int] = {
    "locon": 8, "locon_tucker": 12, "locon_rslora": 8, "lora_bias": 5, "loha": 8, "loha_tucker": 12, "lokr": 12,
    "lokr_tucker": 12, "lokr_decompose_both": 12, "dora_out": 12, "loha_dora_out": 8, "lokr_dora_out": 12,
    "partial_dora": 8,
}  # fmt: skip
"""Kinds that have an exact form without a base model's weights, and their modules."""


@pytest.mark.parametrize("kind", EXACT)
def test_a_kind_with_an_exact_form_is_applied_as_its_definition(kind, pipeline):
    alone, expected = draw(pipeline), reference(pipeline, kind_file(kind))
    with apply(pipeline, kind_file(kind)) as adapter:
        assert (adapter.modules, adapter.file, adapter.warnings) == (EXACT[kind], f"{kind}.safetensors", ())
        assert_same(draw(pipeline), expected, alone)
    assert torch.equal(draw(pipeline), alone)


REFUSED = {
    "lokr_full": "rank-needed", "full": "rank-needed", "dora_in": "base-needed", "glora": "base-needed",
    "ia3": "base-needed", "diag_oft": "base-needed", "boft": "base-needed", "oft_r": "base-needed",
    "norm": "unsupported-kind",
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_with_the_ways_out(kind, pipeline):
    findings = errors_of(lambda: apply(pipeline, kind_file(kind)))
    assert names_of(findings) == {REFUSED[kind]}
    assert all("merge" in finding.fix for finding in findings)
    assert applied(pipeline) == ()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that a kind is converted to, once for every set of options."""
    folders: dict[str, Path] = {}

    def folder(kind: str, **options: Any) -> Path:
        key = f"{kind} {options}"
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("made")
            result = lora_convert.convert(kind_file(kind), folders[key], family="tiny-sd15", **options)
            assert result.ok, result.findings
        return folders[key]

    return folder


PLAIN, DORA = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_dora.safetensors"


def test_a_folder_of_two_files_is_one_adapter(made, pipeline):
    folder, before = made("partial_dora"), state(pipeline)
    alone, expected = draw(pipeline), reference(pipeline, kind_file("partial_dora"))
    with apply(pipeline, folder) as adapter:
        assert (adapter.names, adapter.name, adapter.modules) == (("adapter_0", "adapter_1"), "adapter_0", 8)
        listing = "".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in (PLAIN, DORA))
        assert adapter.sha256 == hashlib.sha256(listing.encode()).hexdigest()
        assert applied(pipeline) == (adapter,)
        assert_same(draw(pipeline), expected, alone)
    with apply(pipeline, folder / PLAIN) as half:
        assert half.modules == 5 and names_of(half.findings) == {"half-applied"}
    assert state(pipeline) == before and torch.equal(draw(pipeline), alone)


def test_a_scale_reaches_both_files_of_a_folder(made, pipeline):
    with apply(pipeline, made("partial_dora"), {"unet": 0.0, "text_encoder": 0.0}) as adapter:
        layers = [
            (layer, name)
            for model in live_components(pipeline).values()
            for layer in model.modules()
            for name in adapter.names
            if name in getattr(layer, "lora_A", ())
        ]
        assert len(layers) == 8 and all(layer.scaling[name] == 0.0 for layer, name in layers)
        adapter.set_scale(1.0)
        assert all(layer.scaling[name] > 0.0 for layer, name in layers)


@pytest.mark.parametrize("order", [("locon", "dora_out"), ("dora_out", "locon")])
def test_a_lora_beside_a_dora_adds_to_it_in_whatever_order_they_come(order, pipeline):
    alone = draw(pipeline)
    expected = summed(pipeline, [kind_file(kind) for kind in order])
    with apply(pipeline, kind_file(order[0])), apply(pipeline, kind_file(order[1])):
        assert_same(draw(pipeline), expected, alone)


def summed(pipeline: Any, files: list[Path]) -> Any:
    """What is drawn with the changes that each file makes to the base alone, added."""
    before = parameters(pipeline)
    changes: list[dict[str, Any]] = []
    for file in files:
        with opened(file) as source, merged(pipeline, source, detect(source, family="tiny-sd15")):
            changes.append(moved(pipeline, before))
    live = {
        f"{component}.{name}": parameter
        for component, model in live_components(pipeline).items()
        for name, parameter in model.named_parameters()
    }
    with torch.no_grad():
        for change in changes:
            for name, delta in change.items():
                live[name] += delta
        drawn = draw(pipeline)
        for name, values in before.items():
            live[name].copy_(values)
    return drawn


ATTENTION_ONLY = ("*_te_*", "*to_out*", "*ff_net*", "*proj_in*", "*time_emb*", "*conv*")
NATIVE: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "locon": (8, ()),
    "loha": (8, ()),
    "loha_tucker": (12, ()),
    "lokr": (12, ()),
    "lokr_full": (11, ("*conv_in*",)),  # peft has no such factors for it
    "dora_out": (12, ()),
    "ia3": (3, ATTENTION_ONLY),  # peft's would multiply the biases of the others
    "oft_r": (7, ()),
}
"""Kinds that peft holds itself, the modules that it holds, and patterns of the others."""


@pytest.mark.parametrize("kind", NATIVE)
def test_a_folder_of_pefts_own_forms_is_applied_as_the_definition(kind, made, pipeline):
    modules, skip = NATIVE[kind]
    before, alone, expected = state(pipeline), draw(pipeline), reference(pipeline, kind_file(kind), skip=skip)
    adapter = apply(pipeline, made(kind, to="peft", skip=skip))
    assert (adapter.modules, adapter.family) == (modules, "tiny-sd15")
    assert_same(draw(pipeline), expected, alone)
    adapter.remove()
    assert state(pipeline) == before and torch.equal(draw(pipeline), alone)


def test_what_pefts_own_forms_add_can_be_scaled(made, pipeline):
    alone, expected = draw(pipeline), reference(pipeline, kind_file("loha"), scale=0.5)
    with apply(pipeline, made("loha", to="peft")) as adapter:
        adapter.set_scale(0.5)
        assert_same(draw(pipeline), expected, alone)
        adapter.set_scale(0)
        assert torch.equal(draw(pipeline), alone)


def test_a_folder_of_pefts_that_does_not_fit_leaves_the_pipeline_as_it_was(made):
    base = open_pipeline("tiny-sdxl", "cpu")
    before = state(base)
    assert names_of(errors_of(lambda: apply(base, made("loha", to="peft")))) == {"module-not-loaded"}
    with pytest.raises(UsageError, match="skip does not go with"):
        apply(base, made("loha", to="peft"), skip="*.alpha")
    assert state(base) == before and applied(base) == ()


@pytest.mark.parametrize("kind", ["loha", "oft_r"])
@pytest.mark.parametrize("native_first", [True, False])
def test_kinds_that_cannot_share_a_module_are_refused_in_a_sentence(native_first, kind, made, pipeline):
    files = [made(kind, to="peft"), kind_file("locon")]
    first, second = files if native_first else reversed(files)
    with apply(pipeline, first) as adapter:
        before = state(pipeline)
        with pytest.raises(
            UsageError, match=r"^text_encoder\.text_model\..*out_proj has an adapter of .*; remove the former first"
        ):
            apply(pipeline, second)
        assert state(pipeline) == before and applied(pipeline) == (adapter,)


@pytest.mark.parametrize("kind", ["ia3", "oft_r"])
def test_what_multiplies_has_no_strength(kind, made, pipeline):
    folder, before = made(kind, to="peft", skip=NATIVE[kind][1]), state(pipeline)
    with pytest.raises(UsageError, match="no strength: it applies with the scale 1 or not at all"):
        apply(pipeline, folder, 0.5)
    assert state(pipeline) == before and applied(pipeline) == ()
    with apply(pipeline, folder) as adapter:
        drawn = draw(pipeline)
        with pytest.raises(UsageError, match="no strength"):
            adapter.set_scale({"unet": {"mid": 1.0, "up": 0.5}})
        assert adapter.scale == 1.0 and torch.equal(draw(pipeline), drawn)


FOLDERS = {
    "model": "tiny-sd15 is a whole model, not an adapter; open it as the base model",
    "empty": "empty is a folder without an adapter in it; name the file",
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_is_no_adapter_is_refused_in_a_sentence(folder, pipeline, tmp_path):
    path = bases.folder("tiny-sd15") if folder == "model" else tmp_path / "empty"
    path.mkdir(exist_ok=True)
    with pytest.raises(UsageError, match=FOLDERS[folder]):
        apply(pipeline, path)


QUERY = "attn1.to_q"
SABOTAGE = {
    "magnitude scaled": ("dora_out", scaled(f"{QUERY}.lora_magnitude", 1.01), "its magnitude is off by 1.00e-02"),
    "magnitude dropped": ("dora_out", without(f"{QUERY}.lora_magnitude"), "gave it no values"),
    "bias scaled": ("lora_bias", scaled("attn1.to_out.0.lora_B.bias", 1.5), "its bias is off by 5.00e-01"),
    "bias dropped": ("lora_bias", without("attn1.to_out.0.lora_B.bias"), "gave it no values"),
    "factors scaled": ("dora_out", scaled(f"{QUERY}.lora_B", 1.5), "its ΔW is off by 5.00e-01"),
}


@pytest.mark.parametrize("case", SABOTAGE)
def test_what_arrives_changed_is_an_error_that_says_what(case, made, pipeline, monkeypatch):
    kind, change, message = SABOTAGE[case]
    before = state(pipeline)
    sabotaged(pipeline, monkeypatch, change)
    (finding,) = errors_of(lambda: apply(pipeline, made(kind)))
    assert finding.name == "module-not-loaded" and message in finding.message
    assert state(pipeline) == before and applied(pipeline) == ()


def test_a_failure_of_the_second_file_takes_the_first_off_again(made, pipeline, monkeypatch):
    before = state(pipeline)
    sabotaged(pipeline, monkeypatch, scaled("lora_magnitude", 1.01))
    findings = errors_of(lambda: apply(pipeline, made("partial_dora")))
    assert len(findings) == 3 and names_of(findings) == {"module-not-loaded"}
    assert state(pipeline) == before and applied(pipeline) == ()


@pytest.mark.parametrize(("options", "call"), [({}, 0), ({}, 4), ({"to": "peft"}, 4)])
def test_an_interruption_while_it_loads_leaves_nothing_behind(options, call, made, pipeline, monkeypatch):
    """Ctrl-C while it is said what is trained, which comes last."""
    folder, calls, real = made("partial_dora", **options), itertools.count(), torch.nn.Module.requires_grad_

    def interrupted(module: Any, required: bool = True) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return real(module, required)

    before = state(pipeline)
    monkeypatch.setattr(torch.nn.Module, "requires_grad_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(pipeline, folder)
    assert state(pipeline) == before and applied(pipeline) == ()


def test_a_magnitude_beside_a_bias_is_an_error(made, pipeline, tmp_path):
    """peft's DoRA takes the bias for a part of the weight."""
    path = tmp_path / PLAIN
    tensors = read_all(made("dora_out") / PLAIN)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("weight", "bias")] = np.ones(tensors[name].shape[0], np.float32)
    with open(made("dora_out") / PLAIN, "rb") as stream:
        metadata = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"]
    header = json.loads(metadata["lora_adapter_metadata"])
    header |= {key.replace("use_dora", "lora_bias"): True for key in header if key.endswith("use_dora")}
    save_file(tensors, path, metadata | {"lora_adapter_metadata": json.dumps(header)})
    assert names_of(errors_of(lambda: apply(pipeline, path))) & {"module-not-loaded", "unsupported-kind"}


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16"])
@pytest.mark.parametrize("kind", ["dora_out", "lora_bias", "loha"])
def test_halves_are_compared_as_they_are_rounded(kind, dtype):
    base = open_pipeline("tiny-sd15", "cpu", dtype)
    before = state(base)
    with apply(base, kind_file(kind)) as adapter:
        assert adapter.modules == EXACT[kind]
    assert state(base) == before


QUICK = Drawing(steps=1)
CLIMBS: Mapping[str, tuple[str, dict[str, Any], str, str]] = {
    "DoRA": ("dora_out", {}, "pass", "weight, magnitude"),
    "two files": ("partial_dora", {}, "pass", "weight, magnitude"),
    "one file by the base": ("partial_dora", {"base": "tiny-sd15"}, "pass", "weight, magnitude"),
    "biases": ("lora_bias", {}, "pass", "weight, bias"),
    "LoHa": ("loha", {}, "pass", "loha → lora"),
    "peft's LoHa": ("loha", {"to": "peft"}, "pass", "loha"),
    "peft's LoRA and DoRA": ("partial_dora", {"to": "peft"}, "pass", "weight, magnitude"),
    "peft's rotation": ("oft_r", {"to": "peft"}, "pass", "oft"),
    "a base and a rank": ("dora_in", {"base": "tiny-sd15", "rank": 24, "max_error": 0.9}, "pass", "lora+dora → lora"),
    "cut": ("lokr_full", {"max_error": 0.05}, "pass", "the same as the source, but for what was cut"),
    "too coarse to tell": ("lokr_full", {"rank": 8, "max_error": 0.99}, "skipped", "is the closest of its rank"),
}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("case", CLIMBS)
def test_the_proof_climbs_to_the_pictures_for_every_kind_of_output(case, made, tmp_path):
    kind, options, picture, said = CLIMBS[case]
    report = tmp_path / "report.html"
    result = climb(
        made(kind, **options),
        kind_file(kind),
        base="tiny-sd15",
        drawing=QUICK,
        report=report,
        family="tiny-sd15",
    )
    assert result.ok, result.findings
    statuses = {name: rung.status for name, rung in result.rungs.items()}
    assert statuses == dict.fromkeys(("structure", "numbers", "delta", "load"), "pass") | {"picture": picture}
    load = result.rungs["load"].figures
    assert load["loaded"] == load["modules"] == len(kinds.KINDS[kind].modules)
    page = html.unescape(report.read_text())
    assert said in page and "Not proved" not in page
    json.dumps(result.as_dict(), allow_nan=False)


TO_Q, TO_V = (f"unet.up_blocks.2.attentions.1.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_v"))
CONV = "unet.up_blocks.3.resnets.0.conv2"


def swapped(tensors: dict[str, Any]) -> None:
    first, second = f"{TO_Q}.lora_B.weight", f"{TO_V}.lora_B.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]


def turned(tensors: dict[str, Any]) -> None:
    """Rows and columns of the kernel exchanged."""
    tensors[f"{CONV}.lora_A.weight"] = np.ascontiguousarray(tensors[f"{CONV}.lora_A.weight"].swapaxes(2, 3))


def flattened(tensors: dict[str, Any]) -> None:
    """The kernel's positions before the channels."""
    down = tensors[f"{CONV}.lora_A.weight"]
    rank, columns, *kernel = down.shape
    other = down.reshape(rank, *kernel, columns).transpose(0, 3, 1, 2)
    tensors[f"{CONV}.lora_A.weight"] = np.ascontiguousarray(other)


def longer(tensors: dict[str, Any]) -> None:
    tensors[f"{TO_Q}.lora_magnitude_vector.weight"] *= np.float32(1.1)


def without_bias(tensors: dict[str, Any]) -> None:
    tensors[f"{CONV}.lora_B.bias"][:] = 0


SABOTAGED = {
    "a wrong magnitude": ("dora_out", longer, {TO_Q}),
    "a wrong magnitude in the second file": ("partial_dora", longer, {TO_Q}),
    "a dropped bias": ("lora_bias", without_bias, {CONV}),
    "swapped factors": ("loha", swapped, {TO_Q, TO_V}),
    "a turned kernel": ("loha", turned, {CONV}),
    "a wrong flattening": ("lokr", flattened, {CONV}),
}


@pytest.mark.parametrize("case", SABOTAGED)
def test_sabotage_is_caught_by_the_weights_and_by_the_pictures_alone(case, made, tmp_path):
    kind, change, wrong = SABOTAGED[case]
    folder = shutil.copytree(made(kind), tmp_path / "wrong")
    file = folder / (DORA if kind == "partial_dora" else PLAIN)
    with open(file, "rb") as stream:
        metadata = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)
    result = lora_convert.validate(folder, kind_file(kind), family="tiny-sd15")
    assert result.rungs["delta"].status == "fail"
    assert {finding.subject for finding in result.findings} == wrong and names_of(result.findings) == {"delta-mismatch"}
    with opened(file) as output, opened(kind_file(kind)) as source:
        found, truth = (detect(each, family="tiny-sd15") for each in (output, source))
        rung, _ = prove(folder, [(output, found)], source, truth, "tiny-sd15", QUICK)
    assert rung.status == "fail" and names_of(rung.findings) == {"picture-mismatch"}
    assert rung.figures["excess"] > 10


def test_a_dora_is_compared_at_the_scale_one(made):
    with pytest.raises(UsageError, match="compare it at 1"):
        drawing = Drawing(steps=1, scale=0.5)
        climb(made("dora_out"), kind_file("dora_out"), base="tiny-sd15", drawing=drawing, family="tiny-sd15")


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The model that a kind is merged into, once."""
    models: dict[str, Path] = {}

    def model(kind: str, **options: Any) -> Path:
        key = f"{kind} {options}"
        if key not in models:
            models[key] = tmp_path_factory.mktemp("baked") / "model"
            result = lora_convert.merge([kind_file(kind)], "tiny-sd15", models[key], family="tiny-sd15", **options)
            assert result.ok, result.findings
        return models[key]

    return model


@pytest.mark.parametrize(
    ("kind", "options"), [("ia3", {}), ("norm", {}), ("lora_bias", {"dtype": "fp32"}), ("boft", {"dtype": "bf16"})]
)
def test_a_merged_model_is_proved_by_its_weights_and_its_pictures(kind, options, baked, tmp_path):
    report = tmp_path / "report.html"
    model = baked(kind, **options)
    result = climb(model, kind_file(kind), base="tiny-sd15", drawing=QUICK, report=report, family="tiny-sd15")
    assert result.ok, result.findings
    assert {name: rung.status for name, rung in result.rungs.items()} == {"delta": "pass", "picture": "pass"}
    assert result.rungs["delta"].figures["modules"] == len(kinds.KINDS[kind].modules)
    assert result.worst_delta_error < {"fp32": 1e-6, "bf16": 2e-2}.get(options.get("dtype"), 2e-3)
    page = html.unescape(report.read_text())
    assert "The error is ‖ΔW of the merged model − ΔW of the source‖" in page


def test_a_model_merged_at_a_scale_is_proved_at_that_scale(baked, tmp_path):
    """And the report says how to do that again."""
    model, report = baked("loha", scales=[0.5]), tmp_path / "proof.html"
    half = Drawing(steps=1, scale=0.5)
    right = climb(model, kind_file("loha"), base="tiny-sd15", drawing=half, family="tiny-sd15", report=report)
    assert right.ok
    command = re.sub("<[^>]+>", "", html.unescape(report.read_text()).partition("<pre")[2].partition("</pre>")[0])
    for option in ("--family tiny-sd15", "--base tiny-sd15", "--steps 1", "--seed 0", "--scale 0.5"):
        assert f" {option} " in command
    wrong = climb(model, kind_file("loha"), base="tiny-sd15", drawing=QUICK, family="tiny-sd15")
    assert {name: rung.status for name, rung in wrong.rungs.items()} == {"delta": "fail", "picture": "skipped"}
    assert len(wrong.findings) == 8 and names_of(wrong.findings) == {"delta-mismatch"}
    assert wrong.worst_delta_error == pytest.approx(0.5, abs=0.01)


def test_a_module_that_should_have_stayed_as_it_was_is_named(baked, tmp_path):
    model = shutil.copytree(baked("loha"), tmp_path / "model")
    file = next((model / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["mid_block.resnets.0.norm1.bias"] += np.float16(0.25)
    save_file(tensors, file, {"format": "pt"})
    result = climb(model, kind_file("loha"), base="tiny-sd15", drawing=QUICK, family="tiny-sd15")
    (finding,) = result.findings
    assert (finding.name, finding.subject) == ("delta-mismatch", "unet.mid_block.resnets.0.norm1")
    assert "does not change it" in finding.message


def test_a_merged_model_alone_says_nothing(baked):
    with pytest.raises(UsageError, match="only against its source and its base model"):
        climb(baked("ia3"), kind_file("ia3"))
