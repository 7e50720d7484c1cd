"""peft's native forms: what peft's own layers are built like, what they hold, and what they cannot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import CORPUS, FIXTURES
from safetensors.numpy import save, save_file

from lora_convert.containers import open_source
from lora_convert.converters.adapters import read_adapter
from lora_convert.converters.native import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    NativeForm,
    NativeTensor,
    adapter_config,
    native_form,
    native_groups,
    native_tensors,
    reads_input,
    tensor_name,
)
from lora_convert.errors import Unrepresentable
from lora_convert.families import FAMILIES, Module
from lora_convert.inspect.detect import detect
from lora_convert.inspect.detection import AdaptedModule

KINDS = FIXTURES / "tiny" / "kinds"

PEFT_0_15 = {
    "LORA": {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias", "use_dora", "lora_bias"},
    "LOHA": {"r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"},
    "LOKR": {
        "r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d", "decompose_both", "decompose_factor",
    },
    "IA3": {"feedforward_modules"},
}  # fmt: skip
"""Fields of peft 0.15's configurations that are of use here, besides those that all kinds have."""

EVERY_KIND = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "target_modules"}


def adapted(
    algorithm: str,
    tensors: Mapping[str, np.ndarray],
    *shapes: tuple[int, ...],
    path: str = "conv_in",
    scale: float | None = 1.0,
    alpha: float | None = None,
    spelling: str = "peft",
) -> tuple[Any, AdaptedModule]:
    """A source with the fields of one module, and the module; of several shapes the parts of a fused weight."""
    paths = [path] if len(shapes) == 1 else [f"{path}.{number}" for number in range(len(shapes))]
    targets = tuple(Module("unet", name, shape, name) for name, shape in zip(paths, shapes, strict=True))
    source = open_source(save({name: np.ascontiguousarray(values) for name, values in tensors.items()}))
    return source, AdaptedModule(targets, algorithm, {name: name for name in tensors}, spelling, None, alpha, scale)


def drawn(shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: np.asarray(random.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def write_folders(source: Any, payload: Any, out: Path, dtype: str | None = None) -> dict[str, str]:
    """The folders of all modules that peft can hold; returns the others' names and why."""
    forms: dict[str, NativeForm] = {}
    places, refused = {}, {}
    for module in payload:
        for target in module.modules:
            try:
                given = {"target": target, "on_input": reads_input(source, module)}
                forms[target.name] = native_form(module, source.header, dtype, **given)
                places[target.name] = target, module
            except Unrepresentable as error:
                refused[target.name] = str(error)
    for folder, names in native_groups(forms).items():
        (out / folder).mkdir(parents=True)
        tensors = {}
        for name in names:
            target, module = places[name]
            for suffix, values in native_tensors(source, module, forms[name], target).items():
                tensors[tensor_name(target, suffix)] = np.ascontiguousarray(values)
        save_file(tensors, out / folder / WEIGHTS_NAME, {"format": "pt"})
        config = adapter_config([(places[name][0], forms[name]) for name in names])
        (out / folder / CONFIG_NAME).write_text(config)
    return refused


class Peft:
    """A model of one layer with a layer of peft's in its place, filled with random values."""

    def __init__(self, config: Any, shape: tuple[int, ...], *, bias: bool = True, fill: bool = True) -> None:
        torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
        torch.manual_seed(0)
        layer = torch.nn.Conv2d if len(shape) == 4 else torch.nn.Linear
        self.model = torch.nn.Module()
        self.model.conv_in = layer(shape[1], shape[0], *([shape[2:]] if len(shape) == 4 else []), bias=bias)
        self.weight = self.model.conv_in.weight.detach().clone()
        peft.inject_adapter_in_model(config, self.model, "default")
        if fill:
            for values in self.state().values():
                torch.nn.init.normal_(values, std=0.3)

    def state(self) -> dict[str, Any]:
        from peft import get_peft_model_state_dict

        return {name.removeprefix("conv_in."): values for name, values in get_peft_model_state_dict(self.model).items()}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        import torch
        from peft import set_peft_model_state_dict

        found = {f"conv_in.{name}": torch.from_numpy(np.array(values)) for name, values in state.items()}
        assert not set_peft_model_state_dict(self.model, found).unexpected_keys

    def delta(self) -> np.ndarray:
        """What merging changes, in double precision."""
        model = self.model.double()
        model.conv_in.merge()
        return (model.conv_in.base_layer.weight.detach() - self.weight.double()).numpy()


FIELDS = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude", "lora_B.bias": "up_bias",
    "oft_R.weight": "rotation", "ia3_l": "factors",
}  # fmt: skip
"""Suffixes of peft's -> our fields; those of LoHa and LoKr are theirs without the first part."""


def lycoris_names(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """peft's tensors as LyCORIS and OneTrainer spell them, by field."""
    plain = {name: values.detach().numpy() for name, values in state.items()}
    return {FIELDS.get(name, name.partition("_")[2]): values for name, values in plain.items()}


SHAPES = [(24, 16), (24, 16, 1, 1), (24, 16, 3, 3), (16, 4, 3, 3)]
LORAS = [{"use_dora": False}, {"use_dora": True}]
LOHAS = [{"use_effective_conv2d": effective} for effective in (False, True)]
LOKRS = [
    {"decompose_factor": factor, "decompose_both": both, "use_effective_conv2d": effective, "r": rank}
    for factor, both, effective, rank in itertools.product((-1, 2, 4, 8), (False, True), (False, True), (1, 2, 5))
]
IA3S = [{"feedforward_modules": ["conv_in"]}, {"feedforward_modules": []}]
OFTS = [{"oft_block_size": size, "block_share": share} for size in (4, 5, 16) for share in (False, True)]


def peft_cases() -> list[Any]:
    rows = [
        ("LORA", "lora", {"r": 3, "lora_alpha": 2.0}, LORAS),
        ("LOHA", "loha", {"r": 3, "alpha": 2.0}, LOHAS),
        ("LOKR", "lokr", {"r": 2, "alpha": 3.0}, LOKRS),
        ("IA3", "ia3", {}, IA3S),
        ("OFT", "oft", {"bias": "none"}, OFTS),
    ]
    return [
        pytest.param(kind, algorithm, {**common, **options}, shape, id=f"{kind}-{list(options.values())}-{shape}")
        for kind, algorithm, common, every in rows
        for options in every
        for shape in (SHAPES[:2] if kind == "OFT" else SHAPES)
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "algorithm", "options", "shape"), peft_cases())
def test_what_peft_holds_goes_through_another_spelling_and_back(kind, algorithm, options, shape):
    peft = pytest.importorskip("peft")
    config_class = {"LORA": "LoraConfig", "LOHA": "LoHaConfig", "LOKR": "LoKrConfig", "IA3": "IA3Config"}
    make = getattr(peft, config_class.get(kind, "OFTConfig"))
    layer = Peft(make(target_modules=["conv_in"], **options), shape, bias=kind != "IA3")
    stored = layer.state()
    fields = lycoris_names(stored)
    on_input = bool(options.get("feedforward_modules"))
    if kind == "IA3":
        fields = {"weight": (fields["factors"] - 1).reshape(-1), "on_input": np.array(int(on_input))}
    scale = options.get("alpha", options.get("lora_alpha", 1.0)) / options.get("r", 1)
    source, module = adapted(
        f"{algorithm}+dora" if options.get("use_dora") else algorithm,
        fields,
        shape,
        path="to_q" if kind == "IA3" else "conv_in",
        scale=1.0 if {"w1", "w2"} <= fields.keys() else scale,
        alpha=options.get("alpha", options.get("lora_alpha")),
    )
    form = native_form(module, source.header, on_input=reads_input(source, module))
    assert form.peft_type == kind
    assert {tensor.suffix: tensor.shape for tensor in form.tensors} == {n: tuple(v.shape) for n, v in stored.items()}
    values = native_tensors(source, module, form)
    for name, kept in values.items():
        if kind == "IA3":
            np.testing.assert_allclose(kept, stored[name].detach().numpy(), rtol=2e-7, atol=1e-7)
        else:
            np.testing.assert_array_equal(kept, stored[name].detach().numpy())
    target = Module("unet", "conv_in", shape, "conv_in")
    again = Peft(config_of(adapter_config([(target, form)])), shape, bias=kind != "IA3", fill=False)
    assert {n: v.shape for n, v in again.state().items()} == {n: v.shape for n, v in stored.items()}
    again.load(values)
    delta = layer.delta()
    if {"w1", "w2"} <= fields.keys():  # the file's scale is 1 then, whatever rank and alpha say
        delta = delta / scale
    assert np.linalg.norm(again.delta() - delta) <= 1e-6 * np.linalg.norm(delta)


def config_of(text: str) -> Any:
    from peft.mapping import get_peft_config

    return get_peft_config(json.loads(text))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 6, 7, 8, 16, 64])
def test_every_factorisation_of_peft_is_recognised(factor):
    pytest.importorskip("peft")
    from peft.tuners.lokr.layer import factorization

    sizes = (1, 2, 4, 6, 12, 15, 25, 36, 64, 320, 768, 2560)
    for out, columns in itertools.product(sizes, sizes):
        (rows_1, rows_2), (columns_1, columns_2) = factorization(out, factor), factorization(columns, factor)
        shapes = {"w1": (rows_1, columns_1), "w2": (rows_2, columns_2)}
        source, module = adapted(
            "lokr", {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, (out, columns)
        )
        factors = native_form(module, source.header).settings["decompose_factor"]
        given = factor in factors or (factor > max(out, columns) and -1 in factors)
        assert given, (out, columns)
        for other in factors[:: max(1, len(factors) // 7)]:
            assert (factorization(out, other)[0], factorization(columns, other)[0]) == (rows_1, columns_1), other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("columns", [16, 24, 36, 77, 320])
def test_every_block_size_that_peft_adjusts_is_recognised(columns):
    pytest.importorskip("peft")
    from peft.tuners.oft.layer import OFTLayer

    made: dict[int, set[int]] = {}
    for size in range(2, columns):
        block = size if columns % size == 0 else OFTLayer.adjust_oft_parameters(SimpleNamespace(), columns, size)
        made.setdefault(block, set()).add(size)
    for block in set(made) - {1}:
        triangles = np.zeros((columns // block, block * (block - 1) // 2), np.float16)
        source, module = adapted("oft", {"rotation": triangles}, (8, columns))
        sizes = native_form(module, source.header).settings["oft_block_size"]
        assert sizes[0] == block
        assert set(sizes) - {columns} == made[block] - {columns}


KRONECKER = {"w1": (4, 4), "w2_a": (6, 2), "w2_b": (2, 4)}
LOHA = {"w1_a": (8, 2), "w1_b": (2, 6), "w2_a": (8, 2), "w2_b": (2, 6)}
TUCKER = LOHA | {"w1_a": (2, 8), "w2_a": (2, 8), "t1": (2, 2, 1, 1), "t2": (2, 2, 1, 1)}
REFUSED = [
    ("boft", {"blocks": (2, 2, 4, 4)}, (8, 6), "rotates outputs"),
    ("oft", {"blocks": (2, 4, 4)}, (8, 6), "rotates outputs"),
    ("oft", {"rotation": (27, 1)}, (8, 6, 3, 3), "overlapping patches"),
    ("oft", {"rotation": (3, 2)}, (8, 6), "do not make blocks"),
    ("oft", {"rotation": (2, 1)}, (8, 6), "do not make blocks"),
    ("glora", {"a1.weight": (8, 2), "a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6)}, (8, 6), "entry by entry"),
    ("full", {"weight": (8, 6)}, (8, 6), "whole difference"),
    ("lora+full", {"down": (2, 6), "up": (8, 2), "weight": (8, 6)}, (8, 6), "no product of two factors"),
    ("norm", {"weight": (8,)}, (8,), "norm"),
    ("lora", {"down": (0, 6), "up": (8, 0)}, (8, 6), "rank is 0"),
    ("lora+dora", {"down": (2, 6), "up": (8, 2), "dora_scale": (1, 6)}, (8, 6), "per input"),
    ("lora+dora", {"down": (2, 6), "up": (8, 2), "up_bias": (8,), "magnitude": (8,)}, (8, 6), "bias"),
    ("lokr+dora", {"w1": (4, 4), "w2": (6, 4), "magnitude": (24,)}, (24, 16), "no product of two factors"),
    ("loha", LOHA | {"w2_a": (8, 3), "w2_b": (3, 6)}, (8, 6), "the ranks 2 and 3"),
    ("loha", TUCKER, (8, 6, 1, 1), "Tucker cores only"),
    ("lokr", {"w1": (1, 4), "w2": (24, 4)}, (24, 16), "under no decompose_factor"),
    ("lokr", {"w1": (4, 1), "w2_a": (2, 80), "w2_b": (2, 4), "t2": (2, 2, 3, 3)}, (320, 4, 3, 3), "under no"),
    ("lokr", KRONECKER | {"w2_a": (6, 3), "w2_b": (3, 4)}, (24, 16), "at rank 3 peft stores"),
    ("lokr", {"w1_a": (4, 1), "w1_b": (1, 4), "w2_a": (6, 2), "w2_b": (2, 4)}, (24, 16), "the ranks 1 and 2"),
    ("lokr", KRONECKER | {"t1": (2, 2, 1, 1)}, (24, 16), "no Tucker core in its first factor"),
    ("ia3", {"weight": (8,), "on_input": ()}, (8, 6), "scales the bias too"),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "shapes", "shape", "why"), REFUSED)
def test_what_peft_cannot_hold_is_refused_with_the_reason(algorithm, shapes, shape, why):
    tensors = drawn(shapes) | ({"on_input": np.array(0)} if "on_input" in shapes else {})
    source, module = adapted(algorithm, tensors, shape)
    with pytest.raises(Unrepresentable, match=why) as refusal:
        native_form(module, source.header, on_input=reads_input(source, module))
    assert str(refusal.value)[0].islower() and not str(refusal.value).endswith(".")


def test_embeddings_are_refused():
    source, module = adapted("lora", drawn({"down": (2, 6), "up": (8, 2)}), (8, 6))
    marked = Module("text_encoder", "token_embedding", (8, 6), "token_embedding", None, "embedding")
    with pytest.raises(Unrepresentable, match="embedding table"):
        native_form(AdaptedModule((marked,), "lora", module.tensors, "test"), source.header)


def test_a_square_weight_needs_the_flag_of_ia3():
    source, module = adapted(
        "ia3", {"weight": np.ones(8, np.float32), "on_input": np.array(1)}, (8, 8), path="ff.net.2"
    )
    assert reads_input(source, module) is True
    assert native_form(module, source.header, on_input=True).on_input
    with pytest.raises(Unrepresentable, match="bias"):
        native_form(module, source.header, on_input=False)
    with pytest.raises(ValueError, match="square"):
        native_form(module, source.header)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_values_keep_their_dtype_bit_for_bit(dtype):
    tensors = drawn(LOHA, dtype)
    source, module = adapted("loha", tensors, (8, 6))
    values = native_tensors(source, module, native_form(module, source.header))
    for part, stored in tensors.items():
        assert values[f"hada_{part}"].dtype == stored.dtype
        assert values[f"hada_{part}"].tobytes() == stored.tobytes()


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (np.float64, None, "F32"),
        (ml_dtypes.float8_e4m3fn, None, "F16"),
        (np.float32, "BF16", "BF16"),
        (np.float16, "F32", "F32"),
    ],
)
def test_dtypes_that_no_pipeline_has_and_dtypes_that_are_asked_for(stored, asked, written):
    pytest.importorskip("torch")
    from safetensors.torch import save as save_torch

    tensors = drawn(LOHA, stored)
    if stored is ml_dtypes.float8_e4m3fn:
        import torch

        as_torch = {name: torch.from_numpy(v.astype(np.float32)).to(torch.float8_e4m3fn) for name, v in tensors.items()}
        source = open_source(save_torch(as_torch))
        _, module = adapted("loha", drawn(LOHA), (8, 6))
    else:
        source, module = adapted("loha", tensors, (8, 6))
    form = native_form(module, source.header, asked)
    assert {tensor.dtype for tensor in form.tensors} == {written}
    for name, values in native_tensors(source, module, form).items():
        np.testing.assert_array_equal(values, tensors[name.removeprefix("hada_")].astype(values.dtype))


@pytest.mark.parametrize(("scale", "alpha"), [(1.0, 3.0), (1 / 3, None), (0.1, 0.3), (-5000.0, -15000.0), (0.0, 0.0)])
def test_alpha_over_rank_is_the_scale(scale, alpha):
    rank = 3
    source, module = adapted("lora", drawn({"down": (rank, 6), "up": (8, rank)}), (8, 6), scale=scale, alpha=alpha)
    form = native_form(module, source.header)
    assert form.rank == rank
    content = json.loads(adapter_config([(module.modules[0], form)]))
    assert content["r"] == rank
    assert content["lora_alpha"] == form.alpha
    assert form.alpha / rank == pytest.approx(scale, rel=4e-16)
    assert alpha is None or form.alpha == alpha or alpha / rank != scale


FUSED = [
    ("lora", {"down": (2, 6), "up": (24, 2)}),
    ("lora+dora", {"down": (2, 6), "up": (24, 2), "dora_scale": (24, 1)}),
    ("loha", {"w1_a": (24, 2), "w1_b": (2, 6), "w2_a": (24, 2), "w2_b": (2, 6)}),
    ("lokr", {"w1": (6, 2), "w2_a": (4, 1), "w2_b": (1, 3)}),
    ("lokr", {"w1": (12, 2), "w2": (2, 3)}),
    ("oft", {"rotation": (2, 3)}),
    ("ia3", {"weight": (24,), "on_input": ()}),
    ("ia3", {"weight": (6,), "on_input": ()}),
]


@pytest.mark.parametrize(("algorithm", "shapes"), FUSED)
def test_the_parts_of_a_fused_weight_are_its_rows(algorithm, shapes):
    tensors = drawn(shapes)
    if algorithm == "ia3":
        tensors["on_input"] = np.array(int(shapes["weight"] == (6,)))
    source, module = adapted(algorithm, tensors, (8, 6), (8, 6), (8, 6), path="to_q", scale=0.5)
    base = drawn({"weight": (24, 6)}, seed=1)
    whole = read_adapter(source, module).deltas(base)["weight"]
    for number, target in enumerate(module.modules):
        target = Module("unet", "to_q", target.shape, "to_q")
        fused = AdaptedModule(
            (*module.modules[:number], target, *module.modules[number + 1 :]),
            algorithm, module.tensors, "test", None, None, 0.5,
        )  # fmt: skip
        form = native_form(fused, source.header, target=target, on_input=reads_input(source, module))
        values = native_tensors(source, fused, form, target)
        fields = {FIELDS.get(name, name.partition("_")[2]): values for name, values in values.items()}
        part_source, part = adapted(algorithm, fields, (8, 6), scale=form.alpha / form.rank if form.rank else 1.0)
        rows = slice(8 * number, 8 * number + 8)
        delta = read_adapter(part_source, part).deltas({"weight": base["weight"][rows]})["weight"]
        np.testing.assert_allclose(delta, whole[rows], rtol=1e-5, atol=1e-6)


def test_onetrainer_turns_convolutions_the_other_way_round_than_peft():
    tensors = drawn({"rotation": (3, 1)})
    forms = {}
    for spelling in ("kohya", "peft"):
        for shape in ((8, 6), (8, 6, 1, 1)):
            source, module = adapted("oft", tensors, shape, spelling=spelling)
            values = native_tensors(source, module, native_form(module, source.header))["oft_R.weight"]
            written = adapted("oft", {"rotation": values}, shape)
            base = drawn({"weight": shape}, seed=1)
            delta, expected = (read_adapter(*each).deltas(base)["weight"] for each in (written, (source, module)))
            np.testing.assert_allclose(delta, expected, rtol=1e-12, atol=1e-12)
            forms[spelling, len(shape)] = values
    np.testing.assert_array_equal(forms["kohya", 4], -forms["peft", 4])
    np.testing.assert_array_equal(forms["kohya", 2], forms["peft", 2])


def test_kronecker_blocks_that_cross_the_parts_are_refused():
    source, module = adapted("lokr", drawn({"w1": (2, 2), "w2": (12, 3)}), (8, 6), (8, 6), (8, 6))
    with pytest.raises(Unrepresentable, match="do not end where the fused weight's parts do"):
        native_form(module, source.header)


def _form(kind: str, **settings: tuple[Any, ...]) -> NativeForm:
    return NativeForm(kind, (NativeTensor("x", "F32", (1,)),), 2, 2.0, settings)


def test_modules_share_a_folder_where_one_configuration_does_for_all():
    forms = {
        "unet.a": _form("LOKR", decompose_factor=(-1, 4, 8)),
        "unet.b": _form("LOKR", decompose_factor=(4, 5)),
        "unet.c": _form("LOKR", decompose_factor=(8,)),
        "unet.d": _form("LOKR", use_effective_conv2d=(True,)),
        "unet.e": _form("LORA", use_dora=(True,)),
        "text_encoder.a": _form("LORA", use_dora=(True,)),
        "text_encoder.b": _form("LORA", use_dora=(False,)),
        "text_encoder.c": _form("LORA", use_dora=(False,)),
        "text_encoder_2.a": _form("LORA"),
    }
    expected = {
        "text_encoder": ("text_encoder.b", "text_encoder.c"),
        "text_encoder-2": ("text_encoder.a",),
        "text_encoder_2": ("text_encoder_2.a",),
        "unet": ("unet.a", "unet.b", "unet.d"),
        "unet-2": ("unet.c",),
        "unet-3": ("unet.e",),
    }
    assert native_groups(forms) == expected
    assert native_groups(dict(reversed(forms.items()))) == expected
    targets = {name: Module("unet", name.partition(".")[2], (2, 2), "x") for name in forms}
    for names in expected.values():
        assert adapter_config([(targets[name], forms[name]) for name in names])
    with pytest.raises(ValueError, match="different configurations"):
        adapter_config([(targets[name], forms[name]) for name in ("unet.b", "unet.c")])


def test_patterns_name_modules_that_differ_and_text_encoders_without_text_model():
    unet = [Module("unet", f"down_blocks.{number}.conv", (2, 2), "x") for number in range(3)]
    form = NativeForm("LOHA", (), 4, 2.0)
    content = json.loads(
        adapter_config(
            [(unet[0], form), (unet[1], NativeForm("LOHA", (), 2, 2.0)), (unet[2], NativeForm("LOHA", (), 4, 1.5))]
        )
    )
    assert content["target_modules"] == [module.path for module in unet]
    assert (content["r"], content["alpha"]) == (4, 2)
    assert content["rank_pattern"] == {"^down_blocks.1.conv": 2}
    assert content["alpha_pattern"] == {"^down_blocks.2.conv": 1.5}
    text = Module("text_encoder", "text_model.encoder.layers.0.mlp.fc1", (2, 2), "x")
    content = json.loads(adapter_config([(text, form), (text, form), (text, NativeForm("LOHA", (), 8, 8.0))]))
    assert content["target_modules"][0] == "encoder.layers.0.mlp.fc1"
    assert content["rank_pattern"] == {"encoder.layers.0.mlp.fc1": 8}


def test_no_path_ends_another_so_that_plain_names_target_one_module():
    for family in FAMILIES.values():
        for component in family.components:
            paths = [path.removeprefix("text_model.") for path in component.modules]
            ends = {path[place + 1 :] for path in paths for place, letter in enumerate(path) if letter == "."}
            assert not ends & set(paths)


def tiny(name: str) -> tuple[Any, Any]:
    source = open_source(KINDS / f"{name}.safetensors")
    return source, detect(source, family="tiny-sd15")


HELD = {
    "locon": 8, "locon_tucker": 12, "locon_rslora": 8, "lora_bias": 5, "loha": 8, "loha_tucker": 12, "lokr": 12,
    "lokr_full": 11, "lokr_tucker": 11, "lokr_decompose_both": 12, "dora_out": 12, "loha_dora_out": 8,
    "lokr_dora_out": 12, "partial_dora": 8, "ia3": 5, "oft_r": 7, "norm": 3,
}  # fmt: skip
"""LyCORIS' files -> how many of their modules peft holds; of all others none."""


def read_back(folder: Path, family: str) -> dict[str, tuple[Any, AdaptedModule]]:
    """What inspection finds in the written folders, by canonical name."""
    found = {}
    for path in sorted(folder.glob(f"*/{WEIGHTS_NAME}")):
        source = open_source(path)
        detected = detect(source, family=family)
        assert detected.ok and not detected.unexplained, detected.findings
        for module in detected.payload:
            component = path.parent.name.partition("-")[0]
            assert module.modules[0].name.startswith(f"{component}.")
            found[module.modules[0].name] = source, module
    return found


def relative(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


def compare_back(source: Any, payload: Any, folder: Path, family: str, tolerance: float) -> set[str]:
    """Compare every written module's deltas with the source's, on a random base; returns their names."""
    written = read_back(folder, family)
    for module in payload:
        start = 0
        base = {"weight": drawn({"w": (sum(m.shape[0] for m in module.modules), *module.modules[0].shape[1:])})["w"]}
        for target in module.modules:
            rows = slice(start, start := start + target.shape[0])
            # peft's own files do not tell whether a square convolution's (IA)³ is of inputs or of outputs
            unclear = module.algorithm == "ia3" and len(target.shape) == 4 and target.shape[0] == target.shape[1]
            if target.name in written and not unclear:
                expected = read_adapter(source, module).deltas(base)
                actual = read_adapter(*written[target.name]).deltas({"weight": base["weight"][rows]})
                assert actual.keys() == expected.keys()
                for part, delta in expected.items():
                    assert relative(actual[part], delta[rows]) <= tolerance, (target.name, part)
    return set(written)


@pytest.mark.parametrize("name", sorted(path.stem for path in KINDS.glob("*.safetensors")))
def test_files_of_every_kind_go_there_and_back(name, tmp_path):
    source, found = tiny(name)
    refused = write_folders(source, found.payload, tmp_path)
    written = compare_back(source, found.payload, tmp_path, "tiny-sd15", 1e-3 if "F16" in found.dtypes else 1e-6)
    assert len(written) == HELD.get(name, 0)
    assert written | refused.keys() == {target.name for module in found.payload for target in module.modules}
    for path in tmp_path.glob(f"*/{CONFIG_NAME}"):
        content = json.loads(path.read_text())
        if content["peft_type"] in PEFT_0_15:
            assert set(content) <= EVERY_KIND | PEFT_0_15[content["peft_type"]]


@pytest.mark.parametrize("name", sorted(HELD))
def test_the_same_file_gives_the_same_bytes(name, tmp_path):
    source, found = tiny(name)
    write_folders(source, found.payload, tmp_path / "a")
    write_folders(source, tuple(reversed(found.payload)), tmp_path / "b")
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.glob("*/*"))}
        for folder in (tmp_path / "a", tmp_path / "b")
    )
    assert first == second
    assert first


CORPUS_FILES = {
    "l_sd15_loha": 15, "l_sd15_loha_tucker": 15, "l_sdxl_loha_tucker": 12, "l_sd15_lokr_f8": 15,
    "l_sd15_lokr_fullmatrix": 15, "l_sd15_lokr_decompose_both": 15, "l_sd15_lokr_rslora": 15,
    "l_sd15_lokr_tucker": 13, "l_sd15_lokr_dora_out": 15, "l_sd15_locon_dora_out": 15, "l_sdxl_lokr_dora_out": 12,
    "l_sd15_ia3_full": 2, "ot_sdxl_legacy_oft2": 12, "ot_sdxl_legacy_loha": 17, "ot_sdxl_legacy_dora_out": 17,
    "p_sd15_lora": 13, "p_sd15_loha": 7, "p_sd15_loha_effconv": 13, "p_sd15_lokr": 13, "p_sd15_dora": 13,
    "a_sdxl_lokr": 16, "l_sdxl_lokr_full": 788, "l_sd15_loha_full": 264,
}  # fmt: skip


@pytest.mark.corpus
@pytest.mark.skipif(not CORPUS.is_dir(), reason="the shared corpus is not beside this checkout")
@pytest.mark.parametrize("name", CORPUS_FILES)
def test_real_files_go_there_and_back(name, tmp_path):
    source = open_source(CORPUS / "lora" / f"{name}.safetensors")
    found = detect(source)
    write_folders(source, found.payload, tmp_path)
    if len(found.payload) < 100:
        half = "F16" in found.dtypes
        written = compare_back(source, found.payload, tmp_path, found.family, 1e-3 if half else 1e-6)
    else:
        written = set(read_back(tmp_path, found.family))
    assert len(written) == CORPUS_FILES[name]
