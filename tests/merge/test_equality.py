"""A merged base is what PEFT's and diffusers' own merges make, and runs as base + adapter does."""

from __future__ import annotations

import copy

import pytest
import torch

import regraft
from regraft.tuners import LoraXConfig, SVDiffConfig
from regraft.tuners.foura import FouRAConfig, freeze
from tests import factories
from tests.merge.models import TOKENS, noise, peft_merge, state, tuned

peft = pytest.importorskip("peft")

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "lora": lambda t: peft.LoraConfig(r=4, lora_alpha=6, target_modules=t),
    "rslora": lambda t: peft.LoraConfig(r=4, use_rslora=True, target_modules=t),
    "dora": lambda t: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=t),
    "loha": lambda t: peft.LoHaConfig(r=2, alpha=3, target_modules=t),
    "lokr": lambda t: peft.LoKrConfig(r=2, alpha=3, target_modules=t),
    "oft": lambda t: peft.OFTConfig(r=0, oft_block_size=4, target_modules=t),
    "boft": lambda t: peft.BOFTConfig(boft_block_size=4, target_modules=t),
    "vera": lambda t: peft.VeraConfig(r=4, target_modules=t),
    "ia3": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=["down_proj"]),
    "lora-x": lambda t: LoraXConfig(r=6, core="full", target_modules=t),
    "svdiff": lambda t: SVDiffConfig(target_modules=t),
}


def assert_same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=0, atol=tolerance), key


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", CONFIGS)
def test_as_peft_merges(family, tmp_path):
    from transformers import LlamaForCausalLM

    model = tuned(CONFIGS[family](LINEAR), tmp_path)
    expected = model(TOKENS).logits
    wanted = peft_merge(copy.deepcopy(model))
    result = regraft.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out")
    assert_same(state(tmp_path / "out"), wanted)
    assert len(result.sites) == 36
    assert result.sites_refused == {}
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(merged(TOKENS).logits, expected, atol=1e-4)
    assert not torch.allclose(factories.llama()(TOKENS).logits, expected, atol=1e-2)


def test_frozen_foura(tmp_path):
    config = FouRAConfig(r=3, alpha=5.0, gate="soft", target_modules=LINEAR)
    model = tuned(config, tmp_path)
    freeze(model, [TOKENS])
    model.save_pretrained(tmp_path / "adapter")
    regraft.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out")
    assert_same(state(tmp_path / "out"), peft_merge(model))


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"bias": "all"}, "transformer.h.0.ln_1.bias"),
        ({"modules_to_save": ["ln_f"]}, "transformer.ln_f"),
        ({"trainable_token_indices": {"wte": [1, 5]}}, "transformer.wte"),
    ],
)
def test_biases_whole_modules_and_token_rows(options, moved, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **options)
    model = tuned(config, tmp_path, factories.gpt2)
    result = regraft.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out")
    found, wanted = state(tmp_path / "out"), peft_merge(model)
    assert_same(found, {k: wanted[k] for k in found})
    assert moved in {s.site for s in result.sites if s.moved}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_as_diffusers_fuses(tmp_path):
    from diffusers import UNet2DConditionModel

    unet = factories.unet()
    factories.save(unet, tmp_path / "base")
    targets = ["to_q", "to_out.0", "proj_in", "conv1"]
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets), "style")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith("lora_B.style.weight"):
                parameter.normal_(0, 0.2)
    unet.save_lora_adapter(tmp_path, "style")
    expected = unet(*noise()).sample
    unet.fuse_lora()
    unet.unload_lora()
    file = tmp_path / "pytorch_lora_weights.safetensors"
    regraft.merge(file, base=tmp_path / "base", output=tmp_path / "out")
    found = UNet2DConditionModel.from_pretrained(tmp_path / "out")
    assert_same(found.state_dict(), unet.state_dict())
    assert torch.allclose(found(*noise()).sample, expected, atol=1e-5)


def test_two_adapters_add_up_each_at_its_own_strength(tmp_path):
    for name, config in (("a", CONFIGS["lora"](LINEAR)), ("b", CONFIGS["lokr"](["q_proj"]))):
        tuned(config, tmp_path / name)
    base = state(tmp_path / "a" / "base")
    out = {}
    for name, strength in (("a", 0.5), ("b", -2.0)):
        regraft.merge(
            tmp_path / name / "adapter",
            base=tmp_path / "a" / "base",
            output=tmp_path / f"out-{name}",
            strength=strength,
        )
        out[name] = state(tmp_path / f"out-{name}")
    both = regraft.merge(
        [tmp_path / "a" / "adapter", tmp_path / "b" / "adapter"],
        base=tmp_path / "a" / "base",
        output=tmp_path / "out",
        strength=[0.5, -2.0],
    )
    assert [a["strength"] for a in both.adapters] == [0.5, -2.0]
    assert_same(state(tmp_path / "out"), {k: out["a"][k] + out["b"][k] - base[k] for k in base})
