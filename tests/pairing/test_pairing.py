"""Pairing by name, and by similarity when blocks were removed."""

from __future__ import annotations

import pytest
import torch

from regraft.adapters import Site
from regraft.errors import BadOption
from regraft.pairing import kind_of, pair_sites
from tests.methods.worlds import save_base, weight


def blocks(count, seed=0, shape=(20, 20)):
    g = torch.Generator().manual_seed(seed)
    return [weight(shape, g) for _ in range(count)]


def named(weights):
    return {f"blocks.{i}.q": w for i, w in enumerate(weights)}


@pytest.fixture
def six(tmp_path):
    weights = blocks(6)
    return weights, save_base(tmp_path / "six", named(weights))


def test_the_same_architecture_pairs_by_name(six, tmp_path):
    weights, source = six
    target = save_base(tmp_path / "t", named(weights[::-1]))
    found = pair_sites(source, target, source.weights)
    assert found.how == "name"
    assert all(p.source == p.target for p in found.pairs)
    assert len(found.pairs) == 6


def test_a_pruned_target_pairs_with_the_blocks_it_kept(six, tmp_path):
    weights, source = six
    kept = [0, 2, 5]
    g = torch.Generator().manual_seed(5)
    moved = [weights[i] + 0.1 * torch.randn(20, 20, generator=g) * weights[i].std() for i in kept]
    target = save_base(tmp_path / "t", named(moved))
    found = pair_sites(source, target, source.weights)
    assert found.how == "similarity"
    pairs = {p.target.module: p.source.module for p in found.pairs}
    assert pairs == {
        "blocks.0.q": "blocks.0.q",
        "blocks.1.q": "blocks.2.q",
        "blocks.2.q": "blocks.5.q",
    }
    assert all(p.cosine > 0.9 for p in found.pairs)
    assert {s.module for s in found.unpaired} == {"blocks.1.q", "blocks.3.q", "blocks.4.q"}
    by_name = pair_sites(source, target, source.weights, how="name")
    assert {p.target for p in by_name.pairs} == {Site("", f"blocks.{i}.q") for i in range(3)}


def test_an_unrelated_shallower_target_pairs_with_nothing(six, tmp_path):
    _, source = six
    target = save_base(tmp_path / "t", named(blocks(4, seed=99)))
    found = pair_sites(source, target, source.weights)
    assert not found.pairs
    assert all("resembles" in why for why in found.unpaired.values())


def test_only_the_adapters_sites_are_paired(six, tmp_path):
    weights, source = six
    target = save_base(tmp_path / "t", named([weights[1], weights[3]]))
    found = pair_sites(source, target, [Site("", "blocks.3.q"), Site("", "blocks.4.q")])
    assert [(p.target.module, p.source.module) for p in found.pairs] == [
        ("blocks.1.q", "blocks.3.q")
    ]
    assert [s.module for s in found.unpaired] == ["blocks.4.q"]


def test_missing_modules_say_so(six, tmp_path):
    _, source = six
    target = save_base(tmp_path / "t", {"other.0.k": torch.randn(4, 4)})
    found = pair_sites(source, target, source.weights)
    assert set(found.unpaired.values()) == {"the target has no such module"}


def test_an_unknown_way_is_refused(six):
    _, source = six
    with pytest.raises(BadOption, match="Choose auto"):
        pair_sites(source, source, source.weights, how="luck")


@pytest.mark.parametrize(
    ("site", "kind"),
    [
        (
            Site("unet", "down_blocks.1.attentions.0.transformer_blocks.3.attn1.to_out.0"),
            "unet.down_blocks.#.attentions.#.transformer_blocks.#.attn1.to_out.#",
        ),
        (Site("", "model.layers.12.mlp.up_proj"), "model.layers.#.mlp.up_proj"),
        (Site("", "conv1"), "conv1"),
    ],
)
def test_kind(site, kind):
    assert kind_of(site) == kind
