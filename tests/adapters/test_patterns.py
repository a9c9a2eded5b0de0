"""Expressions of a config: PEFT's rule, and none that keeps a user waiting."""

from __future__ import annotations

import time

import pytest

from regraft.adapters.patterns import matches, matches_end
from regraft.errors import MalformedFile

NAME = "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("q_proj", True),
        ("proj", False),
        ("layers.11.self_attn.q_proj", True),
        ("layers.1.self_attn.q_proj", False),
        (r"layers\.\d+\.self_attn\.(q|v)_proj", True),
        (r".*self_attn.*", True),
    ],
)
def test_the_end_of_a_name(expression, found):
    assert matches_end(expression, NAME) is found


def test_whole_names():
    assert matches(r".*\.(q|v)_proj", NAME)
    assert not matches("q_proj", NAME)


@pytest.mark.parametrize(
    "expression", ["(a+)+", "(a|a)*b", "a*" * 20, "(", "*", "(?P<n>a)(?P<n>b)"]
)
def test_expressions_that_never_end_or_are_none(expression):
    started = time.perf_counter()
    with pytest.raises(MalformedFile) as caught:
        matches_end(expression, "a" * 1000)
    assert caught.value.fix
    assert time.perf_counter() - started < 1
