"""The verdict: copy between relatives, don't between strangers, carry when blocks moved."""

from __future__ import annotations

import pytest

from regraft.methods.choose import LEAST, RELATED, PairFacts, choose


def fact(share, cosine, *, difference=0.1, identical=False, by_similarity=False):
    return PairFacts(share, cosine, difference, identical, by_similarity)


def test_identical_bases_copy():
    found = choose([fact(1.0, 1.0, difference=0.0, identical=True)])
    assert (found.word, found.method) == ("copy", "copy")
    assert "identical" in found.why


def test_a_close_relative_copies():
    found = choose([fact(0.5, 0.95), fact(0.5, 0.85)])
    assert (found.word, found.method) == ("copy", "copy")
    assert found.cosine == pytest.approx(0.9)


def test_strangers_are_told_not_to():
    found = choose([fact(1.0, 0.01)])
    assert (found.word, found.method) == ("don't", None)


def test_a_relative_too_far_away_is_told_apart_from_a_stranger():
    found = choose([fact(1.0, 0.3)])
    assert (found.word, found.method) == ("don't", None)
    assert "too far" in found.why
    assert 0 < RELATED < 0.3
    assert found.predicted < LEAST


def test_the_nearer_the_bases_the_more_is_predicted():
    guesses = [choose([fact(1.0, cosine)]).predicted for cosine in (0.0, 0.5, 0.9, 1.0)]
    assert guesses == sorted(guesses)
    assert guesses[-1] == pytest.approx(1.0)


def test_the_adapters_weight_decides_not_the_number_of_sites():
    related, not_related = fact(0.9, 0.95), [fact(0.01, 0.0)] * 10
    assert choose([related, *not_related]).word == "copy"


def test_unequal_shapes_leave_nothing_to_do():
    assert choose([fact(1.0, None)]).word == "don't"
    assert choose([]).word == "don't"
    partly = choose([fact(0.2, 0.99), fact(0.8, None)])
    assert partly.word == "don't"
    assert "20%" in partly.why


def test_moved_blocks_are_carried():
    found = choose([fact(0.5, 0.9), fact(0.5, 0.8, by_similarity=True)])
    assert (found.word, found.method) == ("carry", "copy")
