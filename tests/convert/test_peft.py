"""Converted PEFT folders, loaded by PEFT: the model does what it did, without its base at hand."""

from __future__ import annotations

import pytest
import torch

import regraft
from tests import factories

IDS = torch.arange(6)[None]


def config(kind):
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    return {
        "loha": LoHaConfig(
            r=3, alpha=6, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2}
        ),
        "lokr": LoKrConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"]),
        "rslora": LoraConfig(
            r=4,
            lora_alpha=3,
            use_rslora=True,
            target_modules=["q_proj", "embed_tokens"],
            alpha_pattern={"layers.3.self_attn.q_proj": 9},
        ),
        "conv1d": LoraConfig(
            r=4, lora_alpha=3, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"]
        ),
    }[kind]


@pytest.mark.parametrize("kind", ["loha", "lokr", "rslora", "conv1d"])
def test_peft_folders_are_baked_without_the_base(tmp_path, kind):
    from peft import PeftModel, get_peft_model

    make = factories.gpt2 if kind == "conv1d" else factories.llama
    model = get_peft_model(make(), config(kind)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "a")
    result = regraft.convert(tmp_path / "a", output=tmp_path / "o", rank="exact")
    again = PeftModel.from_pretrained(make(), tmp_path / "o").eval()
    with torch.no_grad():
        before, plain, after = model(IDS).logits, make()(IDS).logits, again(IDS).logits
    assert float((after - before).norm() / (before - plain).norm()) < 1e-5
    assert result.energy_kept == 1
    assert regraft.verify(tmp_path / "o", adapter=tmp_path / "a").status == "passed"
