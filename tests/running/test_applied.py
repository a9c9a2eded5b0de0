"""An adapter on a running base: the same as in users' loaders, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from regraft.adapters import Adapter, LowRank, Site, energy
from regraft.demo import pair
from regraft.demo.sampler import attach, detach
from regraft.dialects import load_adapter
from regraft.errors import CannotRun, ShapeMismatch, SitesNotInBase
from regraft.running import Pictures, applied, denoising_losses, open_model, random_like
from tests import factories
from tests.running.bases import language_folder, stable_diffusion_folder


@pytest.fixture(scope="module")
def target():
    return open_model(pair.TARGET)


@pytest.fixture(scope="module")
def adapter():
    return load_adapter(pair.ADAPTER, pair.TARGET)


def forward(model):
    images, captions = pair.load_heldout()
    return denoising_losses(model, Pictures(images[:2], captions[:2]), timesteps=1)


def state(model):
    return {
        f"{part}.{name}": weight.clone()
        for part, module in model.modules.items()
        for name, weight in module.state_dict().items()
    }


def same(before, after):
    return before.keys() == after.keys() and all(w.equal(after[n]) for n, w in before.items())


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_it_does_what_diffusers_own_loader_does(target, adapter, strength):
    loaded = open_model(pair.TARGET)
    attach(loaded.pipeline, pair.ADAPTER, strength)
    expected = forward(loaded)
    with applied(target, adapter, strength):
        found = forward(target)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    if strength:
        assert not torch.allclose(found, forward(target), atol=1e-2)


def test_it_does_what_peft_does(tmp_path):
    """A linear update on a Llama, rank 2, alpha 4."""
    from peft import LoraConfig, get_peft_model

    model = open_model(language_folder(tmp_path / "lm"))
    wrapped = get_peft_model(
        factories.llama(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "embed_tokens"])
    )
    torch.manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", tmp_path / "lm")
    ids = torch.tensor([[0, 5, 9, 3]])
    with torch.no_grad(), applied(model, adapter):
        found = model.model(ids).logits
        expected = wrapped.eval()(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_weights_come_back_bit_for_bit(target, adapter):
    before = state(target)
    with applied(target, adapter, 0.7):
        assert not same(before, state(target))
    assert same(before, state(target))
    with pytest.raises(RuntimeError, match="inside"), applied(target, adapter):
        raise RuntimeError("inside")
    assert same(before, state(target))


def test_nested_updates_add_up(target, adapter):
    with applied(target, adapter, 0.75):
        expected = forward(target)
    with applied(target, adapter, 0.5):
        half = state(target)
        with applied(target, adapter, 0.25):
            assert torch.allclose(forward(target), expected, atol=1e-5)
        assert same(half, state(target))


def test_a_shared_weight_changes_in_the_adapters_module_only(tmp_path):
    model = open_model(language_folder(tmp_path / "lm"))
    inner = model.model.model
    model.model.lm_head.weight = inner.embed_tokens.weight
    update = LowRank(torch.ones(40, 1), torch.ones(1, 16), 1.0, (40, 16), "embedding")
    before = model.model.lm_head.weight.clone()
    with applied(model, Adapter({Site("", "model.embed_tokens"): update})):
        assert torch.allclose(inner.embed_tokens.weight, before + 1)
        assert model.model.lm_head.weight.equal(before)
    assert inner.embed_tokens.weight is model.model.lm_head.weight


def test_text_encoders_are_found_under_either_name(tmp_path):
    model = open_model(stable_diffusion_folder(tmp_path / "sd", xl=True))
    for part in ("text_encoder", "text_encoder_2"):
        site = Site(part, "text_model.encoder.layers.0.self_attn.q_proj")
        update = LowRank(torch.ones(16, 1), torch.ones(1, 16), 1.0, (16, 16))
        before = state(model)
        with applied(model, Adapter({site: update})):
            changed = [n for n, w in state(model).items() if not w.equal(before[n])]
        assert [n.endswith("encoder.layers.0.self_attn.q_proj.weight") for n in changed] == [True]
        assert changed[0].startswith(f"{part}.")


def test_convolutions_stored_as_matrices_fit_too(target):
    site = Site("unet", "mid_block.attentions.0.proj_in")
    shape = tuple(target.modules["unet"].mid_block.attentions[0].proj_in.weight.shape)
    assert len(shape) == 4
    flat = LowRank(torch.ones(shape[0], 1), torch.ones(1, shape[1]), 1.0, shape[:2])
    with applied(target, Adapter({site: flat})):
        pass
    with (
        pytest.raises(ShapeMismatch, match="proj_in"),
        applied(target, Adapter({site: LowRank(torch.ones(3, 1), torch.ones(1, 5), 1.0, (3, 5))})),
    ):
        pass


def test_a_site_the_model_lacks_is_an_error_and_nothing_changes(target, adapter):
    before = state(target)
    stray = LowRank(torch.ones(2, 1), torch.ones(1, 2), 1.0, (2, 2))
    for site in (Site("unet", "no.such"), Site("transformer", "x"), Site("unet", "conv_norm_out")):
        broken = Adapter({**adapter.updates, site: stray})
        with pytest.raises((SitesNotInBase, ShapeMismatch)), applied(target, broken):
            pass
    assert same(before, state(target))


def test_beside_an_adapter_of_another_library_it_refuses(adapter):
    model = open_model(pair.TARGET)
    alone = forward(model)
    attach(model.pipeline, pair.ADAPTER)
    with pytest.raises(CannotRun, match="attached"), applied(model, adapter):
        pass
    detach(model.pipeline)  # PEFT's wrappers stay, empty
    with applied(model, adapter):
        assert not torch.allclose(forward(model), alone, atol=1e-2)
    assert torch.allclose(forward(model), alone)


def test_a_random_adapter_has_the_size_and_rank_of_the_real_one(adapter):
    found = random_like(adapter, 0)
    assert found.updates.keys() == adapter.updates.keys()
    for site, update in found.updates.items():
        real = adapter.updates[site]
        assert (update.rank, update.shape, update.layout) == (real.rank, real.shape, real.layout)
        assert energy(update.factors()) == pytest.approx(energy(real.factors()), rel=1e-4)


def test_a_random_adapter_is_random_by_its_seed_and_site_alone(adapter):
    first, again, other = (random_like(adapter, seed) for seed in (0, 0, 1))
    site = next(iter(adapter.updates))
    assert first.updates[site].up.equal(again.updates[site].up)
    assert not torch.allclose(first.updates[site].up, other.updates[site].up)
    alone = random_like(Adapter({site: adapter.updates[site]}), 0)
    assert alone.updates[site].up.equal(first.updates[site].up)


def test_a_random_adapter_does_not_help(target, adapter):
    bare = forward(target).mean()
    with applied(target, adapter):
        assert forward(target).mean() < 0.7 * bare
    with applied(target, random_like(adapter, 0)):
        assert forward(target).mean() > 0.9 * bare
