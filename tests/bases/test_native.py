"""One base under two sets of names: the original checkpoint and the diffusers folder agree."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from lab.native_models import ARCHITECTURES
from lab.native_names import MAPS, build, converter, written
from regraft.adapters import Site
from regraft.bases import open_base
from regraft.bases.native import Part, architecture_of_names, native_parts
from regraft.files import TensorFile
from tests.factories import clip, gpt2, ldm_file, llama, pipeline_folder, save, unet

VARIANTS = [
    pytest.param(name, *model, id=f"{name}-{i}")
    for name, architecture in ARCHITECTURES.items()
    for i, model in enumerate(architecture.models)
]
#: What a converter asks for and then throws away.
THROWN_AWAY = {"sana": ("pos_embed", "y_embedder.y_embedding")}


def key_of(module, parameter):
    return f"{module}.{parameter}" if module else parameter


def native_state(base):
    """A base's parameters as its original checkpoint has them."""
    state = {}
    for (module, parameter), parts in native_parts(base, "transformer").items():
        count = sum(base.at(p.site).shape[0] for p in parts)
        rows = torch.full((count, *base.at(parts[0].site).shape[1:]), torch.nan)
        for part in parts:
            numbers = base.read(part.site)
            cuts = part.rows or ((0, count),)
            pieces = numbers.split([last - first for first, last in cuts])
            for (first, last), piece in zip(cuts, pieces, strict=True):
                rows[first:last] = piece
        state[key_of(module, parameter)] = rows
    return state


def opened(tmp_path, class_name, config):
    """A model and the base of its diffusers folder."""
    model = build(class_name, config)
    return model, open_base(save(model, tmp_path / "folder"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tables_are_what_diffusers_says(name):
    assert (MAPS / f"{name}.json").read_text() == written(ARCHITECTURES[name])


@pytest.mark.parametrize(("name", "class_name", "config"), VARIANTS)
def test_diffusers_turns_every_native_parameter_back(tmp_path, name, class_name, config):
    architecture = ARCHITECTURES[name]
    model, base = opened(tmp_path, class_name, config)
    state = native_state(base)
    if not state:
        assert name in ("hidream", "qwen-image")  # only one set of names
        return
    asked = {
        architecture.inside + k: v
        for k, v in state.items()
        if not re.search(architecture.ignored, k)
    }
    asked |= dict.fromkeys(THROWN_AWAY.get(name, ()), torch.zeros(1))
    back = converter(architecture)(asked)
    own = {k: v for k, v in model.state_dict().items() if not re.search(architecture.ignored, k)}
    made = {k: v for k, v in back.items() if v is not None}
    assert set(own) == set(made)
    for key, tensor in own.items():
        assert tensor.equal(made[key]), key


@pytest.mark.parametrize(("name", "class_name", "config"), VARIANTS)
def test_the_original_file_is_the_same_base(tmp_path, name, class_name, config):
    model, base = opened(tmp_path, class_name, config)
    state = native_state(base) or model.state_dict()
    prefix = {"cosmos-2": "net.", "flux": "model.diffusion_model.", "wan": "diffusion_model."}
    path = tmp_path / "original.safetensors"
    save_file({prefix.get(name, "") + k: v.contiguous() for k, v in state.items()}, path)
    other = open_base(path)
    assert other.components == ("transformer",)
    assert set(other.weights) == set(base.weights)
    assert set(other.others) == set(base.others)
    for site in [*base.weights, *base.others]:
        assert other.at(site).shape == base.at(site).shape, site
        assert other.read(site).equal(base.read(site)), site
    assert native_parts(other, "transformer") == native_parts(base, "transformer")
    modules = {s.module for s in (*base.weights, *base.others)}
    assert architecture_of_names(modules) == name
    assert architecture_of_names({k.rpartition(".")[0] for k in state}) == name


def flux(tmp_path, **changes):
    class_name, config = ARCHITECTURES["flux"].models[0]
    return opened(tmp_path, class_name, {**config, **changes})


def test_fused_layers_are_ranges_of_rows(tmp_path):
    _, base = flux(tmp_path, num_layers=11)
    parts = native_parts(base, "transformer")

    def at(module):
        return Site("transformer", module)

    block = "single_transformer_blocks.2"
    assert parts["single_blocks.2.linear1", "weight"] == (
        Part(at(f"{block}.attn.to_q"), ((0, 24),)),
        Part(at(f"{block}.attn.to_k"), ((24, 48),)),
        Part(at(f"{block}.attn.to_v"), ((48, 72),)),
        Part(at(f"{block}.proj_mlp"), ((72, 168),)),
    )
    swapped = Part(at("norm_out.linear"), ((24, 48), (0, 24)))
    assert parts["final_layer.adaLN_modulation.1", "weight"] == (swapped,)
    ten = parts["double_blocks.10.img_attn.qkv", "bias"]
    assert ten[1] == Part(
        Site("transformer", "transformer_blocks.10.attn.to_k", "bias"), ((24, 48),)
    )
    assert parts["double_blocks.10.img_attn.norm.query_norm", "scale"] == (
        Part(at("transformer_blocks.10.attn.norm_q")),
    )


def test_a_site_of_a_fused_layer_reads_its_own_rows_only(tmp_path, monkeypatch):
    _, base = flux(tmp_path)
    path = tmp_path / "original.safetensors"
    save_file(native_state(base), path)
    site = Site("transformer", "single_transformer_blocks.0.attn.to_k")
    read = []
    plain = TensorFile.read
    monkeypatch.setattr(
        TensorFile, "read", lambda self, t, **how: read.append(t) or plain(self, t, **how)
    )
    other = open_base(path)
    assert not read
    other.read(site)
    assert read == ["single_blocks.0.linear1.weight[24:48]"]


def test_a_file_with_text_encoders_inside(tmp_path):
    _, base = flux(tmp_path)
    first, second = clip(1), clip(2)
    state = {f"model.diffusion_model.{k}": v for k, v in native_state(base).items()}
    for name, model in (("clip_l", first), ("t5xxl", second)):
        state |= {f"text_encoders.{name}.transformer.{k}": v for k, v in model.state_dict().items()}
    state["vae.encoder.conv_in.weight"] = torch.zeros(2, 2, 3, 3)
    path = tmp_path / "all in one.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    whole = open_base(path)
    assert set(whole.components) == {"transformer", "text_encoder", "text_encoder_2"}
    site = Site("text_encoder_2", "text_model.encoder.layers.1.mlp.fc1")
    assert whole.read(site).equal(second.state_dict()["encoder.layers.1.mlp.fc1.weight"])


def test_sd3_keeps_three_text_encoders_apart(tmp_path):
    class_name, config = ARCHITECTURES["sd3"].models[1]
    _, base = opened(tmp_path, class_name, config)
    state = {f"model.diffusion_model.{k}": v for k, v in native_state(base).items()}
    for i, name in enumerate(("t5xxl", "clip_g", "clip_l")):
        state |= {
            f"text_encoders.{name}.transformer.{k}": v for k, v in clip(i).state_dict().items()
        }
    path = tmp_path / "sd3.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    whole = open_base(path)
    for i, component in ((2, "text_encoder"), (1, "text_encoder_2"), (0, "text_encoder_3")):
        site = Site(component, "text_model.encoder.layers.1.mlp.fc1")
        own = clip(i).state_dict()["encoder.layers.1.mlp.fc1.weight"]
        assert whole.read(site).equal(own)


def test_a_unet_has_two_sets_of_names_as_well(tmp_path):
    folder = pipeline_folder(tmp_path / "sd")
    base = open_base(folder)
    parts = native_parts(base, "unet")
    original = TensorFile(ldm_file(tmp_path / "sd.safetensors"))
    inside = "model.diffusion_model."
    assert {inside + key_of(*k) for k in parts} == {k for k in original if k.startswith(inside)}
    for (module, parameter), (part,) in parts.items():
        stored = original.read(f"{inside}{module}.{parameter}").float()
        assert base.read(part.site).equal(stored)
    assert native_parts(base, "text_encoder") == {}
    assert native_parts(base, "transformer") == {}


@pytest.mark.parametrize("make", [llama, gpt2, clip, unet])
def test_other_models_are_not_taken_for_one(make):
    modules = {k.rpartition(".")[0] for k in make().state_dict()}
    assert architecture_of_names(modules) is None


def test_a_relative_is_not_taken_for_one():
    """PixArt's names are LTX's, but for the way in."""
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8,
            cross_attention_dim=16, caption_channels=8, norm_num_groups=4,
        )  # fmt: skip
    assert architecture_of_names({k.rpartition(".")[0] for k in model.state_dict()}) is None


def test_strange_names_do_no_harm():
    huge = "9" * 5000
    assert architecture_of_names([f"double_blocks.{huge}.img_attn.qkv", "", "."]) is None
    assert architecture_of_names([]) is None
