"""The engine finds the true subspace, says which stage it needed, and never loses a rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.errors import BadOption
from regraft.subspaces import Dimension, decompose


def spectrum(m, n, values, seed=0):
    g = torch.Generator().manual_seed(seed)
    p = len(values)
    u, _ = torch.linalg.qr(torch.randn(m, p, generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, p, generator=g, dtype=torch.float64))
    return ((u * torch.tensor(values, dtype=torch.float64)) @ v.mT).float()


def agreement(rows, exact):
    """Mean cos² between a found basis (rows) and the exact one (columns)."""
    return float((rows.double() @ exact).square().sum()) / rows.shape[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 60), st.integers(0, 999))
def test_the_exact_top_subspace(m, n, k, seed):
    p = min(m, n)
    weight = spectrum(m, n, [(i + 1.0) ** -0.7 for i in range(p)], seed)
    found = decompose(weight, Dimension(k=k))
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    k = min(k, p)
    assert found.k == k
    assert agreement(found.ut, u[:, :k]) == pytest.approx(1.0, abs=1e-5)
    assert agreement(found.vt, vh[:k].mT) == pytest.approx(1.0, abs=1e-5)
    eye = torch.eye(k)
    assert torch.allclose(found.ut @ found.ut.mT, eye, atol=2e-5)
    assert torch.allclose(found.vt @ found.vt.mT, eye, atol=2e-5)
    assert torch.allclose(found.s[:k].double(), s[:k], rtol=1e-3)
    # Left and right vectors belong together: Uᵀ W V is the diagonal of singular values.
    assert torch.allclose(found.ut @ weight @ found.vt.mT, found.s[:k].diag(), atol=1e-3)


def test_well_conditioned_weights_need_only_fp32():
    assert decompose(torch.randn(50, 80), Dimension(k=20)).engine == "gram-fp32"


def test_a_steep_spectrum_falls_back_and_stays_exact():
    weight = spectrum(40, 50, [10.0 ** (-i / 5) for i in range(25)])
    found = decompose(weight, Dimension(k=22))
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    assert found.engine in ("gram-fp64", "svd-fp64")
    assert agreement(found.ut, u[:, :22]) > 0.9999
    assert agreement(found.vt, vh[:22].mT) > 0.9999


def test_directions_of_a_rank_deficient_weight_are_not_invented():
    weight = spectrum(30, 40, [3.0, 2.0, 1.0])
    found = decompose(weight, Dimension(k=10))
    assert found.k == 3
    assert found.energy_share == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (1, 5), (5, 1)])
def test_zero_and_thin_weights(shape):
    zero = decompose(torch.zeros(shape), Dimension(k=3))
    assert torch.isfinite(zero.ut).all()
    assert torch.isfinite(zero.vt).all()
    thin = decompose(torch.ones(shape), Dimension(k=3))
    assert thin.k == 1


def test_results_repeat_bit_for_bit():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    one, two = decompose(weight, Dimension(k=9)), decompose(weight.clone(), Dimension(k=9))
    assert torch.equal(one.ut, two.ut)
    assert torch.equal(one.vt, two.vt)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("320", Dimension(k=320)),
        (7, Dimension(k=7)),
        ("0.99", Dimension(share=0.99)),
        ("full", Dimension(full=True)),
    ],
)
def test_dimension_parses(text, expected):
    assert Dimension.parse(text) == expected


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "all", "", "nan"])
def test_bad_dimensions_are_refused(text):
    with pytest.raises(BadOption, match="dimension"):
        Dimension.parse(text)


def test_energy_dimension_is_the_smallest_that_suffices():
    weight = spectrum(30, 30, [2.0**-i for i in range(12)])
    found = decompose(weight, Dimension(share=0.9))
    s = torch.linalg.svdvals(weight.double()).square()
    k = found.k
    assert s[:k].sum() / s.sum() >= 0.9
    assert s[: k - 1].sum() / s.sum() < 0.9
