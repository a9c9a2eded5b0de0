"""Cross-attention maps: what they are, that watching changes nothing, and that gradients flow."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from regraft.errors import CannotRun
from regraft.training.attention import CrossAttention
from tests import factories


@pytest.fixture
def unet():
    return factories.unet()


def called(unet, rows=3):
    made = torch.Generator().manual_seed(1)
    width = unet.config.cross_attention_dim
    return {
        "sample": torch.randn(rows, 4, 8, 8, generator=made),
        "timestep": torch.tensor([1, 500, 900])[:rows],
        "encoder_hidden_states": torch.randn(rows, 5, width, generator=made),
    }


def test_a_map_is_the_softmax_of_queries_and_keys(unet):
    maps, call, seen = CrossAttention(), called(unet), {}
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    layer.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(hidden=args[0], **kwargs), with_kwargs=True
    )
    layers = [m for m in unet.modules() if getattr(m, "is_cross_attention", False)]
    with torch.no_grad():
        plain = unet(**call).sample
        with maps.watching(unet):
            maps.begin([0, 2])
            watched = unet(**call).sample
        found = maps.take()
    assert torch.equal(plain, watched)
    assert len(found) == len(layers) > 1
    for one in found:
        assert one.shape[0] == 2
        assert one.shape[-1] == 5
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:-1]))
    q, k = layer.to_q(seen["hidden"][[0, 2]]), layer.to_k(seen["encoder_hidden_states"][[0, 2]])
    q, k = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (q, k))
    wanted = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
    torch.testing.assert_close(found[0].flatten(1, 2), wanted)


def test_watching_ends_with_the_block_whatever_happens(unet):
    before = dict(unet.attn_processors)
    maps = CrossAttention()
    call = called(unet) | {"sample": None}
    with pytest.raises(AttributeError), maps.watching(unet):
        unet(**call)
    assert {k: id(v) for k, v in unet.attn_processors.items()} == {
        k: id(v) for k, v in before.items()
    }
    with pytest.raises(CannotRun, match="no cross-attention"), maps.watching(torch.nn.Linear(1, 1)):
        pass


def test_gradients_are_the_same_with_gradient_checkpointing(unet):
    maps, call, found = CrossAttention(), called(unet, 2), []
    unet.train()
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        with maps.watching(unet):
            maps.begin([1])
            out = unet(**call).sample
            (out.square().mean() + sum(m.square().mean() for m in maps.take())).backward()
        layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q
        found.append(layer.weight.grad.clone())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)
