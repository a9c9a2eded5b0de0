"""Hidden states are those of the library's own models, one row per input, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regraft.activations import block_names, cka_by_depth, gather
from regraft.errors import BadOption
from tests.factories import TINY_SD, TINY_XL, gpt2, llama, unet

TOKENS = torch.arange(12).reshape(2, 6)


def image_run(size=8, batch=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, size, size, generator=g)
    condition = torch.randn(batch, 5, 16, generator=g)
    return lambda model: model(x, torch.tensor(10), condition)


def test_the_rows_are_a_language_models_own_hidden_states():
    model = llama()
    found = gather(model, lambda m: m(input_ids=TOKENS))
    assert list(found) == [f"model.layers.{i}" for i in range(12)]
    with torch.no_grad():
        states = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    # The last of transformers' states has gone through the final norm; the others are the blocks'.
    for i in range(11):
        assert torch.allclose(found[f"model.layers.{i}"], states[i + 1].mean(dim=1), atol=1e-6)


def test_positions_are_kept_when_they_correspond():
    model = llama()
    found = gather(model, lambda m: m(input_ids=TOKENS), pool="positions")
    with torch.no_grad():
        states = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    assert torch.allclose(found["model.layers.0"], states[1].flatten(0, 1), atol=1e-6)


def test_padding_counts_for_nothing():
    model = llama()
    padded = torch.cat([TOKENS, torch.full((2, 3), 1)], dim=1)
    mask = (torch.arange(9) < 6).long().repeat(2, 1)
    plain = gather(model, lambda m: m(input_ids=TOKENS))
    for pool in ("mean", "positions"):
        short = gather(model, lambda m: m(input_ids=TOKENS), pool=pool)
        found = gather(model, lambda m: m(input_ids=padded, attention_mask=mask), pool=pool)
        for name in plain:
            assert torch.allclose(found[name], short[name], atol=1e-5)


@pytest.mark.parametrize("config", [TINY_SD, TINY_XL], ids=["sd", "xl"])
def test_a_u_net_has_its_resnets_attentions_and_resamplers(config):
    names = block_names(unet(config))
    first = "down_blocks.0" if config is TINY_SD else "down_blocks.1"
    assert f"{first}.attentions.0" in names
    assert "mid_block.resnets.0" in names
    assert "up_blocks.0.upsamplers.0" in names
    assert not any("transformer_blocks" in name for name in names)


def test_a_u_nets_states_come_in_the_order_of_the_forward_pass():
    model = unet(TINY_SD)
    found = gather(model, image_run())
    assert set(found) == set(block_names(model))
    order = [name.split(".")[0] for name in found]
    assert order == sorted(order, key=["down_blocks", "mid_block", "up_blocks"].index)
    kept: list[torch.Tensor] = []
    block = model.mid_block.resnets[0]
    handle = block.register_forward_hook(lambda m, a, out: kept.append(out))
    with torch.no_grad():
        image_run()(model)
    handle.remove()
    assert torch.allclose(found["mid_block.resnets.0"], kept[0].mean(dim=(2, 3)), atol=1e-6)


def test_other_sizes_give_comparable_rows():
    small, large = (gather(unet(TINY_SD), image_run(size, batch=6)) for size in (8, 16))
    assert {n: x.shape for n, x in small.items()} == {n: x.shape for n, x in large.items()}
    assert cka_by_depth(small, small) == pytest.approx(1)


def test_calls_are_appended_in_order():
    model = gpt2()

    def run(m):
        for row in TOKENS:
            m(input_ids=row[None])

    one, many = gather(model, lambda m: m(input_ids=TOKENS)), gather(model, run)
    assert list(one) == ["transformer.h.0", "transformer.h.1"]
    for name in one:
        assert torch.allclose(one[name], many[name], atol=1e-6)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_behind_even_after_an_error():
    model = llama().train()
    model.model.layers[0].eval()
    modes, before = [m.training for m in model.modules()], hooks(model)

    def run(m):
        assert not any(part.training for part in m.modules())
        m(input_ids=TOKENS)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        gather(model, run)
    assert [m.training for m in model.modules()] == modes
    assert hooks(model) == before


def test_blocks_can_be_named_and_must_exist():
    model = llama()
    found = gather(
        model, lambda m: m(input_ids=TOKENS), blocks=["model.embed_tokens", "model.norm"]
    )
    assert list(found) == ["model.embed_tokens", "model.norm"]
    with pytest.raises(BadOption, match="nowhere"):
        gather(model, lambda m: None, blocks=["nowhere"])
    with pytest.raises(BadOption, match="no blocks"):
        gather(nn.Linear(2, 2), lambda m: None)
    with pytest.raises(BadOption, match="pooling"):
        gather(model, lambda m: None, pool="max")


def test_an_output_that_is_no_hidden_state_is_said():
    class Odd(nn.Module):
        def forward(self, x):
            return ["text"]

    with pytest.raises(BadOption, match="hidden state"):
        gather(nn.Sequential(Odd()), lambda m: m(torch.ones(1, 2)), blocks=["0"])
