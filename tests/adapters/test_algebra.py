"""The algebra on factors against the same algebra on full matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.adapters import (
    LowRank,
    RankRule,
    Spectral,
    cut,
    delta,
    energy,
    inner,
    rank_for_energy,
)
from regraft.adapters.algebra import svd_of_product
from regraft.errors import ShapeMismatch

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))


def factors(m, n, r, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=g), torch.randn(r, n, generator=g)


def shortened(pair, rule):
    """(factors, share of the energy kept) after a cut."""
    before = LowRank(*pair, 1.0, (pair[0].shape[0], pair[1].shape[1]))
    after = cut(before, RankRule.parse(rule))
    return after.factors(), after.energy() / before.energy()


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_svd_of_product_is_the_products_svd(size):
    left, right = factors(*size)
    u, s, vh = svd_of_product(left, right)
    product = left @ right
    scale = float(product.norm()) + 1e-6
    assert torch.allclose((u * s) @ vh, product, atol=1e-4 * scale)
    expected = torch.linalg.svdvals(product.double())[: s.numel()].float()
    assert torch.allclose(s[: expected.numel()], expected, atol=1e-4 * scale)
    # Signs are fixed: the largest entry of each left vector is positive.
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) >= 0).all())


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_energy_and_inner_products(size):
    a, b = factors(*size), factors(*size[:3], size[3] + 1)
    one, two = a[0] @ a[1], b[0] @ b[1]
    assert energy(a) == pytest.approx(float(one.double().square().sum()), rel=1e-4, abs=1e-6)
    expected = float((one.double() * two.double()).sum())
    assert inner(a, b) == pytest.approx(expected, abs=1e-3 * (1 + float(one.norm() * two.norm())))


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(1, 12))
def test_a_cut_to_a_rank_is_the_best_approximation(size, rank):
    pair = factors(*size)
    (left, right), kept = shortened(pair, rank)
    assert left.shape[1] <= rank
    s = torch.linalg.svdvals((pair[0] @ pair[1]).double())
    best = float(s[:rank].square().sum() / s.square().sum())
    assert kept == pytest.approx(best, abs=1e-5)
    again, kept_again = shortened((left, right), rank)
    assert kept_again == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(again[0] @ again[1], left @ right, atol=1e-4 * (1 + float(s[0])))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_rank_for_energy_is_the_smallest_that_suffices(values, share):
    s = torch.tensor(sorted(values, reverse=True))
    k = rank_for_energy(s, share)
    squares = s.double().square()
    assert float(squares[:k].sum() / squares.sum()) >= share - 1e-9
    if k > 1:
        assert float(squares[: k - 1].sum() / squares.sum()) < share


def test_energy_rule_keeps_at_least_the_share():
    pair = factors(30, 30, 10, 0)
    for share in (0.3, 0.9, 0.999):
        _, kept = shortened(pair, share)
        assert kept >= share - 1e-9


@pytest.mark.parametrize(
    "core", [torch.tensor([3.0, -2.0]), torch.tensor([[1.0, 2.0], [0.0, 1.0]])]
)
def test_spectral_is_u_core_v(core):
    u, _ = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)))
    v, _ = torch.linalg.qr(torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
    form = Spectral(u, core, v, (6, 5))
    full = torch.diag(core) if core.ndim == 1 else core
    assert torch.allclose(delta(form), u @ full @ v.mT, atol=1e-6)
    assert torch.allclose(delta(form.low_rank()), delta(form), atol=1e-6)


def test_with_factors_balances_without_changing_the_product():
    base = LowRank(torch.zeros(4, 2), torch.zeros(2, 6), 1.0, (4, 6))
    left, right = 1e4 * torch.randn(4, 2), 1e-4 * torch.randn(2, 6)
    made = base.with_factors(left, right, (4, 6))
    assert torch.allclose(delta(made), left @ right, rtol=1e-4, atol=1e-6)
    assert torch.allclose(made.up.norm(dim=0), made.down.norm(dim=1), rtol=1e-4)


def test_a_zero_direction_stays_finite():
    base = LowRank(torch.zeros(4, 1), torch.zeros(1, 6), 1.0, (4, 6))
    made = base.with_factors(torch.zeros(4, 1), torch.ones(1, 6), (4, 6))
    assert torch.isfinite(made.up).all()
    assert torch.isfinite(made.down).all()
    assert not delta(made).any()


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ShapeMismatch, match="do not make"):
        LowRank(torch.zeros(4, 2), torch.zeros(2, 6), 1.0, (4, 7))
    with pytest.raises(ShapeMismatch, match="neither"):
        Spectral(torch.zeros(4, 2), torch.zeros(3), torch.zeros(6, 2), (4, 6))
