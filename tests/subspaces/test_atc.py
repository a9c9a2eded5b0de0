"""The transferability cost is the optimal one, and says of two bases what their subspaces say."""

from __future__ import annotations

import sys
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.adapters import Site
from regraft.errors import BadOption, MissingDependency, NotABase
from regraft.subspaces import Dimension, transferability, transport
from tests.methods.worlds import make_base, moved, new_library, save_base, weight

LAYERS = {f"layers.{i}.q": (20, 24) for i in range(4)}
K = Dimension(k=5)


@pytest.fixture
def library(tmp_path):
    return new_library(tmp_path / "cache")


def layers(base):
    return {site.module: base.read(site) for site in base.weights}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 999))
def test_uniform_masses_are_an_assignment_problem(n, seed):
    costs = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cost, plan = transport(costs, torch.ones(n), torch.ones(n))
    best = min(sum(float(costs[i, j]) for i, j in enumerate(p)) for p in permutations(range(n))) / n
    assert cost == pytest.approx(best)
    assert torch.allclose(plan.sum(0), torch.full((n,), 1 / n, dtype=torch.float64))
    assert torch.allclose(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64))


def test_masses_decide_how_much_is_moved():
    costs = torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    cost, plan = transport(costs, torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert cost == pytest.approx(0.25 * 0.5)
    assert plan[1].tolist() == pytest.approx([0.25, 0.5])
    with pytest.raises(BadOption, match="mass"):
        transport(costs, torch.zeros(2), torch.ones(2))


def test_a_base_costs_nothing_to_itself(tmp_path, library):
    base = make_base(tmp_path / "a", 0, LAYERS)
    found = transferability(base, base, library, dimension=K)
    assert found.cost == pytest.approx(0, abs=1e-6)
    assert found.by_name == pytest.approx(0, abs=1e-6)
    assert found.plan.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_relatives_cost_less_than_strangers_who_cost_what_chance_does(tmp_path, library):
    base = make_base(tmp_path / "a", 0, LAYERS)
    near = moved(base, tmp_path / "b", 0.1)
    far = make_base(tmp_path / "c", 7, LAYERS)
    costs = [transferability(base, b, library, dimension=K) for b in (near, far)]
    assert costs[0].cost < 0.5 * costs[1].cost
    assert costs[0].chance == pytest.approx(1 - (5 / 20 + 5 / 24) / 2)
    assert costs[1].relative == pytest.approx(1, abs=0.1)


def test_both_directions_cost_the_same(tmp_path, library):
    base, other = make_base(tmp_path / "a", 0, LAYERS), make_base(tmp_path / "b", 1, LAYERS)
    there = transferability(base, other, library, dimension=K)
    back = transferability(other, base, library, dimension=K)
    assert there.cost == pytest.approx(back.cost, abs=1e-6)
    assert torch.allclose(there.costs, back.costs.mT, atol=1e-5)


def test_turning_both_bases_changes_nothing(tmp_path, library):
    base = make_base(tmp_path / "a", 0, LAYERS)
    other = moved(base, tmp_path / "b", 0.6)
    g = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=g))[0] for d in (20, 24))
    turned = [
        save_base(
            tmp_path / f"turned-{b.name}", {n: left @ w @ right for n, w in layers(b).items()}
        )
        for b in (base, other)
    ]
    before = transferability(base, other, library, dimension=K)
    after = transferability(*turned, library, dimension=K)
    assert after.cost == pytest.approx(before.cost, abs=1e-4)


def test_renumbered_blocks_are_found_again_but_not_by_name(tmp_path, library):
    base = make_base(tmp_path / "a", 0, LAYERS)
    w = list(layers(base).values())
    turned = dict(zip(LAYERS, [w[2], w[3], w[0], w[1]], strict=True))
    found = transferability(base, save_base(tmp_path / "b", turned), library, dimension=K)
    assert found.cost == pytest.approx(0, abs=1e-6)
    assert found.by_name > 0.5
    assert found.plan.argmax(dim=1).tolist() == [2, 3, 0, 1]


def test_layers_of_other_shape_or_kind_cost_everything(tmp_path, library):
    base = make_base(tmp_path / "a", 0, {"q": (20, 24), "v": (20, 24)})
    wider = make_base(tmp_path / "b", 0, {"q": (24, 24), "v": (24, 24)})
    found = transferability(base, wider, library, dimension=K)
    assert (found.cost, found.by_name, found.relative) == (1.0, 1.0, 1.0)
    swapped = save_base(
        tmp_path / "c", dict(zip("qv", [*layers(base).values()][::-1], strict=True))
    )
    assert transferability(base, swapped, library, dimension=K).cost == pytest.approx(0, abs=1e-6)
    kept = transferability(base, swapped, library, dimension=K, kind=lambda s: s.module)
    assert kept.costs[0, 1] == 1
    assert kept.cost > 0.5


def test_a_linear_layer_is_a_1x1_convolution_but_no_3x3_one(tmp_path, library):
    flat = weight((6, 36), torch.Generator().manual_seed(0))
    plain = save_base(tmp_path / "a", {"p": flat})
    for shape, cost in (((6, 36, 1, 1), 0.0), ((6, 4, 3, 3), 1.0)):
        conv = save_base(tmp_path / str(cost), {"p": flat.reshape(shape)})
        found = transferability(plain, conv, library, dimension=K)
        assert found.cost == pytest.approx(cost, abs=1e-6)


def test_fewer_blocks_leave_mass_without_a_namesake(tmp_path, library):
    base = make_base(tmp_path / "a", 0, LAYERS)
    pruned = save_base(tmp_path / "b", dict([*layers(base).items()][:2]))
    found = transferability(base, pruned, library, dimension=K)
    # Half the source has no place of its own: a quarter each goes onto the two that are left.
    assert found.by_name == pytest.approx(0.5, abs=1e-6)
    assert 0 < found.cost <= found.by_name


def test_energy_masses_make_heavy_layers_count(tmp_path, library):
    base = make_base(tmp_path / "a", 0, LAYERS)
    w = layers(base)
    other = make_base(tmp_path / "b", 5, LAYERS)
    w["layers.0.q"] = layers(other)["layers.0.q"]
    scale = {"layers.0.q": 0.01}
    pair = [
        save_base(tmp_path / n, {k: scale.get(k, 1.0) * x for k, x in side.items()})
        for n, side in (("c", layers(base)), ("d", w))
    ]
    uniform = transferability(*pair, library, dimension=K)
    energy = transferability(*pair, library, dimension=K, masses="energy")
    assert uniform.cost > 0.1
    assert energy.cost < 0.001


def test_complete_subspaces_say_nothing(tmp_path, library):
    base, other = make_base(tmp_path / "a", 0, LAYERS), make_base(tmp_path / "b", 1, LAYERS)
    with pytest.raises(BadOption, match="Complete subspaces"):
        transferability(base, other, library, dimension=Dimension(full=True))
    square = {"q": (8, 8)}
    base, other = make_base(tmp_path / "c", 0, square), make_base(tmp_path / "d", 1, square)
    assert transferability(base, other, library, dimension=Dimension(k=8)).relative is None


def test_bad_input_and_a_missing_solver_are_said(tmp_path, library, monkeypatch):
    base = make_base(tmp_path / "a", 0, LAYERS)
    with pytest.raises(NotABase, match="No layer"):
        transferability(base, base, library, dimension=K, sites=([Site("", "layers.0.q")], []))
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(MissingDependency, match=r"regraft\[measure\]"):
        transferability(base, base, library, dimension=K)
