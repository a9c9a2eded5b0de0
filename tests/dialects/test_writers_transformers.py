"""Transformers under two sets of names: what trainers, ComfyUI and diffusers make of the files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lab.native_models import ARCHITECTURES
from lab.native_names import build, converter
from regraft.adapters import Adapter, LowRank, Site, delta
from regraft.bases import open_base
from regraft.bases.native import native_parts
from regraft.dialects import holdable, load_adapter
from regraft.dialects.writers.kohya import NAMES
from regraft.dialects.writers.naming import model_of
from tests.dialects import rules
from tests.dialects.adapters import (
    assert_close,
    changed,
    every_kind,
    native_state,
    only,
    own_state,
)
from tests.dialects.loaders import write
from tests.factories import save

#: What a converter asks for and then throws away.
THROWN_AWAY = {"sana": ("pos_embed", "y_embedder.y_embedding")}
VARIANTS = {
    f"{name}-{i}": (name, *model)
    for name, architecture in ARCHITECTURES.items()
    for i, model in enumerate(architecture.models)
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by the name of the variant, made when asked for."""
    made = {}

    def get(variant):
        if variant not in made:
            _, class_name, config = VARIANTS[variant]
            folder = tmp_path_factory.mktemp("bases") / variant
            save(build(class_name, config), folder / "transformer")
            made[variant] = open_base(folder)
        return made[variant]

    return get


def back(name, state):
    """A native state dict under diffusers' names, by diffusers' own converter."""
    architecture = ARCHITECTURES[name]
    asked = {architecture.inside + k: v for k, v in state.items()}
    asked |= dict.fromkeys(THROWN_AWAY.get(name, ()), torch.zeros(1))
    return {k: v for k, v in converter(architecture)(asked).items() if v is not None}


def by_rules(name, base, path, dialect):
    """The base changed by a file as its readers would, under diffusers' names."""
    native = native_state(base)
    native_names = bool(native)
    if dialect == "kohya" and NAMES.get(model_of(base), ("native", ""))[0] == "diffusers":
        return rules.kohya(load_file(path), own_state(base))
    read = rules.kohya if dialect == "kohya" else rules.comfyui
    extra = () if dialect == "kohya" else (name,)
    if not native_names:
        return read(load_file(path), own_state(base), *extra)
    return back(name, read(load_file(path), native, *extra))


FORMS = [(v, d, "lora") for v in VARIANTS for d in ("kohya", "comfyui")]
FORMS += [(v, d, "diff") for v in ("flux-0", "sd3-0") for d in ("kohya", "comfyui")]


@pytest.mark.parametrize(("variant", "dialect", "form"), FORMS)
def test_readers_of_the_original_names_make_the_same_change(
    bases, variant, dialect, form, tmp_path
):
    base, name = bases(variant), VARIANTS[variant][0]
    adapter = every_kind(base, share=0.2 if name in ("hidream", "ltx-2") else 0.5)
    out = tmp_path / "out.safetensors"
    refused = holdable(adapter, base, dialect, form)
    written = write(adapter, base, out, dialect, form=form)
    assert written.refused == refused
    bare = {str(s) for s in adapter.updates if s.parameter not in ("weight", "bias")}
    assert set(refused) == (bare if dialect == "kohya" else set())
    held = only(adapter, {s for s in adapter.updates if str(s) not in refused})
    assert_close(by_rules(name, base, out, dialect), changed(base, held))
    # And what was written is read back as the same change.
    again = load_adapter(out, base)
    assert_close(changed(base, again), changed(base, held))


@pytest.mark.parametrize("variant", ["flux-0", "z-image-0", "lumina-2-0"])
@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
def test_a_part_of_a_fused_layer_alone(bases, variant, dialect, tmp_path):
    base, name = bases(variant), VARIANTS[variant][0]
    adapter = every_kind(base, share=0.2)
    write(adapter, base, tmp_path / "out.safetensors", dialect)
    refused = holdable(adapter, base, dialect)
    held = only(adapter, {s for s in adapter.updates if str(s) not in refused})
    assert_close(by_rules(name, base, tmp_path / "out.safetensors", dialect), changed(base, held))


def fused_file(base, dtype=torch.float32, *, blocks=False):
    """A kohya file with a LoRA on every fused layer; ``blocks``: B is block-diagonal."""
    generator = torch.Generator().manual_seed(1)
    state, alpha = {}, torch.tensor(2.0)
    for (module, parameter), parts in native_parts(base, "transformer").items():
        if parameter != "weight" or len(base.at(parts[0].site).shape) != 2:
            continue
        rows = sum(base.at(p.site).shape[0] for p in parts)
        columns, rank = base.at(parts[0].site).shape[1], 2
        if blocks and len(parts) > 1:
            rank *= len(parts)
            up = torch.zeros(rows, rank)
            for i, part in enumerate(parts):
                for first, last in part.rows:
                    up[first:last, 2 * i : 2 * i + 2] = torch.randn(
                        last - first, 2, generator=generator
                    )
        else:
            up = torch.randn(rows, rank, generator=generator)
        down = torch.randn(rank, columns, generator=generator)
        name = "lora_unet_" + module.replace(".", "_")
        state[f"{name}.lora_down.weight"] = down.to(dtype)
        state[f"{name}.lora_up.weight"] = up.to(dtype)
        state[f"{name}.alpha"] = alpha.clone()
    return state


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("variant", ["flux-0", "sd3-0", "hunyuan-video-0", "lumina-2-0"])
def test_fused_to_split_to_fused_gives_the_same_tensors(bases, variant, blocks, tmp_path):
    from safetensors.torch import save_file

    base = bases(variant)
    state = fused_file(base, torch.bfloat16, blocks=blocks)
    save_file(state, tmp_path / "in.safetensors")
    adapter = load_adapter(tmp_path / "in.safetensors", base)
    assert any(s.module.endswith("attn.to_k") for s in adapter.updates)
    write(adapter, base, tmp_path / "out.safetensors", "kohya", dtype=torch.bfloat16)
    again = load_file(tmp_path / "out.safetensors")
    assert set(again) == set(state)
    for key, tensor in state.items():
        assert again[key].dtype == tensor.dtype, key
        assert torch.equal(again[key], tensor), key


def test_a_shared_a_is_kept_once(bases, tmp_path):
    base = bases("flux-0")
    down, updates = torch.randn(4, 24), {}
    for part in ("to_q", "to_k", "to_v"):
        site = Site("transformer", f"transformer_blocks.0.attn.{part}")
        updates[site] = LowRank(torch.randn(24, 4), down, 0.5, (24, 24))
    write(Adapter(updates, name="a"), base, tmp_path / "a.safetensors", "kohya")
    held = load_file(tmp_path / "a.safetensors")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    assert held[f"{name}.lora_down.weight"].equal(down)
    assert held[f"{name}.lora_up.weight"].shape == (72, 4)
    back = load_adapter(tmp_path / "a.safetensors", base)
    for site, update in updates.items():
        assert torch.allclose(delta(back.updates[site]), delta(update), atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("flux-0", ("lora_unet_double_blocks_0_img_attn_qkv",
                    "diffusion_model.single_blocks.0.linear1")),
        ("sd3-0", ("lora_unet_joint_blocks_0_x_block_attn_qkv",
                   "diffusion_model.joint_blocks.0.context_block.attn.qkv")),
        ("hunyuan-video-0", ("lora_unet_double_blocks_0_img_mlp_fc1",
                             "diffusion_model.double_blocks.0.img_attn_qkv")),
        ("wan-0", ("lora_unet_blocks_0_self_attn_q", "diffusion_model.blocks.0.cross_attn.k")),
        ("z-image-0", ("lora_unet_layers_0_attention_to_q",
                       "diffusion_model.layers.0.attention.qkv")),
        ("qwen-image-0", ("lora_unet_transformer_blocks_0_attn_to_q",
                          "diffusion_model.transformer_blocks.0.attn.to_q")),
        ("hunyuan-video-2", ("lora_unet_transformer_blocks_0_attn_to_q", "")),
    ],
)  # fmt: skip
def test_well_known_names(bases, variant, names, tmp_path):
    base = bases(variant)
    if variant == "hunyuan-video-2":
        assert model_of(base) == "framepack"
    for dialect, name in zip(("kohya", "comfyui"), names, strict=True):
        write(every_kind(base), base, tmp_path / f"{dialect}.safetensors", dialect)
        keys = set(load_file(tmp_path / f"{dialect}.safetensors"))
        ends = (".lora_down.weight",) if dialect == "kohya" else (".lora_A.weight",)
        assert not name or {name + end for end in ends} <= keys
