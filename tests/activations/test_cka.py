"""Linear CKA is the one of the paper, by features and by Gram matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.activations import cka_by_depth, cka_matrix, linear_cka
from regraft.errors import BadOption, ShapeMismatch

SIZES = st.tuples(st.integers(4, 20), st.integers(1, 12), st.integers(1, 12))
SEEDS = st.integers(0, 999)


def sides(sizes, seed):
    n, p, q = sizes
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=g, dtype=torch.float64)
    mix = torch.randn(p, q, generator=g, dtype=torch.float64)
    return x, x @ mix + torch.randn(n, q, generator=g, dtype=torch.float64)


def hsic(k, ell):
    n = len(k)
    h = torch.eye(n, dtype=k.dtype) - 1 / n
    return torch.trace(k @ h @ ell @ h) / (n - 1) ** 2


def hsic1(k, ell):
    """Song et al. 2012, Eq. 5, with the vectors of ones written out."""
    n = len(k)
    one = torch.ones(n, 1, dtype=k.dtype)
    k, ell = (m - torch.diag(m.diagonal()) for m in (k, ell))
    sums = (one.mT @ k @ one) * (one.mT @ ell @ one) / ((n - 1) * (n - 2))
    last = 2 / (n - 2) * (one.mT @ k @ ell @ one)
    return ((torch.trace(k @ ell) + sums - last) / (n * (n - 3))).item()


@settings(deadline=None, max_examples=50)
@given(SIZES, SEEDS)
def test_it_is_the_ratio_of_hsics(sizes, seed):
    x, y = sides(sizes, seed)
    k, ell = x @ x.mT, y @ y.mT
    expected = hsic(k, ell) / (hsic(k, k) * hsic(ell, ell)).sqrt()
    assert linear_cka(x, y) == pytest.approx(float(expected), abs=1e-9)
    expected = hsic1(k, ell) / (hsic1(k, k) * hsic1(ell, ell)) ** 0.5
    assert linear_cka(x, y, unbiased=True) == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(SIZES, SEEDS, st.floats(0.01, 100.0), st.booleans())
def test_turning_scaling_and_moving_a_side_change_nothing(sizes, seed, scale, unbiased):
    x, y = sides(sizes, seed)
    g = torch.Generator().manual_seed(seed + 1)
    p = x.shape[1]
    turn = torch.linalg.qr(torch.randn(p, p, generator=g, dtype=torch.float64))[0]
    before = linear_cka(x, y, unbiased=unbiased)
    after = linear_cka(scale * x @ turn + 3.0, y, unbiased=unbiased)
    assert after == pytest.approx(before, abs=1e-7)
    assert linear_cka(y, x, unbiased=unbiased) == pytest.approx(before, abs=1e-9)
    assert linear_cka(x, scale * x @ turn, unbiased=unbiased) == pytest.approx(1, abs=1e-7)


def test_only_the_unbiased_form_finds_strangers_strange():
    x, y = (torch.randn(16, 400, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert linear_cka(x, y) > 0.8
    assert abs(linear_cka(x, y, unbiased=True)) < 0.1


def test_a_side_that_does_not_vary_is_like_nothing():
    x = torch.randn(8, 3)
    assert linear_cka(x, torch.full((8, 5), 0.1)) == 0
    assert linear_cka(x, torch.zeros(8, 5), unbiased=True) == 0


def test_other_inputs_or_too_few_are_refused():
    with pytest.raises(ShapeMismatch, match="8 rows against 7"):
        linear_cka(torch.randn(8, 3), torch.randn(7, 3))
    with pytest.raises(BadOption, match="at least 4"):
        linear_cka(torch.randn(3, 3), torch.randn(3, 3), unbiased=True)
    with pytest.raises(BadOption, match="no blocks"):
        cka_by_depth({}, {"a": torch.randn(8, 3)})


def blocks(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"block {i}": torch.randn(12, 5 + i, generator=g) for i in range(n)}


def test_the_matrix_holds_every_pair_of_blocks():
    a, b = blocks(3), blocks(2, seed=1)
    found = cka_matrix(a, b, unbiased=True)
    assert found.shape == (3, 2)
    assert float(found[2, 1]) == linear_cka(a["block 2"], b["block 1"], unbiased=True)


def test_depths_are_compared_end_to_end():
    a = blocks(5)
    assert cka_by_depth(a, a) == pytest.approx(1)
    shallow = {name: a[name] for name in ("block 0", "block 2", "block 4")}
    scores = cka_matrix(a, shallow, unbiased=True)
    expected = [scores[i, j] for i, j in ((0, 0), (1, 1), (2, 1), (3, 2), (4, 2))]
    assert cka_by_depth(a, shallow) == pytest.approx(float(sum(expected)) / 5)
    assert cka_by_depth(shallow, a) == pytest.approx(cka_by_depth(a, shallow))
