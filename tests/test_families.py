from __future__ import annotations

from collections import defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from lora_convert.families import FAMILIES, Component, Family, Module
from lora_convert.families.table import parse_table

UNET_TABLES = ("unet_sd15", "unet_sd21", "unet_sdxl", "unet_sdxl_refiner")
OPENCLIP_TABLES = ("openclip_h", "openclip_bigg")
TABLES = (*UNET_TABLES, "clip_l", *OPENCLIP_TABLES)
COMPONENTS = [
    pytest.param(family, component, id=f"{family.name}-{component.name}")
    for family in FAMILIES.values()
    for component in family.components
]


def modules_of(table: str) -> dict[str, Module]:
    text = resources.files("lora_convert.families").joinpath(f"{table}.txt").read_text(encoding="utf-8")
    return {module.path: module for module in parse_table("model", text)}


@pytest.mark.parametrize(("family", "component"), COMPONENTS)
def test_table_is_the_live_model(family: Family, component: Component) -> None:
    pytest.importorskip("diffusers")
    from lora_convert.runtime.architectures import build_component, weight_modules

    live = weight_modules(build_component(family.name, component.name))
    assert [(path, module.shape) for path, module in component.modules.items()] == [
        (path, tuple(module.get_parameter("weight").shape)) for path, module in live.items()
    ]


@pytest.mark.parametrize(("family", "component"), COMPONENTS)
def test_embeddings_are_marked(family: Family, component: Component) -> None:
    pytest.importorskip("diffusers")
    from torch.nn import Embedding

    from lora_convert.runtime.architectures import build_component, weight_modules

    live = weight_modules(build_component(family.name, component.name))
    for path, module in component.modules.items():
        assert (module.mark == "embedding") == isinstance(live[path], Embedding), path


def test_committed_tables_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    from lora_convert.runtime import tables

    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_check_names_the_table_that_differs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    from lora_convert.runtime import tables

    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(tables, "UNETS", {})
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
    (tmp_path / "clip_l.txt").write_text("conv_in 1x1 conv_in\n")
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().err.startswith("clip_l.txt differs from the installed classes; run `python -m ")


@pytest.mark.parametrize("table", UNET_TABLES)
def test_unet_originals_agree_with_the_single_file_converter(table: str) -> None:
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")
    modules = modules_of(table)
    checkpoint = {
        f"model.diffusion_model.{module.original}.{parameter}": f"{path}.{parameter}"
        for path, module in modules.items()
        for parameter in ("weight", "bias")
    }
    config: dict[str, Any] = {"layers_per_block": 2}
    if "add_embedding.linear_1" in modules:
        config["addition_embed_type"] = "text_time"
    converted = converters.convert_ldm_unet_checkpoint(checkpoint, config)
    # Each marker must come out under the very name it carries.
    assert {name: name for name in checkpoint.values()} == converted


@pytest.mark.parametrize("table", OPENCLIP_TABLES)
def test_openclip_originals_agree_with_the_single_file_converter(table: str) -> None:
    torch = pytest.importorskip("torch")
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")
    modules = modules_of(table)
    width = modules["text_projection"].shape[0]
    checkpoint: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    for number, (path, module) in enumerate(modules.items()):
        marker = torch.full((width, width if module.mark == "transposed" else 1), number)
        marker[:, 0] += torch.arange(width) * len(modules)
        name = f"prefix.{module.original}"
        expected[f"{path}.weight"] = marker
        if module.rows:
            stacked = checkpoint.setdefault(f"{name}_weight", torch.zeros(3 * width, 1, dtype=marker.dtype))
            stacked[slice(*module.rows)] = marker
        elif module.mark == "transposed":
            checkpoint[name] = marker.T
        elif path.endswith("position_embedding"):
            checkpoint[name] = marker
        else:
            checkpoint[f"{name}.weight"] = marker
    converted = converters.convert_open_clip_checkpoint(None, checkpoint, prefix="prefix.")
    assert converted.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], converted[name])] == []


@pytest.mark.parametrize("table", TABLES)
def test_row_blocks_tile_the_original(table: str) -> None:
    blocks: dict[str, list[Module]] = defaultdict(list)
    for module in modules_of(table).values():
        blocks[module.original].append(module)
    for original, modules in blocks.items():
        if len(modules) == 1:
            assert modules[0].rows is None, original
            continue
        end = 0
        for module in sorted(modules, key=lambda module: module.rows or ()):
            assert module.rows == (end, end + module.shape[0])
            assert module.shape[1:] == modules[0].shape[1:]
            end += module.shape[0]


def test_fused_rows_are_query_key_value_though_clip_registers_key_value_query() -> None:
    attention = "text_model.encoder.layers.3.self_attn"
    modules = modules_of("openclip_bigg")
    assert [path for path in modules if path.startswith(attention)] == [
        f"{attention}.{leaf}" for leaf in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    assert {
        leaf: modules[f"{attention}.{leaf}_proj"].rows for leaf in ("q", "k", "v", "out")
    } == {"q": (0, 1280), "k": (1280, 2560), "v": (2560, 3840), "out": None}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name", "shape", "original"),
    [
        ("sd15", "unet.up_blocks.0.upsamplers.0.conv", (1280, 1280, 3, 3), "output_blocks.2.1.conv"),
        ("sd15", "unet.up_blocks.1.upsamplers.0.conv", (1280, 1280, 3, 3), "output_blocks.5.2.conv"),
        ("sd15", "unet.mid_block.attentions.0.proj_in", (1280, 1280, 1, 1), "middle_block.1.proj_in"),
        ("sd21", "unet.mid_block.attentions.0.proj_in", (1280, 1280), "middle_block.1.proj_in"),
        ("sdxl", "unet.add_embedding.linear_2", (1280, 1280), "label_emb.0.2"),
        (
            "sdxl",
            "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
            (1280, 2048),
            "input_blocks.8.1.transformer_blocks.9.attn2.to_k",
        ),
        ("sdxl-refiner", "unet.down_blocks.2.downsamplers.0.conv", (1536, 1536, 3, 3), "input_blocks.9.0.op"),
        ("sdxl", "text_encoder_2.text_projection", (1280, 1280), "text_projection"),
    ],
)
def test_known_modules(family: str, name: str, shape: tuple[int, ...], original: str) -> None:
    module = FAMILIES[family].modules[name]
    assert (module.shape, module.original) == (shape, original)


def test_text_projection_belongs_to_the_second_encoder_only() -> None:
    assert [name for name in FAMILIES["sdxl"].modules if name.endswith("text_projection")] == [
        "text_encoder_2.text_projection"
    ]
    assert FAMILIES["sd15"].component("text_encoder_2") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b 2x3 c", [("a.b", (2, 3), "c")]),
        ("# only a comment\n\na 4 b # and here\n", [("a", (4,), "b")]),
        ("a.{0-2} 1 b.{3,5,7}", [("a.0", (1,), "b.3"), ("a.1", (1,), "b.5"), ("a.2", (1,), "b.7")]),
        (
            "a.{0,1}.{x,y} 1 b.{0-3}",
            [("a.0.x", (1,), "b.0"), ("a.0.y", (1,), "b.1"), ("a.1.x", (1,), "b.2"), ("a.1.y", (1,), "b.3")],
        ),
        ("a.{9-11} 1 a.{9-11}", [(f"a.{n}", (1,), f"a.{n}") for n in (9, 10, 11)]),
    ],
)
def test_patterns(text: str, expected: list[tuple[str, tuple[int, ...], str]]) -> None:
    assert [(module.path, module.shape, module.original) for module in parse_table("c", text)] == expected


def test_marks_and_names() -> None:
    (module,) = parse_table("unet", "norm_out.linear 6x3 final.1 swapped")
    assert (module.name, module.mark, module.rows) == ("unet.norm_out.linear", "swapped", None)


def test_row_blocks_may_differ_in_height_and_stand_in_any_order() -> None:
    modules = parse_table("c", "mlp 12x3 linear1[2]\n{k,q} 3x3 linear1[{1,0}]")
    assert {module.path: (module.original, module.rows) for module in modules} == {
        "mlp": ("linear1", (6, 18)),
        "k": ("linear1", (3, 6)),
        "q": ("linear1", (0, 3)),
    }


def test_walk_order_is_first_appearance_of_siblings_and_value_of_numbers() -> None:
    text = "blocks.{1-10}.attn.{k,q} 1 x.{1-10}.{k,q}\nblocks.{0-10}.conv 1 x.{0-10}.conv\nhead 1 head\n"
    order = [module.path for module in parse_table("c", text)]
    assert order[:4] == ["blocks.0.conv", "blocks.1.attn.k", "blocks.1.attn.q", "blocks.1.conv"]
    assert order[-4:] == ["blocks.10.attn.k", "blocks.10.attn.q", "blocks.10.conv", "head"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 b\nconv_in 3x3", "line 2 is not `path shape original [mark]`: 'conv_in 3x3'"),
        ("a 3x3 b rotated", "line 1 is not `path shape original [mark]`"),
        ("a 3x b", "line 1 is not `path shape original [mark]`"),
        ("a.{0-2} 1 b.{0-1}", "line 1 expands to 3 paths and 2 originals"),
        ("a.{2-0} 1 b.{2-0}", "line 1 expands to 0 paths and 0 originals"),
        ("a 1 b\na 1 c", "path a is given twice"),
        ("a 1 b\nc 1 b", "original b is given twice"),
        ("a 1 qkv[0]\nb 1 qkv[2]", "row blocks of qkv are numbered [0, 2], not from 0 without gaps"),
    ],
)
def test_errors_say_where_and_what(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_table("c", text)
    assert message in str(caught.value)
