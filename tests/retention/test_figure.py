"""R as a number: what it is invariant under, where it is not defined, errors and curves."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from regraft.retention.figure import (
    StrengthCurve,
    mean_error,
    ratio_error,
    retention,
    spread,
)

values = st.floats(-100, 100, allow_nan=False)
scales = st.floats(0.01, 100) | st.floats(-100, -0.01)


def r(target, transferred, retrained, **more):
    return retention(target=target, transferred=transferred, retrained=retrained, **more)


@given(values, values, values, scales, values)
def test_r_does_not_depend_on_scale_origin_or_sign_of_the_metric(a, b, c, scale, origin):
    assume(abs(c - a) > 1e-3)
    moved = [scale * x + origin for x in (a, b, c)]
    assert r(*moved).value == pytest.approx(r(a, b, c).value, rel=1e-6, abs=1e-6)


@given(values, values)
def test_r_of_the_two_references(target, retrained):
    assume(abs(retrained - target) > 1e-9)
    assert r(target, retrained, retrained).value == 1
    assert r(target, target, retrained).value == 0


@given(values, values, st.floats(-3, 3))
def test_r_is_the_share_of_the_way(target, retrained, share):
    assume(abs(retrained - target) > 1e-3)
    found = r(target, target + share * (retrained - target), retrained)
    assert found.value == pytest.approx(share, abs=1e-6)


def test_r_is_not_defined_where_retraining_did_nothing():
    assert r(2.0, 1.0, 2.0).value is None
    found = r(2.0, 1.0, 1.96, margin=0.05)
    assert found.value is None
    assert "not more than the margin 0.05" in found.reason
    assert r(2.0, 1.0, 1.9, margin=0.05).value == pytest.approx(10.0)
    with pytest.raises(ValueError, match="margin"):
        r(2.0, 1.0, 1.9, margin=-1)


def test_r_is_not_defined_where_retraining_harmed_or_a_value_is_missing():
    assert "worse" in r(1.0, 0.9, 1.5, better="lower").reason
    assert "worse" in r(1.0, 0.9, 0.5, better="higher").reason
    assert r(1.0, 0.9, 0.5, better="lower").value == pytest.approx(0.2)
    assert r(1.0, math.nan, 0.5).value is None


def test_spread():
    found = spread([1.0, 2.0, 4.0])
    assert (found.mean, found.least, found.most, found.n) == (pytest.approx(7 / 3), 1.0, 4.0, 3)
    assert found.sd == pytest.approx(math.sqrt(7 / 3))
    assert spread([5.0]).sd is None
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_the_error_of_a_mean():
    assert mean_error([1.0, 3.0]) == pytest.approx(1.0)
    assert mean_error([1.0]) is None


def test_the_error_of_r_is_what_repeating_the_measurement_shows():
    """Against the spread of R over many sets of items drawn from the same world."""
    draw = random.Random(0)

    def items(n=40):
        below = [draw.gauss(1.0, 0.2) for _ in range(n)]
        return [0.6 * b + draw.gauss(0, 0.1) for b in below], below

    sets = [items() for _ in range(400)]
    ratios = [sum(a) / sum(b) for a, b in sets]
    said = [ratio_error(a, b) for a, b in sets]
    assert spread(said).mean == pytest.approx(spread(ratios).sd, rel=0.15)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=20), st.floats(-2, 2))
def test_the_error_of_r_is_nothing_when_every_item_agrees(below, share):
    assert ratio_error([share * b for b in below], below) == pytest.approx(0, abs=1e-6)


def test_the_error_of_r_needs_two_items_and_something_below():
    assert ratio_error([1.0], [2.0]) is None
    assert ratio_error([1.0, 2.0], [1.0, -1.0]) is None
    with pytest.raises(ValueError, match="items"):
        ratio_error([1.0], [1.0, 2.0])


STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def curve(*found):
    return StrengthCurve(STRENGTHS, found)


def test_a_curve_with_its_peak_near_one_is_right():
    found = curve(0.2, 0.5, 0.7, 0.8, 0.85, 0.7, 0.2)
    assert (found.best, found.best_value, found.at_one) == (1.25, 0.85, 0.8)
    assert found.right_at_one


def test_a_curve_with_its_peak_far_from_one_is_wrong():
    assert not curve(0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6).right_at_one
    assert not curve(0.3, 0.2, 0.1, 0.0, -0.1, -0.2, -0.5).right_at_one


def test_on_a_plateau_one_is_right():
    found = curve(0.1, 0.2, 0.5, 0.60, 0.605, 0.61, 0.615)
    assert found.best == 2.0
    assert found.right_at_one


def test_among_equals_the_strength_nearest_one_is_the_best():
    assert curve(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5).best == 1.0
    assert curve(0.1, 0.1, 0.9, 0.2, 0.9, 0.1, 0.1).best == 0.75


@given(st.lists(st.floats(-5, 5), min_size=7, max_size=7), values)
def test_what_is_best_does_not_depend_on_the_origin(found, origin):
    rounded = [round(v, 3) for v in found]
    moved = curve(*[v + round(origin) for v in rounded])
    assert moved.best_value == pytest.approx(max(rounded) + round(origin))
    assert moved.values[moved.strengths.index(moved.best)] == moved.best_value


@pytest.mark.parametrize(
    ("strengths", "found"),
    [
        ((0.5, 1.0), (0.1,)),
        ((1.0, 0.5), (0.1, 0.2)),
        ((0.5, 2.0), (0.1, 0.2)),
        ((1.0, 1.0), (0.1, 0.2)),
        ((0.5, 1.0), (0.1, math.nan)),
    ],
)
def test_a_curve_that_cannot_be_read_is_refused(strengths, found):
    with pytest.raises(ValueError, match=r"strength|value"):
        StrengthCurve(strengths, found)
