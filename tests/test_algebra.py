"""Every algorithm's ΔW: against LyCORIS' forward on unit inputs, peft's layers, and files of all trainers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import CORPUS, manifest, names_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from lora_convert.containers.source import Source, open_source
from lora_convert.converters.adapters import (
    ALGORITHMS,
    DORA,
    KINDS,
    Adapter,
    Dora,
    Form,
    Lora,
    Oft,
    Stored,
    Sum,
    form_of,
    read_adapter,
)
from lora_convert.converters.algorithms import lora as lora_algorithm
from lora_convert.converters.algorithms.lora import dense_product
from lora_convert.errors import BaseNeeded, Unrepresentable
from lora_convert.families import FAMILIES, Module
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import AdaptedModule
from lora_convert.inspect.shapes import fits

torch = pytest.importorskip("torch")
pytest.importorskip("lycoris")

FAMILY = "tiny-sd15"
LINEAR = [(32, 32), (64, 128), (256, 64), (64, 256)]
POINTS = [(32, 64, 1, 1), (64, 64, 1, 1)]
KERNELS = [(32, 4, 3, 3), (4, 32, 3, 3), (32, 64, 3, 3)]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def target(shape: tuple[int, ...]) -> Module:
    """The first module of the family with that shape."""
    return next(module for module in FAMILIES[FAMILY].modules.values() if module.shape == shape and not module.mark)


def part_of(module: Module) -> str:
    return f"{'lora_unet' if module.component == 'unet' else 'lora_te'}_{module.path.replace('.', '_')}"


def layer_of(shape: tuple[int, ...], random: torch.Generator) -> torch.nn.Module:
    """A layer with a bias and weights of an ordinary size."""
    layer = torch.nn.Conv2d(shape[1], shape[0], shape[2:]) if len(shape) == 4 else torch.nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape, generator=random) / layer.weight[0].numel() ** 0.5)
        layer.bias.copy_(0.1 * torch.randn(shape[0], generator=random))
    return layer


def responses(layer: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias that a layer acts as, from its answers to unit inputs and to zero."""
    columns = int(np.prod(shape[1:]))
    inputs = torch.eye(columns).reshape(columns, *shape[1:])
    with torch.no_grad():
        bias = layer(torch.zeros_like(inputs[:1])).reshape(shape[0]).double()
        weight = layer(inputs).reshape(columns, shape[0]).double().T - bias[:, None]
    return weight.reshape(shape).numpy(), bias.numpy()


def base_of(layer: torch.nn.Module) -> dict[str, np.ndarray]:
    return {"weight": layer.weight.detach().numpy().copy(), "bias": layer.bias.detach().numpy().copy()}


def composed(state: Mapping[str, Any], module: Module, dtype: Any = np.float32) -> Source:
    """A file with a LyCORIS module's state in one dtype; only a lone number stays as it is."""
    tensors = {}
    for name, value in state.items():
        values = value.detach().numpy()
        tensors[f"{part_of(module)}.{name}"] = values.astype(dtype if values.ndim else values.dtype)
    return open_source(save(tensors))


def only(source: Source) -> AdaptedModule:
    found = detect(source, family=FAMILY)
    assert found.ok, found.findings
    return found.payload[0]


def relative(values: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(values - truth) / np.linalg.norm(truth))


@dataclass(frozen=True)
class Case:
    """One LyCORIS module with all its parameters drawn, on a layer of its own."""

    algorithm: str
    shape: tuple[int, ...]
    options: Mapping[str, Any]
    rank: int
    alpha: float
    dtype: Any
    seed: int


CLASSES = {
    "lora": ("locon", "LoConModule"),
    "loha": ("loha", "LohaModule"),
    "lokr": ("lokr", "LokrModule"),
    "glora": ("glora", "GLoRAModule"),
    "tlora": ("tlora", "TLoraModule"),
    "ia3": ("ia3", "IA3Module"),
    "oft": ("diag_oft", "DiagOFTModule"),
    "boft": ("boft", "ButterflyOFTModule"),
    "full": ("full", "FullModule"),
}
FLAG = st.booleans()
PRODUCT = {"use_tucker": FLAG, "use_scalar": FLAG, "rs_lora": FLAG}
CONSTRAINED = {"constraint": st.sampled_from([0, 2.0**-9, 2.0**-5]), "rescaled": FLAG}
OPTIONS: Mapping[str, Mapping[str, st.SearchStrategy[Any]]] = {
    "lora": PRODUCT,
    "loha": PRODUCT,
    "lokr": PRODUCT
    | {"factor": st.sampled_from([-1, 2, 4, 8]), "decompose_both": FLAG, "full_matrix": FLAG}
    | {"unbalanced_factorization": FLAG},
    "glora": {"use_scalar": FLAG},
    "tlora": {},
    "ia3": {"train_on_input": FLAG},
    "oft": CONSTRAINED,
    "boft": CONSTRAINED,
    "full": {},
}


@st.composite
def cases(draw: st.DrawFn, algorithm: str) -> Case:
    options = draw(st.fixed_dictionaries(dict(OPTIONS[algorithm])))
    if algorithm in ("lora", "loha", "lokr"):
        options |= {"weight_decompose": draw(FLAG), "wd_on_out": draw(FLAG)}
    shapes = LINEAR + POINTS if algorithm == "tlora" else LINEAR + POINTS + KERNELS
    alpha = draw(st.sampled_from([0.5, 1.0, 2.75]))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    return Case(algorithm, draw(st.sampled_from(shapes)), options, draw(st.integers(1, 7)), alpha, dtype, seed)


def made(case: Case) -> tuple[Any, dict[str, np.ndarray]]:
    """LyCORIS' module with values that the dtype holds, and its layer's parameters before."""
    from importlib import import_module

    place, name = CLASSES[case.algorithm]
    random = torch.Generator().manual_seed(case.seed)
    layer = layer_of(case.shape, random)
    kind = getattr(import_module(f"lycoris.modules.{place}"), name)
    try:
        module = kind("name", layer, lora_dim=case.rank, alpha=case.alpha, **case.options)
    except ValueError:  # BOFT takes only some sizes
        assume(False)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=random) * (0.1 if "oft" in case.algorithm else 0.5)
            values = values.abs() + 0.5 if key in ("dora_scale", "rescale", "scalar") else values
            values = torch.ones_like(values) if key == "scalar" and case.dtype is not np.float32 else values
            parameter.copy_(torch.from_numpy(values.numpy().astype(case.dtype).astype(np.float32)))
    base = base_of(layer)
    if case.algorithm == "full":
        module.apply_to()
    return module, base


def check(case: Case) -> None:
    module, base = made(case)
    whole = hasattr(module, "lokr_w1") and hasattr(module, "lokr_w2")
    assume(not (whole and case.options["rs_lora"]))  # trained with √r, which the file does not say
    weight, bias = responses(module.forward, case.shape)
    adapted = only(composed(module.state_dict(), target(case.shape), case.dtype))
    source = composed(module.state_dict(), target(case.shape), case.dtype)
    assert adapted.algorithm == case.algorithm + "+dora" * case.options.get("weight_decompose", False)
    adapter, form = read_adapter(source, adapted), form_of(adapted, source.header)
    deltas = adapter.deltas(base)
    noise = 1e-6 * np.linalg.norm(base["weight"]) / np.linalg.norm(weight - base["weight"])
    coarse = 1e-5 if case.dtype is np.float32 or case.algorithm != "full" else 1e-2  # a sum is stored rounded
    coarse = 1e-4 if case.algorithm == "tlora" else coarse  # LyCORIS decomposes the base weight in float32
    assert relative(deltas["weight"], weight - base["weight"]) <= coarse + noise
    assert np.allclose(deltas.get("bias", 0.0), bias - base["bias"], rtol=coarse, atol=2 * coarse)
    assert deltas["weight"].dtype == np.float64 and deltas["weight"].shape == case.shape
    check_product(adapter, form.rank, base, deltas)
    check_rows(adapter, base, deltas)
    needs = form.needs_base or form.magnitude
    if needs:
        with pytest.raises(BaseNeeded, match="base model"):
            adapter.deltas()
    else:
        np.testing.assert_array_equal(adapter.deltas()["weight"], deltas["weight"])


def check_product(adapter: Adapter, rank: int | None, base: Mapping[str, Any], deltas: Mapping[str, Any]) -> None:
    """The exact form, where there is one, has the rank that was foretold and changes the same."""
    inner = adapter.inner if isinstance(adapter, Dora) and rank is not None else adapter
    if rank is None:
        with pytest.raises(Unrepresentable):
            inner.to_lora(base)
        return
    plain = inner.to_lora(base)
    assert plain.mid is None and plain.up.shape[1] == plain.down.shape[0] == rank
    expected = inner.deltas(base)
    assert relative(plain.deltas()["weight"], expected["weight"]) <= 3e-7
    if isinstance(adapter, Dora):
        with pytest.raises(Unrepresentable):
            adapter.to_lora(base)


def check_rows(adapter: Adapter, base: Mapping[str, Any], deltas: Mapping[str, Any]) -> None:
    """The adapters of two blocks of rows change what the whole one does, or say that they cannot."""
    height = deltas["weight"].shape[0]
    cuts = ((0, height // 2), (height // 2, height))
    try:
        parts = [adapter.rows(*cut) for cut in cuts]
    except Unrepresentable as reason:
        assert str(reason)
        return
    for part, (start, stop) in zip(parts, cuts, strict=True):
        rows = {name: values[start:stop] for name, values in base.items()}
        for name, delta in part.deltas(rows).items():
            np.testing.assert_allclose(delta, deltas[name][start:stop], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("algorithm", CLASSES)
def test_lycoris_forward_is_what_is_read(algorithm):
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(cases(algorithm))
    def run(case: Case) -> None:
        check(case)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", CLASSES)
def test_lycoris_forward_is_what_is_read_thoroughly(algorithm):
    @settings(max_examples=100 if algorithm == "tlora" else 600, deadline=None, derandomize=True)
    @given(cases(algorithm))
    def run(case: Case) -> None:
        check(case)

    run()


NORM_BASES = {(32,): lambda: torch.nn.GroupNorm(4, 32), (64,): lambda: torch.nn.LayerNorm(64)}


@pytest.mark.parametrize("shape", NORM_BASES)
def test_norms_are_read_as_lycoris_applies_them(shape):
    from lycoris.modules.norms import NormModule

    random = torch.Generator().manual_seed(0)
    norm = NORM_BASES[shape]()
    pixels = torch.randn(3, shape[0], generator=random)
    normed = norm(pixels)
    module = NormModule("name", norm)
    torch.nn.init.normal_(module.w_norm, generator=random)
    torch.nn.init.normal_(module.b_norm, generator=random)
    source = composed(module.state_dict(), target(shape))
    adapted = only(source)
    deltas = read_adapter(source, adapted).deltas()
    assert form_of(adapted, source.header) == Form(None, True, True)
    expected = normed * torch.from_numpy(deltas["weight"]) + torch.from_numpy(deltas["bias"])
    torch.testing.assert_close((module.forward(pixels) - normed).double(), expected.double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(Unrepresentable, match="norm"):
        read_adapter(source, adapted).to_lora()


def nested(path: str, layer: torch.nn.Module) -> torch.nn.Module:
    """A model with one layer at a path."""
    for name in reversed(path.split(".")):
        parent = torch.nn.Module()
        parent.add_module(name, layer)
        layer = parent
    return layer


def peft_config(kind: str, path: str) -> Any:
    peft = pytest.importorskip("peft")
    blocks = {"LoKr": {"r": 40, "alpha": 12, "decompose_factor": 4}, "IA3 on input": {"feedforward_modules": [path]}}
    blocks |= {"IA3": {"feedforward_modules": []}, "OFT": {"r": 0, "oft_block_size": 4}}
    blocks |= {"LoRA": {"r": 4, "lora_alpha": 6, "lora_bias": True, "init_lora_weights": False}}
    names = {"LoKr": "LoKrConfig", "IA3": "IA3Config", "OFT": "OFTConfig", "LoRA": "LoraConfig"}
    return getattr(peft, names[kind.partition(" ")[0]])(target_modules=[path], **blocks[kind])


PEFT = [
    *(("LoKr", shape) for shape in [(32, 32), (64, 128), (32, 64, 3, 3)]),
    *((kind, shape) for kind in ("IA3", "IA3 on input") for shape in [(32, 32), (256, 64), (32, 64, 3, 3)]),
    *(("OFT", shape) for shape in [(32, 32), (64, 128), (32, 64, 1, 1)]),
    *(("LoRA", shape) for shape in [(32, 32), (256, 64), (32, 64, 3, 3)]),
]


@pytest.mark.parametrize(("kind", "shape"), PEFT, ids=str)
def test_peft_forward_is_what_is_read(kind, shape, tmp_path):
    from peft import get_peft_model_state_dict, inject_adapter_in_model

    random = torch.Generator().manual_seed(1)
    module = target(shape)
    layer = layer_of(shape, random)
    base = base_of(layer)
    model = inject_adapter_in_model(config := peft_config(kind, module.path), nested(module.path, layer))
    state = get_peft_model_state_dict(model)
    with torch.no_grad():
        for values in state.values():
            values.copy_(torch.randn(values.shape, generator=random) * 0.3 + (1.0 if "IA3" in kind else 0.0))
    weight, bias = responses(model.get_submodule(module.path), shape)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(save({f"base_model.model.{name}": values.numpy() for name, values in state.items()}))
    fields = {name: value for name, value in config.to_dict().items() if isinstance(value, int | float | bool | dict)}
    text = json.dumps(fields | {"peft_type": config.peft_type.value})
    path.with_name("adapter_config.json").write_text(text)
    source = open_source(path)
    deltas = read_adapter(source, only(source)).deltas(base)
    assert relative(deltas["weight"], weight - base["weight"]) <= 1e-5
    np.testing.assert_allclose(deltas.get("bias", np.zeros(shape[0])), bias - base["bias"], rtol=1e-5, atol=2e-6)


def stored(field_shapes: Mapping[str, tuple[int, ...]], seed: int = 0, size: float = 0.3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: (size * random.standard_normal(shape)).astype(np.float32) for name, shape in field_shapes.items()}


def read(tensors: Mapping[str, np.ndarray], module: Module) -> tuple[Adapter, Form, AdaptedModule]:
    source = open_source(save({f"{part_of(module)}.{name}": np.asarray(tensors[name]) for name in tensors}))
    adapted = only(source)
    return read_adapter(source, adapted), form_of(adapted, source.header), adapted


@pytest.mark.parametrize("shape", [(64, 128), (32, 64, 3, 3)])
def test_glora_of_both_orders_is_the_same(shape):
    out, width = shape[:2]
    ones = (1,) * len(shape[2:])
    names = {"a1": (width, 3, *ones), "a2": (3, width, *ones), "b1": (out, 3, *ones), "b2": (3, width, *shape[2:])}
    now = {f"{name}.weight": values for name, values in stored(names).items()} | {"alpha": np.float32(2)}
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    before = {(swapped[name[:2]] + name[2:] if name != "alpha" else name): values for name, values in now.items()}
    base = {"weight": stored({"w": shape}, 5)["w"]}
    first, second = (read(tensors, target(shape)) for tensors in (now, before))
    assert first[1] == second[1] and first[2].scale == second[2].scale == pytest.approx(2 / 3)
    np.testing.assert_array_equal(first[0].deltas(base)["weight"], second[0].deltas(base)["weight"])


def test_glora_without_its_multiplying_half_needs_no_base():
    adapter, form, _ = read(stored({"b1.weight": (64, 3), "b2.weight": (3, 128)}), target((64, 128)))
    assert form == Form(3)
    np.testing.assert_array_equal(adapter.to_lora().deltas()["weight"], adapter.deltas()["weight"])


@pytest.mark.parametrize("less", [0.0, 1.0])
def test_the_old_diagonal_is_the_rotation_or_it_less_one(less):
    rotation = ALGORITHMS["oft"].read(Stored(stored({"blocks": (8, 4, 4)}, size=0.2), (32, 32)))
    assert isinstance(rotation, Oft)
    base = {"weight": stored({"w": (32, 32)}, 3)["w"]}
    tensors = {"oft_diag": (rotation.rotation - less * np.eye(4)).astype(np.float32)}
    adapter, form, _ = read(tensors, target((32, 32)))
    assert form == Form(None, needs_base=True)
    assert relative(adapter.deltas(base)["weight"], rotation.deltas(base)["weight"]) <= 1e-6


@pytest.mark.parametrize("whole", ["", "w2", "w1 w2"])
@pytest.mark.parametrize("alpha", [3.0, 1e10, np.inf])
def test_alpha_of_a_lokr_counts_only_where_a_side_is_factorised(whole, alpha):
    shapes = {"lokr_w1": (8, 8)} if "w1" in whole else {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8)}
    shapes |= {"lokr_w2": (4, 4)} if "w2" in whole else {"lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}
    module = target((32, 32))
    tensors = stored(shapes) | {"alpha": np.float32(alpha)}
    found = detect(open_source(save({f"{part_of(module)}.{n}": np.asarray(v) for n, v in tensors.items()})))
    if whole == "w1 w2":
        assert found.ok and found.payload[0].scale == 1.0
    elif np.isfinite(alpha):
        assert found.ok and found.payload[0].scale == np.float32(alpha) / 2
    else:
        assert "not-finite" in names_of(found.findings)


@pytest.mark.parametrize("height", [8, 16, 12])
def test_a_kronecker_product_of_several_modules_is_cut_by_rows(height):
    values = stored({"w1": (96 // height, 8), "w2_a": (height, 2), "w2_b": (2, 4)})
    adapter = ALGORITHMS["lokr"].read(Stored(values, (96, 32), 0.5))
    delta = adapter.deltas()["weight"]
    for start in (0, 32, 64):
        part = adapter.rows(start, start + 32)
        np.testing.assert_allclose(part.deltas()["weight"], delta[start : start + 32], rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(part.to_lora().deltas()["weight"], delta[start : start + 32], rtol=1e-6, atol=1e-8)


def test_whole_kronecker_factors_are_cut_only_between_their_blocks():
    values = stored({"w1": (6, 8), "w2": (16, 4)})
    adapter = ALGORITHMS["lokr"].read(Stored(values, (96, 32)))
    np.testing.assert_array_equal(adapter.rows(32, 64).deltas()["weight"], adapter.deltas()["weight"][32:64])
    with pytest.raises(Unrepresentable, match="whole"):
        adapter.rows(8, 40)


@pytest.mark.parametrize("shape", [(32, 32), (64, 128), (32, 64, 3, 3)])
@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_with_a_difference_of_the_bias_is_one_lora(shape, dora):
    names = {"lora_down.weight": (4, *shape[1:]), "lora_up.weight": (shape[0], 4, *(1,) * (len(shape) - 2))}
    tensors = stored(names | {"diff_b": shape[:1]}) | ({"dora_scale": np.ones(shape[:1], "f4")} if dora else {})
    adapter, form, adapted = read(tensors, target(shape))
    assert adapted.algorithm == "lora+full" + "+dora" * dora
    assert form == Form(4, bias=True, magnitude=dora)
    inner = adapter.inner if isinstance(adapter, Dora) else adapter
    plain, deltas = inner.to_lora(), inner.deltas()
    np.testing.assert_array_equal(plain.deltas()["weight"], deltas["weight"])
    np.testing.assert_array_equal(deltas["bias"], tensors["diff_b"])
    np.testing.assert_array_equal(plain.deltas()["bias"], tensors["diff_b"])
    check_rows(inner, {}, deltas)


def test_two_products_in_one_module_are_added():
    values = stored(
        {"down": (3, 32), "up": (16, 3), "w1_a": (16, 2), "w1_b": (2, 32), "w2_a": (16, 2), "w2_b": (2, 32)}
    )
    parts = tuple(ALGORITHMS[name].read(Stored(values, (16, 32), 0.5)) for name in ("lora", "loha"))
    total = Sum(parts)
    plain = total.to_lora()
    assert plain.up.shape == (16, 7)
    assert relative(plain.deltas()["weight"], total.deltas()["weight"]) <= 3e-7
    expected = sum(part.deltas()["weight"] for part in parts)
    np.testing.assert_array_equal(total.deltas()["weight"], expected)


def test_a_lone_bias_is_a_lora_of_rank_0():
    adapter, form, _ = read(stored({"diff_b": (64,)}), target((64, 128)))
    assert form == Form(0, weight=False, bias=True)
    plain = adapter.to_lora()
    assert plain.down.shape == (0, 128) and plain.up.shape == (64, 0)
    assert list(adapter.deltas()) == ["bias"]
    np.testing.assert_array_equal(plain.deltas()["bias"], adapter.deltas()["bias"])
    assert not plain.deltas()["weight"].any()


def test_a_row_of_zeros_stays_one_under_dora():
    weight = stored({"w": (8, 6)})["w"]
    weight[3] = 0.0
    still = Lora(np.zeros((1, 6), np.float32), np.zeros((8, 1), np.float32))
    delta = Dora(still, np.full(8, 2.0)).deltas({"weight": weight})["weight"]
    assert np.isfinite(delta).all() and not delta[3].any()
    np.testing.assert_allclose(np.linalg.norm(weight + delta, axis=1), [2, 2, 2, 0, 2, 2, 2, 2])


LOHA = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}
GLORA = {"a1.weight": (32, 3), "a2.weight": (3, 32), "b1.weight": (32, 3), "b2.weight": (3, 32)}
BROKEN = {
    "loha sides of different sizes": LOHA | {"hada_w2_b": (2, 16)},
    "loha ranks that do not join": LOHA | {"hada_w1_b": (3, 32)},
    "lokr ranks that do not join": {"lokr_w1": (8, 8), "lokr_w2_a": (4, 2), "lokr_w2_b": (1, 4)},
    "glora pairs that do not join": GLORA | {"a2.weight": (2, 32)},
    "blocks that are not square": {"oft_blocks": (8, 4, 3)},
    "rescale of another size": {"oft_blocks": (8, 4, 4), "rescale": (31, 1)},
    "triangles of no size": {"oft_R.weight": (8, 7)},
    "a bias of another size": {"diff": (32, 32), "diff_b": (31,)},
    "a magnitude of another size": {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "dora_scale": (31, 1)},
    "a core that is a number": LOHA | {"hada_t1": (), "hada_t2": ()},
    "a lora's bias of another size": {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "lora_up.bias": (31,)},
    "a difference of another size": {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "diff_b": (31,)},
    "blocks of one dimension too many": {"oft_blocks": (8, 4, 4, 1)},
    "a butterfly that is too wide": {"oft_blocks": (5, 8, 4, 4)},
    "factors of another size": {"ia3_l": (31, 1)},
    "a glora's core of another size": GLORA | {"bm.weight": (3, 2, 1, 1)},
    "a magnitude of a lone bias": {"diff_b": (32,), "dora_scale": (32, 1)},
    "lambda of another size": {"p_layer.weight": (32, 2), "q_layer.weight": (2, 32), "lambda_layer": (1, 3)},
}  # fmt: skip


@pytest.mark.parametrize("shapes", BROKEN.values(), ids=BROKEN)
def test_shapes_that_do_not_join_are_named(shapes):
    found = found_with(shapes)
    assert names_of(found.findings) == {"shape-misfit"} and not found.ok


LOKR = {"lokr_w1": (8, 8), "lokr_w2": (4, 4)}
INCOMPLETE = {
    "a loha without a factor": ({name: LOHA[name] for name in list(LOHA)[1:]}, "hada_w1_a"),
    "a lokr without half of a factor": ({"lokr_w1_a": (8, 2), "lokr_w2": (4, 4)}, "lokr_w1_b"),
    "a lokr of one factor": ({"lokr_w1": (8, 8)}, "lokr_w2"),
    "a glora of the base weight alone": ({"a1.weight": (32, 3), "a2.weight": (3, 32)}, "b1.weight and no b2.weight"),
    "a t-lora without its values": ({"p_layer.weight": (32, 2), "q_layer.weight": (2, 32)}, "lambda_layer"),
    "factors of rows without blocks": ({"rescale": (32, 1)}, "oft_blocks"),
}  # fmt: skip
TOO_MANY = {
    "lokr_t1": LOKR | {"lokr_t1": (2, 2, 3, 3)},
    "lokr_w1": LOKR | {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8)},
    "lokr_t2": LOKR | {"lokr_t2": (2, 2, 1, 1)},
    "hada_t1": LOHA | {"hada_t1": (2, 2, 1, 1)},
    "a1.weight": {name: shape for name, shape in GLORA.items() if name != "a2.weight"},
    "oft_R.weight": {"oft_blocks": (8, 4, 4), "oft_R.weight": (8, 6)},
    "ia3_l": {"weight": (32,), "on_input": (), "ia3_l": (32, 1)},
    "scalar": {"diff": (32, 32), "scalar": ()},
}  # fmt: skip


def found_with(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    module = target((32, 32))
    tensors = {f"{part_of(module)}.{name}": np.asarray(values) for name, values in stored(shapes).items()}
    other = {f"{part_of(target((64, 128)))}.diff": np.ones((64, 128), np.float32)}
    return detect(open_source(save(tensors | other)), family=FAMILY)


@pytest.mark.parametrize(("shapes", "lacking"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_a_missing_factor_is_named(shapes, lacking):
    (said,) = found_with(shapes).findings
    assert (said.name, said.severity) == ("missing-partner", "error") and f"no {lacking} beside" in said.message


@pytest.mark.parametrize("name", TOO_MANY)
def test_a_tensor_that_nothing_uses_is_named(name):
    (said,) = found_with(TOO_MANY[name]).findings
    assert (said.name, said.severity) == ("unexplained-tensor", "error") and said.subject.endswith(f".{name}")


@pytest.mark.parametrize("shape", [(128,), (128, 1), (1, 64)])
def test_a_magnitude_of_the_other_side_is_named(shape):
    tensors = stored({"lora_down.weight": (2, 128), "lora_up.weight": (64, 2), "dora_scale": shape})
    part = part_of(target((64, 128)))
    found = detect(open_source(save({f"{part}.{name}": np.asarray(v) for name, v in tensors.items()})), family=FAMILY)
    assert [(said.name, said.subject) for said in found.findings] == [("shape-misfit", f"{part}.dora_scale")]


def test_a_butterfly_of_a_billion_stages_is_refused_at_once():
    shapes = {"blocks": (10**15, 0, 2, 2)}  # of no bytes, so that a header may have it
    assert not fits("boft", shapes, 64, target((64, 128)))


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "glora", "oft", "ia3"])
def test_a_norm_takes_no_matrix(algorithm):
    shapes = {
        "lora": {"lora_down.weight": (2, 1), "lora_up.weight": (64, 2)},
        "loha": {name: (64, 2) if name.endswith("a") else (2, 1) for name in LOHA},
        "lokr": {"lokr_w1": (8, 1), "lokr_w2": (8, 1)},
        "glora": {"b1.weight": (64, 2), "b2.weight": (2, 1)},
        "oft": {"oft_blocks": (16, 4, 4)},
        "ia3": {"weight": (64,), "on_input": ()},
    }[algorithm]
    tensors = {f"{part_of(target((64,)))}.{name}": np.asarray(values) for name, values in stored(shapes).items()}
    found = detect(open_source(save(tensors)), family=FAMILY)
    assert names_of(found.findings) == {"shape-misfit"}


def test_factors_of_the_other_side_are_refused():
    tensors = {"weight": np.ones(64, np.float32), "on_input": np.ones((), np.int64)}
    with pytest.raises(Unrepresentable, match="side"):
        read(tensors, target((64, 128)))


def test_blocks_that_do_not_divide_the_inputs_are_refused():
    with pytest.raises(Unrepresentable, match="divide"):
        read(stored({"oft_R.weight": (1, 3)}), target((64, 128)))


def test_peft_ia3_of_a_square_convolution_is_not_guessed():
    with pytest.raises(Unrepresentable, match="inputs or outputs"):
        ALGORITHMS["ia3"].read(Stored({"factors": np.ones((1, 8, 1, 1))}, (8, 8, 3, 3)))


def test_peft_oft_of_a_larger_convolution_is_no_change_of_its_weight():
    with pytest.raises(Unrepresentable, match="patches"):
        ALGORITHMS["oft"].read(Stored({"rotation": np.ones((9, 28))}, (8, 8, 3, 3), spelling="peft"))


def test_rows_that_a_rotation_or_a_norm_mixes_are_refused():
    oft, mixed = Oft(np.eye(8)[None].repeat(4, 0)), "mixes rows"
    with pytest.raises(Unrepresentable, match=mixed):
        oft.rows(0, 12)
    with pytest.raises(Unrepresentable, match="all rows"):
        Dora(oft, np.ones(32), "in").rows(0, 16)


def test_the_registry_is_described():
    assert all(kind.title and kind.lora and kind.tested for kind in KINDS)
    assert len({kind.title for kind in KINDS}) == len(KINDS) == len(ALGORITHMS) + len(DORA)
    assert [row.name for row in ALGORITHMS.values()] == list(ALGORITHMS)


RECORDS = manifest(CORPUS / "lora") if CORPUS.is_dir() else []
LARGE = 4_000_000  # elements; modules above are left to the slow run
READERS = {
    "l_sd15_dylora": "alt_comfy",
    "d_sdxl_peft_nometa_alpha_lost": "alt_diffusers",
    "lo19_sd15_glora": "alt_comfy",
}
"""Files that do not hold the scale that their trainer applied: what their readers apply is the truth."""
UNSAID = {"lo19_sd15_ia3": "bias"}
"""LyCORIS 1.9 scaled the bias, its successors do not, and the file does not say which of them wrote it."""


def corpus_error(record: Mapping[str, Any], largest: float) -> tuple[int, dict[str, float]]:
    """Relative error of every parameter that a file of the corpus changes; and how many parameters were compared."""
    sys.path.insert(0, str(CORPUS / "lora"))
    import refdelta

    truth = refdelta.reference(str(CORPUS / "lora" / f"{record['name']}.delta.safetensors"))
    source = open_source(CORPUS / "lora" / record["file"])
    modules = {module.modules[0].name: module for module in detect(source).payload}
    errors: dict[str, float] = {}
    for key in [key for key in truth if "@" not in key]:
        name, _, parameter = key.rpartition(".")
        module = modules[name].modules[0]
        if parameter == UNSAID.get(record["name"]) or np.prod(module.shape) > largest:
            continue
        sizes = {"weight": module.shape, "bias": module.shape[:1]}
        base = {part: refdelta.base_weight(f"{name}.{part}", size).numpy() for part, size in sizes.items()}
        delta = read_adapter(source, modules[name]).deltas(base)[parameter]
        ratio = truth[key][READERS[record["name"]]]["ratio"] if record["name"] in READERS else 1.0
        noise = 1e-7 * np.linalg.norm(base[parameter]) / truth[key]["fro"]  # the truth is a difference in float32
        errors[key] = refdelta.compare(truth[key], torch.from_numpy(delta / ratio)) - noise
    return len(errors), errors


def check_record(record: Mapping[str, Any], largest: float) -> None:
    number, errors = corpus_error(record, largest)
    assert number
    limit = 5e-5 if record["algo"] == "tlora" else 1e-5  # LyCORIS decomposed the base weight in float32
    assert {key: error for key, error in errors.items() if error > limit} == {}


@pytest.mark.corpus
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_files_of_all_trainers_have_the_trainers_deltas(record):
    check_record(record, LARGE)


@pytest.mark.slow
@pytest.mark.corpus
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_large_modules_too(record):
    check_record(record, np.inf)


def test_a_product_is_the_same_to_the_bit_however_it_is_cut(monkeypatch):
    random = np.random.default_rng(0)
    left, right = random.standard_normal((50, 7)), random.standard_normal((7, 30))
    whole = dense_product(left, right)
    monkeypatch.setattr(lora_algorithm, "_CACHED", 100)
    np.testing.assert_array_equal(dense_product(left, right), whole)
    np.testing.assert_allclose(whole, left @ right, rtol=1e-12)
