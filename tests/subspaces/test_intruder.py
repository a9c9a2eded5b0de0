"""Intruder dimensions are counted as the paper's own code counts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.adapters import Adapter, LowRank, Site, delta
from regraft.errors import BadOption, ShapeMismatch, SitesNotInBase
from regraft.subspaces import adapter_intruders, intruders
from tests.methods.worlds import lora, make_base, weight


def by_definition(w, change, top):
    """The authors' rule with numpy's SVD, fp64."""
    u = np.linalg.svd(w.double().numpy(), full_matrices=False)[0]
    y = np.linalg.svd((w + change).double().numpy(), full_matrices=False)[0]
    return np.abs(y.T @ u).max(axis=1)[:top]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([(24, 24), (16, 40), (40, 16)]), st.floats(0.1, 8.0), st.integers(0, 999))
def test_cosines_are_those_of_the_definition(shape, size, seed):
    g = torch.Generator().manual_seed(seed)
    w = weight(shape, g)
    change = size * torch.randn(shape[0], 2, generator=g) @ torch.randn(2, shape[1], generator=g)
    found = intruders(w, change / change.norm() * size * w.norm(), top=6)
    expected = by_definition(w, change / change.norm() * size * w.norm(), 6)
    assert found.cosines.numpy() == pytest.approx(expected, abs=2e-2)
    for below in (0.3, 0.6, 0.9):
        sure = np.abs(expected - below) > 2e-2
        assert sum(found.cosines.numpy()[sure] < below) == sum(expected[sure] < below)


def test_a_base_without_adapter_has_no_intruders():
    w = weight((24, 40), torch.Generator().manual_seed(0))
    found = intruders(w, torch.zeros_like(w))
    assert found.cosines.tolist() == pytest.approx([1.0] * 10, abs=1e-4)
    assert found.count() == 0


def test_a_strong_foreign_direction_is_one_intruder():
    w = torch.diag(torch.arange(40, 0, -1).float())
    foreign = torch.ones(40, 1) / 40**0.5
    torch.manual_seed(0)
    found = intruders(w, 400 * foreign @ torch.randn(1, 40).sign() / 40**0.5)
    assert found.cosines[0] < 0.3
    assert found.count() >= 1
    # The same change inside a direction of W only makes it stronger.
    own = torch.zeros(40, 40)
    own[3, 3] = 400.0
    assert intruders(w, own).count() == 0


def test_the_threshold_decides():
    w = weight((24, 24), torch.Generator().manual_seed(1))
    found = intruders(w, w.roll(1, 0), top=8)
    counts = [found.count(e) for e in (0.0, 0.3, 0.6, 1.1)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 8)
    with pytest.raises(BadOption, match="top 0"):
        intruders(w, w, top=0)


def test_every_site_of_an_adapter_is_counted_at_its_strength(tmp_path):
    base = make_base(tmp_path, 0)
    sites = {s: lora(base.weights[s].shape, 2, 5) for s in base.weights}
    weak = adapter_intruders(Adapter(dict(sites)), base, strength=0.0)
    strong = adapter_intruders(Adapter(dict(sites)), base, strength=5.0)
    assert set(weak) == set(strong) == set(sites)
    assert sum(i.count() for i in weak.values()) == 0
    assert sum(i.count() for i in strong.values()) > 0
    for site, update in sites.items():
        w = base.matrix(site)
        expected = intruders(w, 5.0 * delta(update).flatten(1)).cosines
        assert torch.equal(strong[site].cosines, expected)


def test_an_adapter_that_does_not_fit_is_an_error(tmp_path):
    base = make_base(tmp_path, 0)
    update = lora((24, 24), 2, 0)
    with pytest.raises(SitesNotInBase, match="elsewhere"):
        adapter_intruders(Adapter({Site("", "elsewhere"): update}), base)
    with pytest.raises(ShapeMismatch, match="24, 24"):
        adapter_intruders(Adapter({Site("", "layers.0.wide"): update}), base)


def test_the_rule_is_that_of_peft():
    """PEFT logs how many intruders it found in each layer, by the same rule."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(32, 24, bias=False))
    base = inner[0].weight.detach().clone()
    model = get_peft_model(inner, LoraConfig(target_modules=["0"], r=4, lora_alpha=16))
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    update = LowRank(
        layer.lora_B["default"].weight.detach(),
        layer.lora_A["default"].weight.detach(),
        4.0,
        (24, 32),
        "linear",
    )
    lines: list[str] = []
    reduce_intruder_dimension(model, logging_sink=lines.append)
    left, right = update.factors()
    ours = intruders(base, left @ right).count()
    assert ours > 0
    assert lines[0].endswith(f"Intruders: {ours}")
