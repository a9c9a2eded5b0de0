"""Adapters of other families, and keys that fit nothing: named, never dropped."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from regraft.adapters.families import families
from regraft.dialects import inspect_file, load_adapter
from regraft.dialects.inspect import kind_of_name
from regraft.dialects.keys import split_key, suffixes
from regraft.dialects.source import open_source
from regraft.errors import (
    FamilyNotYet,
    InputNotFound,
    MalformedFile,
    NonFiniteTensor,
    NotAnAdapter,
    PickleRefused,
    UnknownKeys,
)
from tests.dialects.loaders import random_adapter, write
from tests.factories import UNET_3X3, UNET_LINEAR

K = "lora_unet_mid_block_attentions_0_proj_in"
P = "base_model.model.model.layers.0.self_attn.q_proj"
PAIR = (f"{K}.lora_down.weight", f"{K}.lora_up.weight")
FAMILIES = [
    ("textual inversion", ("emb_params",)),
    ("textual inversion", ("clip_l", "clip_g")),
    ("textual inversion", ("<my-cat>",)),
    ("textual inversion", ("mycat",)),
    ("prompt", ("prompt_embeddings",)),
    ("prompt", ("base_model.prompt_encoder.default.embedding.weight",)),
    ("shared-matrix", (f"{P}.randlora_lambda",)),
    ("shared-matrix", (f"{P}.vblora_logits_A",)),
    ("VeRA", (f"{P}.vera_lambda_b", f"{P}.vera_lambda_d")),
    ("Scaled OFT", (f"{K}.oft_R.weight", f"{K}.oft_R.scaled_oft")),
    ("bottleneck", ("roberta.encoder.layer.0.adapter_down.0.weight",)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "keys"), FAMILIES)
def test_another_family_is_named(family, keys, tmp_path):
    save_file({k: torch.ones(4, 768) for k in keys}, tmp_path / "a.safetensors")
    for call in (open_source, lambda path: load_adapter(path, None)):
        with pytest.raises(FamilyNotYet) as caught:
            call(tmp_path / "a.safetensors")
        assert family in str(caught.value)
        assert caught.value.tensor in keys
        assert caught.value.fix


#: Roles that every family's tensors may have as suffixes of keys, and the family they mean.
READ = {
    "dora": (f"{P}.lora_A.weight", f"{P}.lora_B.weight", f"{P}.lora_magnitude_vector"),
    "dora ": ("unet.x.lora_A.weight", "unet.x.lora_B.weight", "unet.x.magnitude"),
    "loha": tuple(f"{K}.hada_{r}" for r in ("w1_a", "w1_b", "w2_a", "w2_b")),
    "lokr": (f"{K}.lokr_w1", f"{K}.lokr_w2_a", f"{K}.lokr_w2_b", f"{K}.alpha"),
    "lora": (*PAIR, f"{K}.lora_mid.weight"),
    "lora ": (*PAIR, f"{K}.diff_b"),
    "oft": (f"{K}.oft_blocks", f"{K}.alpha"),
    "oft ": (f"{P}.oft_R.default.weight",),
    "boft": (f"{P}.boft_R", f"{P}.boft_s"),
    "full": (f"{K}.diff", f"{K}.diff_b"),
    "full ": (f"{K}.w_norm", f"{K}.b_norm"),
    "ia3": (f"{P}.ia3_l",),
    "ia3 ": (f"{K}.weight", f"{K}.on_input"),
    "glora": tuple(f"{K}.{r}.weight" for r in ("a1", "a2", "b1", "b2")),
    "glora ": (f"{P}.glora_A.default.Xd", f"{P}.glora_A.default.Xu", f"{P}.glora_B.zeros"),
    "vera": (f"{P}.vera_lambda_b", f"{P}.vera_lambda_d", "base_model.vera_A", "base_model.vera_B"),
    "adalora": (f"{P}.lora_A.default", f"{P}.lora_B.default", f"{P}.lora_E.default"),
    "t-lora": (f"{K}.q_layer.weight", f"{K}.p_layer.weight", f"{K}.lambda_layer"),
    "svdiff": ("mid_block.attentions.0.proj_in.delta",),
    "foura": ("unet.x.foura_A", "unet.x.foura_B", "unet.x.foura_mask"),
    "fourierft": (f"{P}.fourierft_spectrum",),
    "hra": (f"{P}.hra_u",),
    "whole ": (f"{P}.ln_tuning_layers.weight", f"{P}.ln_tuning_layers.bias"),
    "whole  ": ("diffusion_model.x.set_weight",),
    "whole": ("double_blocks.0.img_attn.norm.query_norm.scale",),
}


@pytest.mark.parametrize(("family", "keys"), READ.items())
def test_tensors_say_which_family_they_are(family, keys, tmp_path):
    save_file({k: torch.ones(4, 4) for k in keys}, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    assert source.family == family.strip()
    held = {t for roles in source.modules.values() for t in roles.values()}
    assert held == set(keys)
    assert not source.refused


def test_every_role_of_every_family_has_a_key():
    # A start or base triple is written by no program; the writer of a plain LoRA folds it.
    unwritten = {"init_down", "init_up", "vera_a", "vera_b", "ia3_weight"}
    roles = {r for f in families() for need in f.needs for r in need}
    roles |= {r for f in families() for r in f.may if not r.startswith("t_base")}
    assert roles - unwritten - {"whole_bias", "whole"} <= set(suffixes().values())


def peft_folder(folder, config, keys=(f"{P}.lora_A.weight", f"{P}.lora_B.weight")):
    folder.mkdir()
    save_file({k: torch.ones(4, 4) for k in keys}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


CONFIGS = [
    *[(t, {"peft_type": t}) for t in ("PROMPT_TUNING", "PREFIX_TUNING", "RANDLORA", "OSF",
                                      "SOMETHING_NEW")],
    ("block-diagonal", {"use_bdlora": {"x": 1}}),
    ("activated", {"alora_invocation_tokens": [1]}),
    ("replication", {"layer_replication": [[0, 1]]}),
    ("KaSA", {"kasa_config": {"x": 1}}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "config"), CONFIGS, ids=[c[0] for c in CONFIGS])
def test_a_config_of_another_family_is_named(family, config, tmp_path):
    folder = peft_folder(tmp_path / "a", {"peft_type": "LORA", "r": 4, **config})
    with pytest.raises(FamilyNotYet, match=family) as caught:
        open_source(folder)
    assert caught.value.file == str(folder / "adapter_config.json")
    # diffusers keeps the same settings in a file's metadata.
    if "peft_type" not in config:
        meta = json.dumps({f"unet.{k}": v for k, v in {"r": 4, **config}.items()})
        state = {f"unet.x.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
        save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": meta})
        with pytest.raises(FamilyNotYet, match=family):
            open_source(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("start", "family"),
    [
        *[(start, "lora") for start in (True, False, "gaussian", "eva", "orthogonal")],
        ("pissa", "pissa"),
        ("pissa_niter_4", "pissa"),
        ("olora", "olora"),
        ("corda", "mutated"),
        ("lora_ga", "mutated"),
        ("loftq", "mutated"),
    ],
)
def test_the_start_of_a_lora_decides_what_it_is(start, family, tmp_path):
    config = {"peft_type": "LORA", "r": 4, "init_lora_weights": start}
    assert open_source(peft_folder(tmp_path / "a", config)).family == family
    meta = json.dumps({"unet.r": 4, "unet.init_lora_weights": start, "text_encoder.r": 4})
    state = {f"unet.x.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": meta})
    assert open_source(tmp_path / "a.safetensors").family == family


def test_a_dora_without_its_magnitudes_is_not_taken_for_a_lora(tmp_path):
    folder = peft_folder(tmp_path / "a", {"peft_type": "LORA", "r": 4, "use_dora": True})
    with pytest.raises(MalformedFile, match="no magnitude"):
        open_source(folder)


@pytest.mark.parametrize("extra", ["mystery", f"{K}.lora_extra", f"{K}.lora_down.bias", f"{P}.w"])
def test_unknown_keys_are_an_error(extra, tmp_path):
    save_file({k: torch.ones(4, 4) for k in (*PAIR, extra)}, tmp_path / "a.safetensors")
    with pytest.raises(UnknownKeys, match="1 tensor") as caught:
        open_source(tmp_path / "a.safetensors")
    assert extra in str(caught.value)


def test_unknown_keys_of_a_peft_folder_are_an_error(tmp_path):
    keys = (f"{P}.lora_A.weight", f"{P}.lora_B.weight", f"{P}.weight")
    folder = peft_folder(tmp_path / "a", {"peft_type": "LORA", "r": 4}, keys)
    with pytest.raises(UnknownKeys, match=r"q_proj\.weight"):
        open_source(folder)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (PAIR[:1], "lacks up"),
        (PAIR[1:], "lacks down"),
        ((*PAIR, "lora_unet_x.alpha"), "lacks its factors"),
        ((f"{P}.lora_embedding_A",), "lacks embedding_b"),
        (("x.lora_x_U", "x.lora_x_S"), "lacks v"),
        ((*PAIR, f"{K}.lora_A.weight"), "two tensors"),
        (("x.lora_A.weight", "x.lora_B.weight", "x.lora_x_U"), "do not belong"),
        ((*PAIR, "x.lora_x_U", "x.lora_x_S", "x.lora_x_V"), "some LoRA-X"),
    ],
)
def test_incomplete_modules(keys, says, tmp_path):
    save_file({k: torch.ones(4, 4) for k in keys}, tmp_path / "a.safetensors")
    with pytest.raises(MalformedFile, match=says) as caught:
        open_source(tmp_path / "a.safetensors")
    assert caught.value.fix


@pytest.mark.parametrize(
    "state",
    [{}, {"model.layers.0.weight": torch.ones(2, 2)}, {"a.weight": torch.ones(768)}],
)
def test_no_adapter_at_all(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(NotAnAdapter):
        open_source(tmp_path / "a.safetensors")


def test_folders_without_an_adapter(tmp_path):
    with pytest.raises(InputNotFound, match="adapter"):
        open_source(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(PickleRefused):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "1", "[" * 100_000])
def test_broken_diffusers_metadata(text, tmp_path):
    state = {f"unet.x.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(MalformedFile, match="lora_adapter_metadata"):
        open_source(tmp_path / "a.safetensors")


def test_nan_and_integers_in_an_adapter(sd, tmp_path):
    path = tmp_path / "a.safetensors"
    name = f"lora_unet_{UNET_LINEAR.replace('.', '_')}"
    good = {
        f"{name}.lora_down.weight": torch.ones(2, 32),
        f"{name}.lora_up.weight": torch.ones(32, 2),
    }
    for key in good:
        save_file({**good, key: torch.full_like(good[key], float("nan"))}, path)
        with pytest.raises(NonFiniteTensor) as caught:
            load_adapter(path, sd)
        assert caught.value.tensor == key
        save_file({**good, key: good[key].to(torch.int8)}, path)
        with pytest.raises(MalformedFile, match="quantised"):
            load_adapter(path, sd)


def test_what_inspect_says(sd, tmp_path):
    adapter = random_adapter(sd, {f"unet.{UNET_LINEAR}": 3, f"unet.{UNET_3X3}": 2}, scale=0.5)
    adapter.metadata = {"modelspec.trigger_phrase": "zzz", "ss_output_name": "my style"}
    for dialect in ("kohya", "diffusers", "lora-x"):
        path = tmp_path / f"{dialect}.safetensors"
        written = write(adapter, sd, path, dialect)
        facts = inspect_file(path)
        assert facts["dialect"] == dialect
        assert facts["sites"] == 2
        assert facts["ranks"] == {"2": 1, "3": 1}
        assert facts["sites_by_kind"] == {"attn1.to_q": 1, "resnet.conv1": 1}
        assert facts["trigger_words"] == "zzz"
        assert facts["carried_by_regraft"] is True
        assert facts["sha256"] == written.sha256
        assert facts["autov2"] == written.sha256[:10]
        assert len(facts["autov3"]) == 12
        assert facts["zero_sites"] == []
        json.dumps(facts)


KINDS = {
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": "attn1.to_q",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_out_0": "attn2.to_out",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "attn2.to_out",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj": "ff.in",
    "unet.x.transformer_blocks.0.ff.net.2": "ff.out",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": "mlp.fc1",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": "self_attn.q_proj",
    "base_model.model.model.layers.11.mlp.gate_proj": "mlp.gate_proj",
    "base_model.model.transformer.h.0.attn.c_attn": "attn.c_attn",
    "lora_unet_down_blocks_0_resnets_0_conv1": "resnet.conv1",
    "lora_unet_input_blocks_1_0_in_layers_2": "resnet.in_layers.2",
    "unet.down_blocks.0.downsamplers.0.conv": "downsampler",
    "lora_unet_input_blocks_3_0_op": "downsampler",
    "lora_unet_mid_block_attentions_0_proj_in": "proj_in",
    "some.thing.3.else": "thing.else",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_kinds_read_alike_in_every_dialect(name, kind):
    assert kind_of_name(name) == kind


WRITERS = {
    "sd-scripts": (PAIR, {"ss_network_module": "networks.lora"}),
    "musubi-tuner": (PAIR, {"ss_network_module": "networks.lora_wan"}),
    "LyCORIS": (PAIR, {"ss_network_module": "lycoris.kohya"}),
    "OneTrainer": (PAIR, {"ot_branch": "master"}),
    "ai-toolkit": (PAIR, {"software": '{"name": "ai-toolkit"}'}),
    "regraft": (PAIR, {"regraft": "{}", "ss_network_module": "networks.lora"}),
    "sd-scripts or musubi-tuner": (PAIR, {}),
    "diffusers": (("unet.x.lora_A.weight", "unet.x.lora_B.weight"), {}),
    "diffusers before 0.22": (
        ("unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q_lora.up.weight"),
        {},
    ),
    "x-flux": (
        tuple(f"double_blocks.0.processor.qkv_lora1.{w}.weight" for w in ("down", "up")),
        {},
    ),
    "PEFT": ((f"{P}.lora_A.weight", f"{P}.lora_B.weight"), {}),
    "unknown": (("x.y.lora_A.weight", "x.y.lora_B.weight"), {}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_writer_is_known_by_metadata_or_habit(writer, tmp_path):
    keys, metadata = WRITERS[writer]
    save_file({k: torch.ones(4, 4) for k in keys}, tmp_path / "a.safetensors", metadata)
    assert open_source(tmp_path / "a.safetensors").writer == writer


WRAPPED = (
    "base_model.model.x.lora_A.default.weight",
    "base_model.model.x.lora_A.my_style.weight",
    "base_model.model._orig_mod.x.lora_A.weight",
    "base_model.model._fsdp_wrapped_module.x.lora_A.weight",
)


@pytest.mark.parametrize("key", WRAPPED)
def test_names_of_adapters_and_wrappers_are_left_out(key):
    assert split_key(key) == ("base_model.model.x", "down")


def test_two_adapters_in_one_file_are_not_mixed(tmp_path):
    keys = [f"{P}.lora_{x}.{name}.weight" for x in "AB" for name in ("one", "two")]
    save_file({k: torch.ones(4, 4) for k in keys}, tmp_path / "a.safetensors")
    with pytest.raises(MalformedFile, match="two tensors"):
        open_source(tmp_path / "a.safetensors")
