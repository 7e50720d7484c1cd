"""identify(): what files are, why, and what they could also be."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import FIXTURES, LORA, lora, manifest, names_of, trainer_name

import lora_convert
from lora_convert.families import FAMILIES
from lora_convert.inspect.spelling import PREFIXES

ALGORITHMS = {
    "a_sdxl_lokr": {"lokr": 16},
    "c_sd15_comfy_extract": {"lora+full": 3, "lora": 3, "full": 2},
    "d_sdxl_peft_dora": {"lora+dora": 6},
    "k_sd15_oft": {"oft": 3},
    "l_sd15_ia3_full": {"ia3": 14},
    "l_sd15_locon_norm": {"lora": 6, "norm": 3},
    "l_sd15_lokr_f8": {"lokr": 15},
    "l_sd15_tlora": {"tlora": 3},
    "lo19_sd15_ia3": {"ia3": 8},
}
SPELLINGS = {
    "d_sd15_attnprocs_te_linearlayer": "diffusers",
    "ot_sd15_comfy": "comfyui",
    "ot_sdxl_omi": "omi",
    "p_sd15_lora": "peft",
    "simo_sd15_safetensors": "cloneofsimo",
    "k_sd21_lora": "kohya",
}

RECORDS = manifest(LORA)
Q = "attn1_to_q"
UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
TE = "lora_te_text_model_encoder_layers_0_"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["name"])
def test_real_files_are_recognised(record):
    found = lora_convert.identify(LORA / record["file"])
    assert (found.kind, found.family, found.trainer) == ("lora", record["family"], trainer_name(record))
    assert not found.unexplained
    assert found.ok
    assert found.algorithms == ALGORITHMS.get(record["name"], {"lora": record["n_modules"]})
    assert found.spelling == SPELLINGS.get(record["name"], found.spelling)
    assert found.evidence
    assert json.loads(json.dumps(found.as_dict()))["family"] == record["family"]


def test_json_has_the_documented_fields():
    content = lora_convert.identify(LORA / "k_sd15_excerpt_f32.safetensors").as_dict()
    wanted = "schema file kind family trainer spelling algorithms components ranks alphas dtypes evidence rivals"
    assert set(wanted.split()) | {"unexplained", "metadata", "findings", "modules", "trigger_words"} <= content.keys()
    assert content["schema"] == 1
    assert content["trigger_words"] == ["sks"]
    assert content["training"]["steps"] == "80"
    assert content["components"] == {"unet": 10, "text_encoder": 2}
    assert content["alphas"] == {"1": 3, "1.5": 3, "2": 3, "4": 3}


def test_self_attention_alone_fits_two_families(write):
    path = write(lora(UNET + Q, 320, 320, alpha=1))
    found = lora_convert.identify(path)
    assert found.family is None
    (finding,) = found.findings
    assert finding.name == "ambiguous-family"
    assert "sd15" in finding.message and "sd21" in finding.message
    assert {rival.family for rival in found.rivals} == {"sd15", "sd21"}
    assert lora_convert.identify(path, family="sd21").family == "sd21"


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sd_v1"}, "sd15"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd21"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd21"),
        ({"ss_v2": "True"}, "sd21"),
    ],
)
def test_metadata_breaks_a_tie_and_is_named(write, metadata, family):
    found = lora_convert.identify(write(lora(UNET + Q, 320, 320), metadata))
    assert found.family == family
    key, value = next(iter(metadata.items()))
    assert any(key in sentence and value in sentence for sentence in found.evidence)
    assert [rival.reason for rival in found.rivals[:1]] == ["all names and shapes fit"]


def test_metadata_does_not_overrule_the_tensors(write):
    found = lora_convert.identify(
        write(lora(f"{UNET}attn2_to_k", 320, 768), {"ss_base_model_version": "sdxl_base_v1-0"})
    )
    assert found.family == "sd15"


def test_clip_l_alone_fits_sd15_and_sdxl(write):
    found = lora_convert.identify(write(lora(f"{TE}self_attn_q_proj", 768, 768)))
    assert names_of(found.findings) == {"ambiguous-family"}
    assert {rival.family for rival in found.rivals} == {"sd15", "sdxl"}


def test_a_convolution_stored_as_one_tells_sd15(write):
    tensors = {
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": np.ones((4, 320, 1, 1), np.float16),
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": np.ones((320, 4, 1, 1), np.float16),
    }
    assert lora_convert.identify(write(tensors)).family == "sd15"


def test_every_unexplained_tensor_is_named_and_does_not_hide_others(write):
    tensors = lora(UNET + Q, 320, 320) | lora(f"{UNET}attn2_to_k", 320, 768) | lora(f"{UNET}attn2_to_v", 320, 768)
    tensors[f"{UNET}attn2_to_qq.lora_up.weight"] = np.ones((320, 4), np.float16)
    tensors[f"{UNET}attn2_to_k.lora_dwn.weight"] = np.ones((4, 320), np.float16)
    del tensors[f"{UNET}attn2_to_v.lora_up.weight"]
    found = lora_convert.identify(write(tensors))
    by_name = {(finding.name, finding.subject) for finding in found.findings}
    assert ("unexplained-tensor", f"{UNET}attn2_to_qq.lora_up.weight") in by_name
    assert ("unexplained-tensor", f"{UNET}attn2_to_k.lora_dwn.weight") in by_name
    assert ("missing-partner", f"{UNET}attn2_to_v.lora_down.weight") in by_name
    assert not found.ok


@pytest.mark.parametrize("left", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_half_a_module_is_a_missing_partner(write, left):
    tensors = lora(f"{UNET}attn2_to_k", 320, 768, alpha=1)
    broken = lora(f"{UNET}attn2_to_v", 320, 768, alpha=1)
    tensors[f"{UNET}attn2_to_v.{left}"] = broken[f"{UNET}attn2_to_v.{left}"]
    (finding,) = lora_convert.identify(write(tensors)).findings
    assert (finding.name, finding.subject) == ("missing-partner", f"{UNET}attn2_to_v.{left}")


def test_a_shape_of_another_family_names_the_tensor(write):
    tensors = lora(f"{UNET}attn2_to_k", 320, 768) | lora(f"{UNET}attn2_to_v", 320, 1024)
    tensors |= lora(f"{UNET.replace('attentions_0', 'attentions_1')}attn2_to_v", 320, 768)
    (finding,) = lora_convert.identify(write(tensors)).findings
    assert (finding.name, finding.subject) == ("shape-misfit", f"{UNET}attn2_to_v.lora_down.weight")
    assert "768" in finding.message and "1024" in finding.message


def test_ranks_of_down_and_up_must_agree(write):
    tensors = lora(f"{UNET}attn2_to_k", 320, 768)
    tensors[f"{UNET}attn2_to_k.lora_up.weight"] = np.ones((320, 3), np.float16)
    found = lora_convert.identify(write(tensors))
    assert [(f.name, f.subject) for f in found.findings] == [("shape-misfit", f"{UNET}attn2_to_k.lora_up.weight")]


def test_one_module_under_two_names_is_a_duplicate(write):
    diffusers = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    sgm = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    (finding,) = lora_convert.identify(write(lora(diffusers, 640, 2048) | lora(sgm, 640, 2048))).findings
    assert finding.name == "duplicate-module"
    assert diffusers in finding.message + finding.subject and sgm in finding.message + finding.subject


def test_two_namings_of_different_modules_may_share_a_file(write):
    tensors = lora("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", 640, 2048)
    tensors |= lora("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v", 640, 2048)
    found = lora_convert.identify(write(tensors))
    assert (found.family, found.ok, len(found.payload)) == ("sdxl", True, 2)


@pytest.mark.parametrize("channels", [9, 8])
def test_an_inpainting_base_is_a_variant(write, channels):
    tensors = lora(f"{UNET}attn2_to_k", 320, 768)
    tensors["lora_unet_conv_in.lora_down.weight"] = np.ones((4, channels, 3, 3), np.float16)
    tensors["lora_unet_conv_in.lora_up.weight"] = np.ones((320, 4, 1, 1), np.float16)
    found = lora_convert.identify(write(tensors))
    assert (found.family, found.ok) == ("sd15", True)
    (finding,) = found.findings
    assert finding.name == "base-variant" and str(channels) in finding.message


@pytest.mark.parametrize(
    ("name", "out", "width", "family", "target"),
    [
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", 320, 768, "sd15", "down_blocks.0.attentions.0"),
        ("lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768, "sd15", "down_blocks.0"),
        ("lycoris_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768, "sd15", "down_blocks.0"),
        ("lora_te_encoder_layers_0_mlp_fc1", 4096, 1024, "sd21", "text_model.encoder.layers.0.mlp.fc1"),
        ("lora_te2_encoder_layers_31_mlp_fc1", 5120, 1280, "sdxl", "text_model.encoder.layers.31.mlp.fc1"),
        ("input_blocks.4.1.transformer_blocks.0.attn2.to_k", 640, 2048, "sdxl", "down_blocks.1.attentions.0"),
        ("clip_g.transformer.text_model.encoder.layers.3.mlp.fc2", 1280, 5120, "sdxl", "text_model.encoder.layers.3"),
        ("text_encoders.clip_h.transformer.text_model.encoder.layers.3.mlp.fc2", 1024, 4096, "sd21", "text_model"),
        ("base_model.model.text_model.encoder.layers.3.mlp.fc2", 1280, 5120, "sdxl", "text_model.encoder.layers.3"),
    ],
)
def test_spellings_without_a_corpus_file(write, name, out, width, family, target):
    found = lora_convert.identify(write(lora(name, out, width)), family=family)
    assert found.ok, found.findings
    assert found.payload[0].modules[0].path.startswith(target)


def test_a_fused_original_is_its_row_blocks(write):
    tensors = lora("lora_te2_transformer_resblocks_0_attn_in_proj", 3840, 1280)
    found = lora_convert.identify(write(tensors), family="sdxl")
    assert [module.path.rsplit(".", 1)[1] for module in found.payload[0].modules] == ["q_proj", "k_proj", "v_proj"]


def test_old_text_encoder_processors(write):
    tensors = {
        f"text_encoder.text_model.encoder.layers.0.self_attn.{part}_lora.{half}.weight": np.ones(shape, np.float32)
        for part in ("to_q", "to_k", "to_v", "to_out")
        for half, shape in (("down", (4, 768)), ("up", (768, 4)))
    }
    found = lora_convert.identify(write(tensors), family="sd15")
    assert {m.modules[0].path.rsplit(".", 1)[1] for m in found.payload} == {"q_proj", "k_proj", "v_proj", "out_proj"}


KINDS = {
    "ip-adapter": {"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)},
    "checkpoint": {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3), "first_stage_model.x.weight": (8,)},
    "controlnet": {"control_model.zero_convs.0.0.weight": (8, 8, 1, 1)},
    "vae": {
        "decoder.conv_in.weight": (8, 4, 3, 3),
        "encoder.conv_in.weight": (8, 3, 3, 3),
        "quant_conv.weight": (8, 8),
    },
    "text-encoder": {"text_model.embeddings.token_embedding.weight": (8, 8)},
    "optimizer": {"optimizer_state_dict.state.0.exp_avg": (4, 768)},
    "unknown": {"completely.other": (2, 2)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_said_to_be_so_and_not_converted(write, tmp_path, kind):
    path = write({name: np.ones(shape, np.float32) for name, shape in KINDS[kind].items()})
    found = lora_convert.identify(path)
    assert (found.kind, found.ok) == (kind, True)
    assert names_of(found.findings) & {"unsupported-kind", "unknown-format"}
    result = lora_convert.convert(path, tmp_path / "out")
    assert result.status == "refused" and not (tmp_path / "out").exists()


def test_a_faceid_lora_is_an_ip_adapter(write):
    tensors = {f"ip_adapter.{n}.to_{p}_lora.{h}.weight": (8, 8) for n in (0, 1) for p in "qkv" for h in ("down", "up")}
    tensors |= {f"{n}.to_{p}_lora.{h}.weight": (8, 8) for n in (0, 1) for p in "qkv" for h in ("down", "up")}
    assert lora_convert.identify(write({n: np.ones(s, np.float32) for n, s in tensors.items()})).kind == "ip-adapter"


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "Stable Diffusion 3"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
    ],
)
def test_a_base_without_a_table_is_named(write, tmp_path, name, base):
    path = write(lora(name, 64, 64))
    found = lora_convert.identify(path)
    assert (found.kind, found.family) == ("lora", None)
    assert base in next(f.message for f in found.findings if f.name == "unknown-format")
    assert lora_convert.convert(path, tmp_path / "out").status == "refused"


def test_hashes(write):
    import hashlib
    import zlib

    path = write(lora(f"{UNET}attn2_to_k", 320, 768))
    data = path.read_bytes()
    hashes = lora_convert.identify(path, hashes=True).hashes
    assert hashes["sha256"] == hashlib.sha256(data).hexdigest()
    assert hashes["autov2"] == hashes["sha256"][:10]
    assert hashes["autov3"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]
    assert hashes["crc32"] == f"{zlib.crc32(data):08x}"


def test_peft_without_its_config_says_what_cannot_be_known(tmp_path):
    alone = tmp_path / "adapter_model.safetensors"
    alone.write_bytes((LORA / "p_sd15_lora.safetensors").read_bytes())
    found = lora_convert.identify(alone)
    assert [(f.name, f.severity) for f in found.findings] == [("alpha-unknown", "warning")]
    assert {module.scale for module in found.payload} == {1.0}
    config = LORA / "p_sd15_lora.adapter_config.json"
    assert {m.scale for m in lora_convert.identify(alone, config=config).payload} == {0.5}
    (tmp_path / "adapter_config.json").write_bytes(config.read_bytes())
    assert {m.scale for m in lora_convert.identify(alone).payload} == {0.5}


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 1}}, 0.25),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^to_k": 1}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"attn2\.to_k": 1, "to_k": 2}}, 0.25),
        ({"r": 4}, 2.0),
    ],
)
def test_peft_scale_rules(write, tmp_path, fields, scale):
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    path = write({f"{name}.lora_A.weight": np.ones((4, 768), "f4"), f"{name}.lora_B.weight": np.ones((320, 4), "f4")})
    config = tmp_path / "c.json"
    config.write_text(json.dumps(fields))
    assert lora_convert.identify(path, config=config).payload[0].scale == scale


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"lora_alpha": "x"}', '{"alpha_pattern": {"(a+)+b": 1}}', '{"alpha_pattern": 3}', "[" * 100000],
)
def test_a_bad_config_is_a_finding(write, tmp_path, text):
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    path = write({f"{name}.lora_A.weight": np.ones((4, 768), "f4"), f"{name}.lora_B.weight": np.ones((320, 4), "f4")})
    config = tmp_path / "c.json"
    config.write_text(text)
    assert "unreadable-config" in names_of(lora_convert.identify(path, config=config).findings)


def test_thelastben_is_told_by_its_alpha(write):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    assert lora_convert.identify(write(lora(name, 1280, 2048, alpha=20000))).trainer == "thelastben"
    assert lora_convert.identify(write(lora(name, 1280, 2048, alpha=8))).trainer is None


def test_fixtures_stay_small():
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) <= 15_000_000


def test_no_module_name_begins_like_a_prefix():
    """Names without a prefix are looked up only if no prefix fits."""
    prefixes = tuple(prefix.text for prefix in PREFIXES)
    for family in FAMILIES.values():
        for module in family.modules.values():
            assert not f"{module.path}.".startswith(prefixes) and not f"{module.original}.".startswith(prefixes)


def test_a_header_without_component_names_applies_to_all(write):
    """diffusers' `model.save_lora_adapter` writes names and header without a component."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{name}.lora_A.weight": np.ones((4, 768), "f4"), f"{name}.lora_B.weight": np.ones((320, 4), "f4")}
    header = {"r": 4, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    found = lora_convert.identify(write(factors, {"lora_adapter_metadata": json.dumps(header)}))
    assert (found.ok, found.payload[0].scale, found.findings) == (True, 4.0, ())
    lost = lora_convert.identify(write(factors, {"lora_adapter_metadata": json.dumps({"other.r": 4})}, name="other"))
    assert names_of(lost.findings) == {"alpha-unknown"}


def test_text_encoders_do_not_make_another_base_sdxl(write):
    tensors = {}
    for number in range(3):
        tensors |= lora(f"lora_unet_joint_blocks_{number}_x_block_attn_qkv", 64, 64)
    for number in range(12):
        tensors |= lora(f"lora_te1_text_model_encoder_layers_{number}_self_attn_q_proj", 768, 768)
        tensors |= lora(f"lora_te2_text_model_encoder_layers_{number}_self_attn_q_proj", 1280, 1280)
    found = lora_convert.identify(write(tensors))
    assert found.family is None and "Stable Diffusion 3" in found.findings[-1].message


def test_metadata_decides_before_stored_dimensions(write):
    """Self-attention and 1x1 convolutions saved as matrices look like SD 2.x; the metadata knows better."""
    tensors = lora(UNET + Q, 320, 320) | lora("lora_unet_down_blocks_0_attentions_0_proj_in", 320, 320)
    assert lora_convert.identify(write(tensors, {"ss_base_model_version": "sd_v1"})).family == "sd15"
    plain = lora_convert.identify(write(tensors, name="plain"))
    assert plain.family == "sd21" and any("stored as those of sd21" in sentence for sentence in plain.evidence)


def test_our_output_does_not_invent_a_trainer(write, tmp_path):
    path = write(lora(f"{UNET}attn2_to_k", 320, 768, alpha=1))
    assert lora_convert.identify(path).trainer is None
    output = lora_convert.convert(path, tmp_path / "o.safetensors").outputs[0].path
    assert lora_convert.identify(output).trainer is None


def test_known_companions_of_a_lora_are_named(write):
    tensors = lora(f"{UNET}attn2_to_k", 320, 768) | {"bundle_emb.x.string_to_param.*": np.full((2, 768), 0.02, "f4")}
    found = lora_convert.identify(write(tensors))
    assert [one.token for one in found.embeddings] == ["x"] and not found.findings
    (finding,) = lora_convert.identify(write(tensors | {"bundle_emb.x.step": np.ones((2, 3, 4), "f4")})).findings
    assert finding.name == "unexplained-tensor" and "--skip 'bundle_emb.*'" in finding.fix


def test_dora_lost_on_the_way_is_said(write):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{name}.lora_A.weight": np.ones((4, 768), "f4"), f"{name}.lora_B.weight": np.ones((320, 4), "f4")}
    header = {"unet.r": 4, "unet.lora_alpha": 4, "unet.use_dora": True, "unet.target_modules": ["to_k"]}
    found = lora_convert.identify(write(factors, {"lora_adapter_metadata": json.dumps(header)}))
    assert [(f.name, f.severity) for f in found.findings] == [("missing-partner", "warning")]
