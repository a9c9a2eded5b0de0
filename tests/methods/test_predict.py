"""The prediction rises with what it should rise with, and says what is known of real pairs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.methods import methods
from regraft.methods.predict import CURVE, Curve, PairEvidence, predict

SHARES = st.floats(0.0, 1.0)
CURVES = st.builds(Curve, st.floats(0.1, 20.0), st.floats(0.0, 2.0), st.floats(0.1, 3.0))


@given(CURVES, SHARES, SHARES, SHARES)
def test_a_closer_base_never_lowers_it(curve, kept, a, b):
    low, high = sorted((a, b))
    assert curve.retention(low, kept) <= curve.retention(high, kept) + 1e-12


@given(CURVES, SHARES, SHARES, SHARES)
def test_more_energy_moves_it_away_from_no_adapter(curve, cosine, a, b):
    less, more = (curve.retention(cosine, k) for k in sorted((a, b)))
    assert abs(less) <= abs(more) + 1e-12
    assert less * more >= 0


@given(CURVES, SHARES, SHARES)
def test_it_stays_between_harm_and_retraining(curve, cosine, kept):
    assert -curve.harm - 1e-9 <= curve.retention(cosine, kept) <= 1 + 1e-9


@given(CURVES)
def test_the_ends_are_known(curve):
    assert curve.retention(1.0, 1.0) == pytest.approx(1)
    assert curve.retention(0.0, 1.0) == pytest.approx(-curve.harm)
    assert curve.retention(-0.3, 1.0) == pytest.approx(-curve.harm)
    assert curve.retention(1.0, 0.0) == 0


def test_methods_are_ordered_best_first_and_copying_wins_ties():
    keeps = {"lora-x": 0.36, "prolora": 1.0, "copy": 1.0}
    found = predict(PairEvidence(0.96, 0.9, keeps))
    assert list(found) == ["copy", "prolora", "lora-x"]
    assert found["copy"] == found["prolora"] > found["lora-x"] > 0


def test_between_strangers_no_method_beats_leaving_the_adapter_off():
    found = predict(PairEvidence(0.0, 1.0, {m.name: 0.5 for m in methods()}))
    assert set(found) == {m.name for m in methods()}
    assert max(found.values()) < 0


def test_what_fits_nowhere_is_as_good_as_no_adapter():
    assert predict(PairEvidence(0.0, 0.0)) == {"copy": 0}


def test_the_embedded_pair_is_reproduced():
    """docs/methods/choosing.md: cosine 0.96; copy 0.93, and 0.55 for 36 % of the energy."""
    found = predict(PairEvidence(0.96, 1.0, {"lora-x": 0.357}), CURVE)
    assert found["copy"] == pytest.approx(0.93, abs=0.05)
    assert found["lora-x"] == pytest.approx(0.55, abs=0.03)
