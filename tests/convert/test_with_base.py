"""Conversions that need the base, on a small Stable Diffusion pipeline."""

from __future__ import annotations

import pytest
import torch

import regraft
from regraft.adapters import delta
from tests import factories
from tests.convert.files import lora, rand, save
from tests.methods.worlds import new_library

CONV = "lora_unet_mid_block_resnets_0_conv1"
Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return regraft.open_base(factories.pipeline_folder(tmp_path_factory.mktemp("sd") / "base"))


def weight(base, end):
    return next(w for s, w in base.weights.items() if str(s).endswith(end))


@pytest.fixture
def mixed(base, tmp_path):
    """A LoHa on a 3×3 convolution (its kernel flattened), a DoRA, and a plain LoRA."""
    m, n, *kernel = weight(base, "mid_block.resnets.0.conv1").shape
    flat = n * torch.Size(kernel).numel()
    sides = {"a": (m, 2), "b": (2, flat)}
    tensors = {
        f"{CONV}.hada_w{i}_{x}": rand(*shape, seed=i) for i in (1, 2) for x, shape in sides.items()
    }
    m, n = weight(base, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q").shape
    tensors |= lora(Q, m, n, 3, 1.5) | {f"{Q}.dora_scale": rand(m, 1).abs()}
    m, n = weight(base, "text_model.encoder.layers.0.self_attn.q_proj").shape
    return save(tmp_path / "mixed.safetensors", tensors | lora(TEXT, m, n, 2, 4.0))


def changes(path, base):
    return {s: delta(u) for s, u in regraft.load_adapter(path, base).updates.items()}


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_families_in_one_file_become_one_lora(mixed, base, tmp_path, dialect):
    out = tmp_path / "o.safetensors"
    result = regraft.convert(
        mixed,
        output=out,
        base=base,
        dialect=dialect,
        rank="exact",
        library=new_library(tmp_path / "cache"),
    )
    before, after = changes(mixed, base), changes(out, base)
    assert before.keys() == after.keys()
    for site, want in before.items():
        assert float((after[site] - want).norm() / want.norm()) < 1e-5
    assert set(result.families) == {"loha", "dora", "lora"}
    assert regraft.load_adapter(out, base).family == "lora"
    found = regraft.verify(out, adapter=mixed, base=base, library=new_library(tmp_path / "cache"))
    assert found.status == "passed", found.how


def test_full_differences_of_every_family(mixed, base, tmp_path):
    out = tmp_path / "o.safetensors"
    regraft.convert(
        mixed, output=out, base=base, form="diff", library=new_library(tmp_path / "cache")
    )
    before, after = changes(mixed, base), changes(out, base)
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[s], before[s], atol=1e-6) for s in before)


def test_what_one_rule_cuts_is_accounted_for_family_by_family(mixed, base, tmp_path):
    result = regraft.convert(
        mixed, base=base, rank=2, dry_run=True, library=new_library(tmp_path / "cache")
    )
    kept = {f: own["energy_kept"] for f, own in result.families.items()}
    assert kept["lora"] == 1 > kept["dora"]
    shares = {site.family: site.share for site in result.sites}
    total = sum(kept[f] * shares[f] for f in kept)
    assert result.energy_kept == pytest.approx(total, rel=1e-6)
    assert result.output is None
