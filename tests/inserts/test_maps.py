"""Affine maps: exact where there is an exact map, honest about what was kept back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.errors import BadOption, ShapeMismatch
from regraft.inserts.maps import energy_kept, identity, procrustes, ridge, towards

seeds = st.integers(0, 2**31)
widths = st.integers(2, 6)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, n: int) -> torch.Tensor:
    return torch.linalg.qr(drawn(seed, n, n))[0]


@settings(max_examples=25, deadline=None)
@given(seeds, widths, widths)
def test_an_affine_relation_is_found(seed, m, n):
    x, matrix, shift = drawn(seed, 60, m), drawn(seed + 1, n, m), drawn(seed + 2, n)
    found = ridge(x, x @ matrix.mT + shift)
    assert found.fit > 1 - 1e-6
    assert torch.allclose(found(x), x @ matrix.mT + shift, atol=1e-3)
    # a difference has no offset
    assert torch.allclose(found.linear(x[0] - x[1]), found(x[0]) - found(x[1]), atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds, widths, st.floats(0.1, 5))
def test_a_rotation_and_its_scale_are_found(seed, n, size):
    x, turn = drawn(seed, 60, n), rotation(seed + 1, n)
    found = procrustes(x, size * x @ turn.mT)
    assert torch.allclose(found.matrix, size * turn, atol=1e-8)
    assert found.fit == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(seeds, widths)
def test_a_rotated_space_is_kept_whole_even_where_nothing_varies(seed, n):
    """Ridge shrinks what it has not seen; drawn towards a rotation it does not."""
    x, turn = drawn(seed, 60, n), rotation(seed + 1, n)
    x[:, -1] *= 1e-4
    found = towards(x, x @ turn.mT)
    assert torch.allclose(found.matrix, turn, atol=1e-6)


def test_spaces_that_agree_are_left_as_they_are():
    x = drawn(0, 80, 5)
    assert torch.equal(towards(x, x).matrix, identity(5).matrix)


@settings(max_examples=25, deadline=None)
@given(seeds, widths, widths)
def test_a_heavy_hand_gives_the_prior_and_none_gives_least_squares(seed, m, n):
    x, y, prior = drawn(seed, 60, m), drawn(seed + 1, 60, n), drawn(seed + 2, n, m)
    heavy = ridge(x, y, prior=prior, ridges=(1e9,))
    assert torch.allclose(heavy.matrix, prior, atol=1e-5)
    light = ridge(x, y, prior=prior, ridges=(0.0,))
    bare = ridge(x, y, ridges=(0.0,))
    assert torch.allclose(light.matrix, bare.matrix, atol=1e-6)


def test_fit_is_that_of_rows_kept_back():
    x, y = drawn(0, 40, 30), drawn(1, 40, 3)
    assert ridge(x, y, ridges=(1e-9,)).fit < 0  # noise that was learned by heart


def test_without_offset_nothing_goes_to_nothing():
    x = drawn(0, 50, 3) + 2
    found = ridge(x, x + 5, offset=False)
    assert torch.equal(found(torch.zeros(3, dtype=torch.float64)), torch.zeros(3).double())


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(-3, 3))
def test_energy_kept_is_a_share(seed, size):
    x = drawn(seed, 10, 4)
    assert 0 <= energy_kept(x, size * x) <= 1
    assert energy_kept(x, x) == 1
    assert energy_kept(0 * x, x) == 1
    assert energy_kept(x, 0 * x) == 0


def test_rows_that_do_not_correspond_are_refused():
    with pytest.raises(ShapeMismatch):
        ridge(drawn(0, 5, 2), drawn(0, 6, 2))
    with pytest.raises(BadOption):
        ridge(drawn(0, 2, 2), drawn(0, 2, 2))
