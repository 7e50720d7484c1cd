"""peft's native folders in live models: by plain peft and by our loader, every module, value and scale of them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import CORPUS, FIXTURES
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")

from test_native import CORPUS_FILES, HELD, write_folders  # noqa: E402

from lora_convert.containers import open_source  # noqa: E402
from lora_convert.converters.adapters import read_adapter  # noqa: E402
from lora_convert.converters.native import CONFIG_NAME, WEIGHTS_NAME, has_bias, native_path  # noqa: E402
from lora_convert.errors import FileError, UsageError  # noqa: E402
from lora_convert.families import FAMILIES  # noqa: E402
from lora_convert.inspect.detect import detect  # noqa: E402
from lora_convert.runtime.architectures import build_component, canonical_prefix  # noqa: E402
from lora_convert.runtime.loading import LoadingError, adapters_of  # noqa: E402
from lora_convert.runtime.native import load_native, native_folders, native_parameters  # noqa: E402
from lora_convert.runtime.pipelines import live_components, open_pipeline  # noqa: E402

KINDS = FIXTURES / "tiny" / "kinds"
COPIED = ("loha", "lokr")
"""Kinds whose values peft holds as they are; others are multiplied together, and rounded to the file's dtype."""


@pytest.fixture(scope="module")
def models() -> Mapping[str, Any]:
    return dict(live_components(open_pipeline("tiny-sd15")))


@pytest.fixture
def components(models) -> Iterator[dict[str, Any]]:
    yield {name: copy.deepcopy(model) for name, model in models.items()}


@pytest.fixture
def folder(tmp_path) -> Callable[[str], Path]:
    """The folders of a file of every kind."""

    def written(name: str) -> Path:
        out = tmp_path / name
        if not out.exists():
            source = open_source(KINDS / f"{name}.safetensors")
            write_folders(source, detect(source, family="tiny-sd15").payload, out)
        return out

    return written


def modules_of(models: Mapping[str, Any]) -> dict[str, Any]:
    """The live modules by canonical name."""
    return {
        f"{name}.{canonical_prefix(model)}{path}": module
        for name, model in models.items()
        for path, module in model.named_modules()
    }


def truth(name: str, models: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """What every module of a file changes, by the trainer's definition on the live base weights."""
    source = open_source(KINDS / f"{name}.safetensors")
    live, found = modules_of(models), {}
    for module in detect(source, family="tiny-sd15").payload:
        target = module.modules[0].name
        base = {part: values.detach().numpy() for part, values in live[target].named_parameters()}
        found[target] = dict(read_adapter(source, module).deltas(base))
    return found


def relative(first: Any, second: Any) -> float:
    first, second = (np.asarray(values, np.float64) for values in (first, second))
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


def native_delta(layer: Any, name: str) -> dict[str, Any]:
    """What one adapter of a live layer changes, dense, float64, by peft's own `merge` on a copy of the layer."""
    double = copy.deepcopy(layer).double()
    base = double.get_base_layer()
    before = {part: values.detach().clone() for part, values in base.named_parameters(recurse=False)}
    with torch.no_grad():
        double.merge(adapter_names=[name])
    after = dict(base.named_parameters(recurse=False))
    deltas = {part: after[part].detach() - values for part, values in before.items()}
    return {part: delta for part, delta in deltas.items() if part == "weight" or bool(delta.any())}


def responses(layer: Any, deltas: Mapping[str, np.ndarray], base: Any) -> tuple[Any, Any]:
    """A live layer's answer to a random input, and that of the base layer with its parameters changed."""
    changed = copy.deepcopy(base)
    with torch.no_grad():
        for part, delta in deltas.items():
            changed.get_parameter(part).add_(torch.from_numpy(np.array(delta)).to(changed.weight.dtype))
        torch.manual_seed(0)
        size = (2, base.weight.shape[1], 9, 7) if base.weight.ndim == 4 else (3, base.weight.shape[1])
        given = torch.randn(size)
        return layer(given), changed(given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(HELD))
def test_what_arrives_is_what_the_trainer_trained(name, folder, components, models):
    layers = load_native(components, folder(name), "a")
    assert len(layers) == HELD[name]
    expected, bases = truth(name, models), modules_of(models)
    half = "F16" in detect(open_source(KINDS / f"{name}.safetensors"), family="tiny-sd15").dtypes
    tolerance = 5e-4 if half and not name.startswith(COPIED) else 1e-6
    for module, layer in layers.items():
        delta = native_delta(layer, "a")
        assert {part for part, values in expected[module].items() if values.any()} == delta.keys()
        for part, values in delta.items():
            assert values.dtype == torch.float64
            assert relative(values, expected[module][part]) <= tolerance, (module, part)
        answer, asked = responses(layer, delta, bases[module])
        assert relative(answer.detach(), asked) <= 2e-6, module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(HELD) - {"partial_dora"}))
def test_plain_peft_loads_it_too(name, folder, components, models):
    ours = load_native(components, folder(name), "a")
    wrapped = {
        part: peft.PeftModel.from_pretrained(copy.deepcopy(models[part]), str(path))
        for part, path in native_folders(folder(name)).items()
    }
    theirs = {
        module: layer
        for module, layer in modules_of({part: model.base_model.model for part, model in wrapped.items()}).items()
        if module in ours
    }
    assert theirs.keys() == ours.keys()
    for module, layer in ours.items():
        for suffix, values in native_parameters(layer, "a").items():
            assert torch.equal(native_parameters(theirs[module], "default")[suffix], values), (module, suffix)
        delta = native_delta(theirs[module], "default")
        assert all(torch.equal(values, delta[part]) for part, values in native_delta(layer, "a").items())


@pytest.mark.filterwarnings("ignore")
def test_the_lines_of_the_documentation_load_it_in_plain_peft(folder, components, models, monkeypatch):
    monkeypatch.chdir(folder("partial_dora").parent)
    folder("partial_dora").rename("out")
    text = (FIXTURES.parent / "docs" / "formats.md").read_text().partition("## peft's layout")[2].partition("\n## ")[0]
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    pipe = SimpleNamespace(**components)
    exec("\n".join(lines), {"pipe": pipe})
    live = modules_of({part: getattr(pipe, part).base_model.model for part in components})
    expected = truth("partial_dora", models)
    assert len(expected) == HELD["partial_dora"]
    for module, deltas in expected.items():
        layer = live[module]
        (name,) = adapters_of(layer)
        assert name in layer.active_adapters
        assert relative(native_delta(layer, name)["weight"], deltas["weight"]) <= 1e-6, module


def detach(components: Mapping[str, Any], name: str) -> None:
    """As the module's documentation says."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for model in components.values():
        for path, layer in list(model.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                layer.delete_adapter(name)
                if not adapters_of(layer):
                    parent, _, child = path.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer.base_layer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(HELD))
def test_it_comes_off_bit_for_bit(name, folder, components, models):
    load_native(components, folder(name), "a")
    detach(components, "a")
    for part, model in models.items():
        left = components[part]
        assert [n for n, _ in left.named_modules()] == [n for n, _ in model.named_modules()]
        assert [type(m) for m in left.modules()] == [type(m) for m in model.modules()]
        assert all(torch.equal(values, left.state_dict()[key]) for key, values in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_two_adapters_of_one_kind_add_and_go_one_by_one(folder, components, models):
    both = load_native(components, folder("loha"), "a")
    before = {module: native_delta(layer, "a")["weight"] for module, layer in both.items()}
    again = load_native(components, folder("loha"), "b")
    assert again.keys() == both.keys()
    detach(components, "a")
    for module, layer in again.items():
        assert adapters_of(layer) == {"b"}
        assert torch.equal(native_delta(layer, "b")["weight"], before[module])


def edited(folder: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], None], part: str = "unet") -> Path:
    tensors, config = load_file(folder / part / WEIGHTS_NAME), json.loads((folder / part / CONFIG_NAME).read_text())
    change(tensors, config)
    save_file(tensors, folder / part / WEIGHTS_NAME)
    (folder / part / CONFIG_NAME).write_text(json.dumps(config))
    return folder


def lose_a_module(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["target_modules"] = [name for name in config["target_modules"] if name != "conv_in"]


def add_a_module(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["target_modules"].append("conv_out")


def lose_a_tensor(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    del tensors["base_model.model.conv_in.hada_w1_a"]


def foreign_tensor(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    tensors["base_model.model.conv_in.hada_t1"] = np.zeros((1, 1, 3, 3), np.float32)


def wrong_shape(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    tensors["base_model.model.conv_in.hada_w1_a"] = np.zeros((3, 3), np.float32)


def overlapping_patterns(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["alpha_pattern"] = {"conv.in": 77.0, "^conv_in": 5.0}


def expression(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["target_modules"] = "(.*)*conv_in"


def expression_in_pattern(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["rank_pattern"] = {"(.*)*conv_in": 4}


def unknown_kind(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["peft_type"] = "NONSENSE"


WRONG = [
    (lose_a_module, FileError, "unet.conv_in: It is in the file, but the loader did not adapt it"),
    (add_a_module, FileError, "unet.conv_out: The loader adapted it, but it is not in the file"),
    (lose_a_tensor, FileError, "unet.conv_in: Its hada_w1_a is in the loaded layer, but not in the file"),
    (foreign_tensor, FileError, "unet.conv_in: Its hada_t1 is in the file, but not in the loaded layer"),
    (wrong_shape, LoadingError, "size mismatch"),
    (overlapping_patterns, FileError, "unet.conv_in: Its scale is"),
    (expression, FileError, "unreadable-config: unet: Its target_modules has"),
    (expression_in_pattern, FileError, "unreadable-config: unet: Its rank_pattern has"),
    (unknown_kind, FileError, "unreadable: unet: It cannot be read"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "error", "said"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_what_did_not_arrive_is_said(change, error, said, folder, components):
    with pytest.raises(error, match=said):
        load_native(components, edited(folder("loha"), change), "a")


def test_folders_without_adapters_and_without_their_component_are_refused(folder, components, tmp_path):
    with pytest.raises(UsageError, match="has no folder with"):
        load_native(components, tmp_path, "a")
    with pytest.raises(FileError, match="the pipeline has no text_encoder"):
        load_native({"unet": components["unet"]}, folder("loha"), "a")


def test_damaged_weights_are_a_finding(folder, components):
    (folder("loha") / "unet" / WEIGHTS_NAME).write_bytes(b"\xff" * 100)
    with pytest.raises(FileError, match="unreadable: unet"):
        load_native(components, folder("loha"), "a")


@pytest.mark.filterwarnings("ignore")
def test_values_beyond_the_models_precision_are_a_finding(folder, components):
    def grow(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        key = "base_model.model.conv_in.hada_w1_a"
        tensors[key] = tensors[key].astype(np.float32) * 0 + 1e6

    grown = edited(folder("loha"), grow)
    assert load_native({name: copy.deepcopy(model) for name, model in components.items()}, grown, "a")
    with pytest.raises(FileError, match=r"overflow: unet.conv_in: Values of its hada_w1_a do not fit .* float16"):
        load_native({name: model.half() for name, model in components.items()}, grown, "a")


@pytest.mark.filterwarnings("ignore")
def test_halves_are_rounded_as_the_model_is(folder, components):
    layers = load_native({name: model.bfloat16() for name, model in components.items()}, folder("lokr_full"), "a")
    for layer in layers.values():
        assert {values.dtype for values in native_parameters(layer, "a").values()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore")
def test_a_second_kind_on_one_module_is_refused(folder, components):
    load_native(components, folder("loha"), "a")
    with pytest.raises(UsageError, match="has an adapter of peft's kind LOHA, beside which one of the kind LOKR"):
        load_native(components, folder("lokr"), "b")


@pytest.mark.filterwarnings("ignore")
def test_kinds_mix_on_different_modules(folder, components, models, tmp_path):
    shutil.copytree(folder("ia3") / "unet", tmp_path / "mixed" / "unet-2")
    source = open_source(KINDS / "lokr.safetensors")
    taken = {
        f"unet.{name}" for name in json.loads((folder("ia3") / "unet" / CONFIG_NAME).read_text())["target_modules"]
    }
    payload = detect(source, family="tiny-sd15").payload
    write_folders(source, [module for module in payload if module.modules[0].name not in taken], tmp_path / "mixed")
    layers = load_native(components, tmp_path / "mixed", "a")
    kinds = {"ia3": truth("ia3", models), "lokr": truth("lokr", models)}
    counts = dict.fromkeys(kinds, 0)
    for module, layer in layers.items():
        kind = type(layer).__module__.split(".")[2]
        counts[kind] += 1
        assert (kind == "ia3") == (module in taken)
        assert relative(native_delta(layer, "a")["weight"], kinds[kind][module]["weight"]) <= 1e-6
    assert counts["ia3"] == HELD["ia3"]
    assert counts["lokr"] == len({module.modules[0].name for module in payload} - taken) > 0
    detach(components, "a")
    assert not any(adapters_of(layer) for layer in modules_of(components).values() if hasattr(layer, "base_layer"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spelt", ["base_model.model.text_model.", "base_model.model."])
def test_text_encoders_load_with_and_without_text_model(spelt, folder, components):
    def respell(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        for key in list(tensors):
            tensors[key.replace("base_model.model.", spelt)] = tensors.pop(key)

    layers = load_native(components, edited(folder("loha"), respell, "text_encoder"), "a")
    assert sum(module.startswith("text_encoder.text_model.") for module in layers) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_live_models_are_as_the_tables_of_paths_and_biases_say(family):
    for component in FAMILIES[family].components:
        live = dict(build_component(family, component.name).named_modules())
        for module in component.modules.values():
            layer = live[native_path(module)]
            if len(module.shape) > 1 and module.mark != "embedding":
                assert (layer.bias is not None) == has_bias(module), module.name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.corpus
@pytest.mark.skipif(not CORPUS.is_dir(), reason="the shared corpus is not beside this checkout")
@pytest.mark.parametrize("name", CORPUS_FILES)
def test_peft_builds_the_shapes_of_real_files_on_real_architectures(name, tmp_path):
    source = open_source(CORPUS / "lora" / f"{name}.safetensors")
    found = detect(source)
    write_folders(source, found.payload, tmp_path)
    number = 0
    for part, path in native_folders(tmp_path).items():
        model = build_component(found.family, part.partition("-")[0])
        peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(str(path)), model, "a", low_cpu_mem_usage=True)
        state = peft.get_peft_model_state_dict(model, adapter_name="a", save_embedding_layers=False)
        built = {f"base_model.model.{key}": tuple(values.shape) for key, values in state.items()}
        stored = {key: tensor.shape for key, tensor in open_source(path / WEIGHTS_NAME).header.tensors.items()}
        assert built == stored
        ends = (".lora_A.weight", ".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".ia3_l", ".oft_R.weight")
        number += sum(key.endswith(ends) for key in stored)
    assert number == CORPUS_FILES[name]
