"""Adapters on a live pipeline: what arrives, how strongly it applies, and what is left when it goes."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from safetensors.numpy import load_file, save_file  # noqa: E402

import lora_convert  # noqa: E402
from lora_convert.errors import FileError, UsageError  # noqa: E402
from lora_convert.families import FAMILIES  # noqa: E402
from lora_convert.runtime.applying import Applied, applied, apply  # noqa: E402
from lora_convert.runtime.pipelines import live_components, open_pipeline  # noqa: E402
from lora_convert.runtime.scaling import scales_by_module  # noqa: E402

ATTENTION = "attentions.0.transformer_blocks.0"
PLACES = (
    "unet.conv_in",
    "unet.time_embedding.linear_1",
    f"unet.down_blocks.0.{ATTENTION}.attn2.to_k",
    "unet.down_blocks.0.resnets.1.conv1",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.down_blocks.1.attentions.1.proj_in",
    "unet.mid_block.resnets.1.conv2",
    f"unet.mid_block.{ATTENTION}.ff.net.0.proj",
    "unet.up_blocks.0.resnets.0.conv_shortcut",
    "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0",
    "unet.up_blocks.1.resnets.1.time_emb_proj",
    "unet.up_blocks.1.upsamplers.0.conv",
    "unet.conv_out",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.1.mlp.fc2",
)
"""Modules of tiny-sd15 in every kind of place."""

Factors = Mapping[str, tuple[np.ndarray, np.ndarray, float]]
"""Module: A, B, alpha."""


def adapted_by(family: str) -> list[str]:
    """All modules of a family that a LoRA can adapt."""
    modules = FAMILIES[family].modules
    return [name for name, module in modules.items() if len(module.shape) > 1 and module.mark != "embedding"]


def factors(family: str, names: Any, seed: int = 0, dtype: type = np.float32, strength: float = 0.5) -> Factors:
    """Random factors whose ranks and alphas differ from module to module."""
    random = np.random.default_rng(seed)
    made = {}
    for number, name in enumerate(names):
        out, width, *kernel = FAMILIES[family].modules[name].shape
        rank, alpha = 2 + number % 3, float(1 + number % 4)
        down = random.standard_normal((rank, width, *kernel)) / math.sqrt(width * math.prod(kernel))
        up = random.standard_normal((out, rank, *(1 for _ in kernel))) * strength / math.sqrt(rank)
        made[name] = down.astype(dtype), up.astype(dtype), alpha
    return made


def write_kohya(path: Path, family: str, made: Factors) -> Path:
    """A file in Kohya's layout, with the Diffusers names that sd-scripts gives an SD 1.x UNet."""
    prefixes = {component.name: component.kohya_prefix for component in FAMILIES[family].components}
    tensors = {}
    for name, (down, up, alpha) in made.items():
        component, _, module = name.partition(".")
        stem = prefixes[component] + module.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = np.array(alpha, down.dtype)
    save_file(tensors, path)
    return path


def write_canonical(path: Path, made: Factors, only: Callable[[str], bool] = lambda name: True) -> Path:
    """A file in the Diffusers layout, with every rank and alpha in the header."""
    tensors: dict[str, np.ndarray] = {}
    header: dict[str, Any] = {}
    for name, (down, up, alpha) in made.items():
        if only(name):
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        component, _, module = name.partition(".")
        plain = module.removeprefix("text_model.")
        pattern = f"^{plain}" if component == "unet" else plain
        header.setdefault(f"{component}.r", 1)
        header.setdefault(f"{component}.lora_alpha", 1.0)
        header.setdefault(f"{component}.rank_pattern", {})[pattern] = down.shape[0]
        header.setdefault(f"{component}.alpha_pattern", {})[pattern] = alpha
        header.setdefault(f"{component}.target_modules", []).append(plain)
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    return path


def delta(made: Factors, name: str) -> np.ndarray:
    down, up, alpha = made[name]
    rank = down.shape[0]
    product = up.astype(np.float64).reshape(-1, rank) @ down.astype(np.float64).reshape(rank, -1)
    return alpha / rank * product


def live_deltas(pipeline: Any, adapter: str) -> dict[str, np.ndarray]:
    """ΔW that each live layer adds for an adapter, by canonical name, in peft's own arithmetic but in float64."""
    found = {}
    for component, model in live_components(pipeline).items():
        for path, layer in model.named_modules():
            if hasattr(layer, "lora_A") and adapter in layer.lora_A:
                down, up = (part[adapter].weight.double().flatten(1) for part in (layer.lora_A, layer.lora_B))
                prefix = "text_model." if component == "text_encoder" and not path.startswith("text_model") else ""
                found[f"{component}.{prefix}{path}"] = (layer.scaling[adapter] * (up @ down)).detach().numpy()
    return found


def state(pipeline: Any) -> str:
    """Everything about the components that loading could change."""
    digest = hashlib.sha256()
    for component, model in live_components(pipeline).items():
        for name, tensor in model.state_dict().items():
            content = tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()
            digest.update(f"{component}.{name} {tensor.dtype}".encode() + content)
        told = [(path, type(module).__name__, module.training) for path, module in model.named_modules()]
        told += [(name, weight.requires_grad) for name, weight in model.named_parameters()]
        digest.update(repr((told, sorted(vars(model)))).encode())
    return digest.hexdigest()


def draw(pipeline: Any, steps: int = 1) -> Any:
    """Latents."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": steps, "height": 64, "width": 64, "output_type": "latent"}
    return pipeline("a red circle", generator=generator, **options).images.float()


@pytest.fixture(scope="module")
def opened_base() -> Any:
    return open_pipeline("tiny-sd15", "cpu")


@pytest.fixture
def pipeline(opened_base: Any) -> Iterator[Any]:
    """The base model; whatever a test does, it must leave it as it was."""
    before = state(opened_base)
    yield opened_base
    for adapter in applied(opened_base):
        adapter.remove()
    assert state(opened_base) == before


@pytest.fixture(scope="module")
def made() -> Factors:
    return factors("tiny-sd15", PLACES)


@pytest.fixture
def file(tmp_path: Path, made: Factors) -> Path:
    return write_canonical(tmp_path / "style.safetensors", made)


def errors_of(call: Callable[[], object]) -> Any:
    with pytest.raises(FileError) as raised:
        call()
    return raised.value.findings


@pytest.mark.parametrize("layout", ["canonical", "kohya"])
@pytest.mark.parametrize("family", ["tiny-sd15", "tiny-sdxl"])
def test_every_module_arrives_with_its_change(family, layout, tmp_path):
    base = open_pipeline(family, "cpu")
    step = {"tiny-sd15": 7, "tiny-sdxl": 40}[family]
    whole = factors(family, adapted_by(family)[::step])
    path = tmp_path / "style.safetensors"
    path = write_canonical(path, whole) if layout == "canonical" else write_kohya(path, family, whole)
    before = state(base)
    with apply(base, path) as adapter:
        assert (adapter.modules, adapter.file, adapter.family, adapter.scale) == (len(whole), path.name, family, 1.0)
        assert adapter.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert adapter.warnings == ()
        found = live_deltas(base, adapter.name)
        assert found.keys() == whole.keys()
        for name in whole:
            expected = delta(whole, name)
            assert np.linalg.norm(found[name] - expected) <= 1e-6 * np.linalg.norm(expected), name
        assert not any(
            weight.requires_grad for model in live_components(base).values() for weight in model.parameters()
        )
        assert not any(module.training for model in live_components(base).values() for module in model.modules())
    assert state(base) == before


BLOCKS = {"down": 0.9, "mid": 0.7, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1.5]}}
SCALES = {
    "number": (0.5, dict.fromkeys(PLACES, 0.5)),
    "zero": (0, dict.fromkeys(PLACES, 0.0)),
    "negative": (-2.0, dict.fromkeys(PLACES, -2.0)),
    "nothing named": ({}, dict.fromkeys(PLACES, 1.0)),
    "components": (
        {"unet": 0.25, "text_encoder": 0.5},
        {name: 0.25 if name.startswith("unet") else 0.5 for name in PLACES},
    ),
    "one component": ({"text_encoder": 0.5}, {name: 1.0 if name.startswith("unet") else 0.5 for name in PLACES}),
    "blocks": (
        {"unet": BLOCKS, "text_encoder": 0.5},
        dict(zip(PLACES, (1, 1, 0.9, 0.9, 0.9, 0.9, 0.7, 0.7, 0.6, 1.5, 0.8, 1.5, 1, 0.5, 0.5), strict=True)),
    ),
    "layers": (
        {"unet": {"down": {"block_0": (0.1, 0.2), "block_1": [0.3, 0]}, "mid": [0.7], "other": 0.05}},
        dict(zip(PLACES, (0.05, 0.05, 0.1, 0.2, 0.2, 0, 0.7, 0.7, 1, 1, 1, 1, 0.05, 1, 1), strict=True)),
    ),
    "numpy's numbers": ({"unet": np.float32(0.5)}, {name: 0.5 if name[0] == "u" else 1.0 for name in PLACES}),
}


def test_scales_apply_to_every_module_of_a_component_block_and_layer(pipeline, file, made):
    """One adapter, scaled anew: what a scale leaves must not depend on the one before."""
    adapter = apply(pipeline, file, 0.0)
    assert not any(found.any() for found in live_deltas(pipeline, adapter.name).values())
    for case, (scale, expected) in SCALES.items():
        adapter.set_scale(scale)
        assert json.loads(json.dumps(adapter.scale)) == adapter.scale, case
        found = live_deltas(pipeline, adapter.name)
        for name in PLACES:
            error = np.linalg.norm(found[name] - expected[name] * delta(made, name))
            assert error <= 1e-6 * np.linalg.norm(delta(made, name)), (case, name)


WRONG_SCALES = {
    "nan": (math.nan, "scale must be a finite number; it is nan"),
    "infinite": ({"unet": {"mid": math.inf}}, "unet.mid must be a finite number"),
    "text": ("1", "scale must be a finite number; it is '1'"),
    "truth": (True, "scale must be a finite number; it is True"),
    "none": (None, "scale must be a finite number; it is None"),
    "unknown component": ({"down": 0.5}, "scale has no 'down'; it has unet, text_encoder$"),
    "component of another family": ({"text_encoder_2": 0.5}, "scale has no 'text_encoder_2'"),
    "unknown part": ({"unet": {"middle": 1}}, "unet has no 'middle'; it has down, mid, up, other"),
    "unknown block": (
        {"unet": {"up": {"block_9": 1}}},
        "unet.up has no 'block_9'; it has block_0, block_1, block_2",
    ),
    "wrong length": ({"unet": {"up": {"block_1": [1, 2]}}}, "unet.up.block_1 has 2 numbers; the block has 3 layers"),
    "text in a list": ({"unet": {"up": {"block_1": [1, 2, "x"]}}}, r"unet.up.block_1\[2\] must be a finite number"),
    "a list of blocks": ({"unet": {"down": [1, 1, 1, 1]}}, "unet.down must be a finite number"),
    "blocks of a text encoder": ({"text_encoder": {"down": 1}}, "text_encoder must be a finite number"),
    "a hostile key": ({"\x1b[31m": 1}, r"scale has no '\\x1b\[31m'"),
}


@pytest.mark.parametrize("case", WRONG_SCALES)
def test_a_wrong_scale_is_named_and_changes_nothing(case, pipeline, file):
    scale, message = WRONG_SCALES[case]
    before = state(pipeline)
    with pytest.raises(UsageError, match=message):
        apply(pipeline, file, scale)
    assert state(pipeline) == before and applied(pipeline) == ()


def test_a_wrong_scale_leaves_the_one_before(pipeline, file):
    adapter = apply(pipeline, file, 0.5)
    before = state(pipeline), adapter.scale
    with pytest.raises(UsageError):
        adapter.set_scale({"unet": {"down": 0.1, "up": math.nan}})
    assert (state(pipeline), adapter.scale) == before


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "sdxl-refiner"])
def test_scales_of_attention_are_those_of_diffusers(family):
    """Where diffusers 0.42 scales right, in attention, ours mean the same."""
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    from lora_convert.runtime.architectures import build_component

    unet = build_component(family, "unet")
    layers = {"down": unet.config.layers_per_block, "up": unet.config.layers_per_block + 1}
    scale: dict[str, Any] = {"mid": 0.7}
    for part, blocks in (("down", unet.down_blocks), ("up", unet.up_blocks)):
        with_attention = [number for number, block in enumerate(blocks) if getattr(block, "attentions", None)]
        scale[part] = {f"block_{n}": [0.1 * n + 0.3 * layer for layer in range(layers[part])] for n in with_attention}
    (theirs,) = _maybe_expand_lora_scales(unet, [copy.deepcopy(scale)])
    ours = scales_by_module({"unet": scale}, family)
    attention = {name: value for name, value in ours.items() if name.startswith("unet.") and ".attentions." in name}
    assert len(attention) > 100
    for name, value in attention.items():
        key = name.removeprefix("unet.").partition(".transformer_blocks")[0].removesuffix(".proj_in")
        key = key.removesuffix(".proj_out").removesuffix(".norm")
        assert value == pytest.approx(theirs[key]), name


def test_pictures_are_those_of_merged_weights(pipeline, file, made):
    scale = SCALES["blocks"]
    merged = copy.deepcopy(pipeline)
    base = draw(pipeline)
    for name, factor in scale[1].items():
        component, _, module = name.partition(".")
        model = live_components(merged)[component]
        module = module if hasattr(model, "text_model") or component == "unet" else module.removeprefix("text_model.")
        weight = model.get_submodule(module).weight
        weight.data += torch.from_numpy(factor * delta(made, name)).float().reshape(weight.shape)
    expected = draw(merged)
    with apply(pipeline, file, scale[0]):
        found = draw(pipeline)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (expected - base).norm() > 1e-3 * base.norm()
    assert torch.equal(draw(pipeline), base)


def test_removing_restores_every_bit(pipeline, file):
    before, picture = state(pipeline), draw(pipeline)
    adapter = apply(pipeline, file)
    assert not torch.equal(draw(pipeline), picture)
    adapter.set_scale(0)
    assert torch.equal(draw(pipeline), picture)
    adapter.remove()
    assert state(pipeline) == before and applied(pipeline) == ()
    assert torch.equal(draw(pipeline), picture)
    adapter.remove()
    assert state(pipeline) == before
    with pytest.raises(UsageError, match="has been removed"):
        adapter.set_scale(1.0)


def test_several_adapters_are_active_together_each_with_its_scale(pipeline, file, made, tmp_path):
    half = factors("tiny-sd15", [*PLACES[:6], "unet.down_blocks.2.resnets.0.conv2"], seed=1)
    first = apply(pipeline, file, 0.5)
    alone, alone_picture = state(pipeline), draw(pipeline)
    second = apply(pipeline, write_kohya(tmp_path / "other.safetensors", "tiny-sd15", half), {"unet": {"down": 0.25}})
    assert applied(pipeline) == (first, second)
    assert [adapter.name for adapter in applied(pipeline)] == ["adapter_0", "adapter_1"]
    for model in live_components(pipeline).values():
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                assert [name for name in layer.active_adapters if name in layer.lora_A] == list(layer.lora_A)
    deltas = live_deltas(pipeline, first.name), live_deltas(pipeline, second.name)
    assert np.allclose(deltas[0][PLACES[0]], 0.5 * delta(made, PLACES[0]), atol=1e-6)
    assert np.allclose(deltas[1][PLACES[2]], 0.25 * delta(half, PLACES[2]), atol=1e-6)
    assert not torch.equal(draw(pipeline), alone_picture)
    second.remove()
    assert state(pipeline) == alone and torch.equal(draw(pipeline), alone_picture)
    first.remove()


def test_the_first_of_two_can_go_first(pipeline, file, tmp_path):
    other = write_canonical(tmp_path / "other.safetensors", factors("tiny-sd15", PLACES[4:9], seed=1))
    with apply(pipeline, other, 0.3):
        alone_picture = draw(pipeline)
    before = state(pipeline)
    first = apply(pipeline, file)
    second = apply(pipeline, other, 0.3)
    first.remove()
    assert applied(pipeline) == (second,)
    assert live_deltas(pipeline, second.name).keys() == set(PLACES[4:9])
    assert torch.equal(draw(pipeline), alone_picture)
    third = apply(pipeline, file)
    assert third.name == "adapter_0"
    third.remove()
    assert torch.equal(draw(pipeline), alone_picture)
    second.remove()
    assert state(pipeline) == before


def test_adapters_of_the_users_own_stay_active_and_unchanged(pipeline, file, tmp_path):
    own = write_canonical(tmp_path / "own.safetensors", factors("tiny-sd15", PLACES[2:14], seed=2))
    pipeline.load_lora_weights(str(own), adapter_name="own", local_files_only=True)
    pipeline.set_adapters(["own"], [0.4])
    with_own, picture = state(pipeline), draw(pipeline)
    adapter = apply(pipeline, file, 0.0)
    assert applied(pipeline) == (adapter,)
    assert torch.equal(draw(pipeline), picture)
    adapter.remove()
    assert state(pipeline) == with_own and torch.equal(draw(pipeline), picture)
    pipeline.unload_lora_weights()
    for model in live_components(pipeline).values():
        vars(model).pop("_hf_peft_config_loaded", None)  # diffusers leaves None instead of nothing


Change = Callable[[dict[str, Any]], dict[str, Any]]


def sabotaged(pipeline: Any, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Let the pipeline's loader read another file than it is told to."""
    loader = pipeline.load_lora_weights

    def load(path: str, **options: Any) -> None:
        tensors, other = load_file(path), Path(path).with_suffix(".changed")
        with open(path, "rb") as stream:
            metadata = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"]
        save_file(change(tensors), other, metadata)
        loader(str(other), **options)

    monkeypatch.setitem(vars(pipeline), "load_lora_weights", load)


def without(part: str) -> Change:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def scaled(part: str, factor: float) -> Change:
    return lambda tensors: {name: value * np.float32(factor if part in name else 1) for name, value in tensors.items()}


SABOTAGE = {
    "one module dropped": (without("attn2.to_k"), [PLACES[2]], "did not adapt|gave it no values"),
    "a part dropped": (without("text_encoder"), list(PLACES[13:]), "the loader did not adapt it"),
    "a convolution scaled": (scaled("mid_block.resnets.1.conv2.lora_B", 1.5), [PLACES[6]], "off by 5.00e-01"),
    "a sign flipped": (scaled("conv_out.lora_A", -1), [PLACES[12]], "off by 2.00e[+]00"),
    "a little wrong": (scaled("q_proj.lora_B", 1.0001), [PLACES[13]], "off by 1.0.e-04"),
}


@pytest.mark.parametrize("case", SABOTAGE)
def test_a_module_that_did_not_arrive_is_an_error(case, pipeline, file, monkeypatch):
    change, modules, message = SABOTAGE[case]
    before = state(pipeline)
    sabotaged(pipeline, monkeypatch, change)
    findings = errors_of(lambda: apply(pipeline, file))
    assert {finding.name for finding in findings} == {"module-not-loaded"}
    assert sorted(finding.subject for finding in findings) == sorted(modules)
    assert all(re.search(message, finding.message) for finding in findings)
    assert state(pipeline) == before and applied(pipeline) == ()


@pytest.mark.parametrize("when", ["before", "halfway", "after"])
def test_a_loader_that_raises_leaves_nothing(when, pipeline, file, monkeypatch):
    before = state(pipeline)
    loader = pipeline.load_lora_weights

    def load(path: str, **options: Any) -> None:
        if when == "halfway":
            tensors = load_file(path)
            tensors[f"{PLACES[12]}.lora_A.weight"] = np.zeros((2, 7, 3, 3), np.float32)
            save_file(tensors, path + ".bad")
            loader(path + ".bad", **options)
        if when == "after":
            loader(path, **options)
        raise RuntimeError("no\nmore")

    monkeypatch.setitem(vars(pipeline), "load_lora_weights", load)
    (finding,) = errors_of(lambda: apply(pipeline, file))
    assert (finding.name, finding.subject) == ("module-not-loaded", "")
    assert "size mismatch" in finding.message if when == "halfway" else "RuntimeError: no more" in finding.message
    assert state(pipeline) == before and applied(pipeline) == ()


def test_a_failure_beside_another_adapter_leaves_that_one(pipeline, file, monkeypatch, tmp_path):
    other = write_canonical(tmp_path / "other.safetensors", factors("tiny-sd15", PLACES[3:9], seed=1))
    first = apply(pipeline, other, 0.3)
    before = state(pipeline)
    sabotaged(pipeline, monkeypatch, without("attn2.to_k"))
    errors_of(lambda: apply(pipeline, file))
    assert state(pipeline) == before and applied(pipeline) == (first,)
    assert all(
        layer.active_adapters == [first.name]
        for model in live_components(pipeline).values()
        for layer in model.modules()
        if hasattr(layer, "lora_A")
    )


def test_a_component_that_the_pipeline_lacks_is_named(pipeline, file, monkeypatch):
    monkeypatch.setitem(vars(pipeline), "text_encoder", None)
    findings = errors_of(lambda: apply(pipeline, file))
    assert {finding.subject for finding in findings} == set(PLACES[13:])
    assert all("the pipeline has no text_encoder" in finding.message for finding in findings)
    monkeypatch.undo()


def test_another_family_is_an_error_that_says_both(pipeline, tmp_path, made):
    path = tmp_path / "xl.safetensors"
    write_kohya(path, "tiny-sdxl", factors("tiny-sdxl", adapted_by("tiny-sdxl")[::90]))
    message = (
        r"^xl\.safetensors is for the embedded tiny Stable Diffusion XL \(tiny-sdxl\), and the base model is the "
        r"embedded tiny Stable Diffusion 1\.5 \(tiny-sd15\); open a base model of the family tiny-sdxl$"
    )
    with pytest.raises(UsageError, match=message):
        apply(pipeline, path)
    with pytest.raises(UsageError, match=r"\(sd15\), and the base model is .*\(tiny-sd15\)"):
        apply(pipeline, write_kohya(path, "tiny-sd15", made), family="sd15")


def test_the_base_decides_where_the_file_fits_several_families(pipeline, tmp_path):
    """The text encoder of tiny-sd15 is as wide as the second one of tiny-sdxl, and Kohya's names are alike."""
    made = factors("tiny-sd15", PLACES[13:])
    path = write_kohya(tmp_path / "text.safetensors", "tiny-sd15", made)
    assert lora_convert.identify(path).family is None
    with apply(pipeline, path) as adapter:
        assert (adapter.family, adapter.modules) == ("tiny-sd15", 2)


def test_what_cannot_be_converted_cannot_be_applied(pipeline, tmp_path):
    name = "lora_unet_" + PLACES[2].removeprefix("unet.").replace(".", "_")
    whole = {f"{name}.lokr_w1": np.eye(4, dtype=np.float32), f"{name}.lokr_w2": np.ones((8, 16), np.float32)}
    save_file(whole, tmp_path / "lokr.safetensors")
    (finding,) = errors_of(lambda: apply(pipeline, tmp_path / "lokr.safetensors"))
    assert finding.name == "rank-needed" and "LoKr" in finding.message
    assert errors_of(lambda: apply(pipeline, tmp_path / "absent.safetensors"))[0].name == "unreadable"
    (tmp_path / "page.safetensors").write_text("<html>")
    assert errors_of(lambda: apply(pipeline, str(tmp_path / "page.safetensors")))[0].name == "not-weights"


def test_options_of_reading_are_those_of_convert(pipeline, file):
    save_file(load_file(file) | {"stray": np.ones(3, np.float32)}, file)
    assert errors_of(lambda: apply(pipeline, file))[0].name == "unexplained-tensor"
    with apply(pipeline, file, skip=("stray", "text_encoder.*")) as adapter:
        assert adapter.modules == 13
        assert "skipped" in {finding.name for finding in adapter.findings}
    with pytest.raises(UsageError, match="no option 'steps'"):
        apply(pipeline, file, steps=3)


@pytest.mark.parametrize("spelling", ["bfloat16", "fp16"])
@pytest.mark.parametrize("source", ["F32", "F16"])
def test_halves_are_compared_as_they_are_rounded(spelling, source, tmp_path, made):
    base = open_pipeline("tiny-sd15", "cpu", spelling)
    before = state(base)
    stored = factors("tiny-sd15", PLACES[2:14:3], dtype={"F32": np.float32, "F16": np.float16}[source])
    with apply(base, write_kohya(tmp_path / "half.safetensors", "tiny-sd15", stored), 0.5) as adapter:
        dtype = {"bfloat16": torch.bfloat16, "fp16": torch.float16}[spelling]
        for component, model in live_components(base).items():
            assert {weight.dtype for weight in model.parameters()} == {dtype}, component
        for name, found in live_deltas(base, adapter.name).items():
            expected = 0.5 * delta(stored, name)
            assert np.linalg.norm(found - expected) <= 0.01 * np.linalg.norm(expected), name
    assert state(base) == before


def test_values_that_do_not_fit_the_pipeline_are_an_error(tmp_path):
    base = open_pipeline("tiny-sd15", "cpu", "fp16")
    before = state(base)
    stored = dict(factors("tiny-sd15", PLACES[2:5]))
    down, up, alpha = stored[PLACES[2]]
    path = tmp_path / "large.safetensors"
    write_canonical(path, stored | {PLACES[2]: (down * 1e6, up / 1e6, alpha)})
    (finding,) = errors_of(lambda: apply(base, path))
    assert (finding.name, finding.subject) == ("overflow", PLACES[2]) and "float16" in finding.message
    assert state(base) == before
    write_canonical(path, stored | {PLACES[2]: (down * 1e-9, up * 1e3, alpha)})
    with apply(base, path) as adapter:
        assert [(finding.name, finding.subject) for finding in adapter.findings] == [("underflow", PLACES[2])]


def test_a_deep_copy_has_adapters_of_its_own(pipeline, file):
    with apply(pipeline, file) as adapter:
        other = copy.deepcopy(pipeline)
        (twin,) = applied(other)
        assert twin is not adapter
        twin.remove()
        assert applied(other) == () and applied(pipeline) == (adapter,)
        assert live_deltas(pipeline, adapter.name)
    assert state(other) == state(pipeline)


def test_adapters_that_the_user_unloads_are_gone(pipeline, file):
    adapter = apply(pipeline, file)
    pipeline.unload_lora_weights()
    assert applied(pipeline) == ()
    with pytest.raises(UsageError, match="has been removed"):
        adapter.set_scale(0.5)
    adapter.remove()
    for model in live_components(pipeline).values():
        vars(model).pop("_hf_peft_config_loaded", None)


def test_fused_adapters_are_refused(opened_base, file):
    base = copy.deepcopy(opened_base)
    apply(base, file)
    base.fuse_lora(components=["unet"])
    with pytest.raises(UsageError, match="fused"):
        apply(base, file)


def test_training_state_and_random_numbers_are_left_alone(opened_base, file):
    base = copy.deepcopy(opened_base)
    base.unet.train().requires_grad_(True)
    base.text_encoder.train()
    before, random = state(base), torch.get_rng_state()
    apply(base, file).remove()
    assert state(base) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_dropout_in_the_header_does_not_drop_anything(pipeline, file):
    """A header may carry peft's training settings."""
    with open(file, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"]
    config = json.loads(header["lora_adapter_metadata"]) | {"unet.lora_dropout": 0.9}
    save_file(load_file(file), file, header | {"lora_adapter_metadata": json.dumps(config)})
    with apply(pipeline, file):
        assert torch.equal(draw(pipeline), draw(pipeline))


def test_the_loader_is_quiet_and_its_warnings_are_kept(pipeline, file, capsys, monkeypatch):
    import logging

    loader = pipeline.load_lora_weights

    def load(path: str, **options: Any) -> None:
        logging.getLogger("diffusers.loaders").warning("odd, twice")
        logging.getLogger("diffusers.loaders").warning("odd, twice")
        loader(path, **options)

    monkeypatch.setitem(vars(pipeline), "load_lora_weights", load)
    with apply(pipeline, file) as adapter:
        assert adapter.warnings == ("odd, twice",)
    assert capsys.readouterr() == ("", "")


def test_an_adapter_says_what_it_is(pipeline, file):
    with apply(pipeline, str(file), {"unet": 0.5}) as adapter:
        assert isinstance(adapter, Applied)
        assert repr(adapter) == "<adapter_0: style.safetensors, 15 modules, scale {'unet': 0.5}>"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_on_cuda_too(dtype, file, made):
    base = open_pipeline("tiny-sd15", "cuda", dtype)
    before, picture = state(base), draw(base)
    with apply(base, file, 0.5) as adapter:
        assert adapter.modules == len(PLACES)
        assert not torch.equal(draw(base), picture)
    assert state(base) == before and torch.equal(draw(base), picture)
