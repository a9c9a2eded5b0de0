"""Rank rules: what each text means, and the ranks that sd-scripts' users know."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from regraft.adapters import LowRank, cut
from regraft.adapters.algebra import svd_of_product
from regraft.adapters.ranks import RankRule, exact_rank, fits
from regraft.errors import BadOption

#: Singular values as LoRAs have them: sorted, over a few orders of magnitude, ending in zeros.
spectra = st.builds(
    lambda values, zeros: torch.tensor(sorted(values, reverse=True) + [0.0] * zeros).double(),
    st.lists(st.floats(2**-10, 100.0, width=32), min_size=1, max_size=24),
    st.integers(0, 4),
)
shares = st.floats(0.02, 1.0, exclude_max=True)
SHAPE = (64, 64)


def rank_in_sd_scripts(
    s: list[float], method: str, target: float, most: int, *, extra: int = 0
) -> int:
    """``rank_resize`` of sd-scripts in plain Python; ``extra=1`` is it before pull request 2194.

    There, index functions gave an index that a caller raised by one; the old ones gave the number
    of directions as if it were the index.
    """
    if s[0] <= 1e-6:
        return 1
    if method == "sv_ratio":
        index = sum(value > s[0] / target for value in s) - 1
    else:
        parts = [value**2 for value in s] if method == "sv_fro" else s
        goal = target**2 if method == "sv_fro" else target
        running, index = 0.0, 0
        for index, part in enumerate(parts):  # noqa: B007
            running += part
            if running / math.fsum(parts) >= goal:
                break
    index = max(extra, min(index + extra, len(s) - 1))
    return min(index + 1, most)


def on_an_edge(s: Tensor, method: str, target: float) -> bool:
    """Whether rounding decides: sd-scripts compares in fp32, its restatement in another order."""
    if method == "sv_ratio":
        return bool((s * target / s[0] - 1).abs().min() < 1e-9)
    parts, goal = (s.square(), target**2) if method == "sv_fro" else (s, target)
    return bool((parts.cumsum(0) / parts.sum() - goal).abs().min() < 1e-9)


@given(spectra, st.sampled_from(["sv_fro", "sv_cumulative"]), shares, st.integers(1, 30))
def test_shares_are_those_of_sd_scripts(s: Tensor, method: str, target: float, most: int) -> None:
    assume(not on_an_edge(s, method, target))
    rule = RankRule.parse(f"{method}={target!r},max={most}")
    theirs = rank_in_sd_scripts(s.tolist(), method, target, most)
    assert rule.choose(s, SHAPE) == theirs
    before = rank_in_sd_scripts(s.tolist(), method, target, most, extra=1)
    assert before == min(theirs + 1, most, s.numel()) or s.numel() == 1


@given(spectra, st.floats(1.01, 1e4), st.integers(1, 30))
def test_ratio_is_that_of_sd_scripts(s: Tensor, target: float, most: int) -> None:
    assume(not on_an_edge(s, "sv_ratio", target))
    chosen = RankRule.parse(f"sv_ratio={target!r},max={most}").choose(s, SHAPE)
    assert chosen == rank_in_sd_scripts(s.tolist(), "sv_ratio", target, most)
    assert all(s[0] / value <= target for value in s[:chosen])


@given(spectra, shares)
def test_every_rule_keeps_the_fewest_directions_that_do(s: Tensor, share: float) -> None:
    squares = s.square() / s.square().sum()
    for text, parts, goal in (
        (f"energy={share!r}", squares, share),
        (f"sv_fro={share!r}", squares, share**2),
        (f"sv_cumulative={share!r}", s / s.sum(), share),
    ):
        k = RankRule.parse(text).choose(s, SHAPE)
        assert 1 <= k <= exact_rank(s)
        assert float(parts[:k].sum()) >= goal - 1e-9 or k == exact_rank(s)
        assert k == 1 or float(parts[: k - 1].sum()) < goal + 1e-9


def test_directions_of_rounding_noise_are_never_kept() -> None:
    s = torch.tensor([2.0, 1.0, 3e-8, 0.0])
    for text in ("auto", "exact", "3", "1.0", "sv_fro=1", "sv_cumulative=1", "sv_ratio=1e12"):
        assert RankRule.parse(text).choose(s, SHAPE) == 2, text


def test_exact_is_what_cutting_keeps() -> None:
    left, right = torch.randn(24, 6), torch.randn(6, 40)
    left[:, 5] = left[:, 4]
    update = LowRank(left, right, 1.0, (24, 40))
    shorter = cut(update, RankRule("exact"))
    s = svd_of_product(left, right)[1]
    assert RankRule("exact").choose(s, (24, 40)) == shorter.rank == 5
    assert shorter.energy() == pytest.approx(update.energy())


@pytest.mark.parametrize("text", ["auto", "exact", "7", "0.5", "sv_fro=0.5", "sv_ratio=10"])
def test_a_change_of_zero_has_rank_one(text: str) -> None:
    assert RankRule.parse(text).choose(torch.zeros(8), SHAPE) == 1
    assert RankRule.parse(text).choose(torch.zeros(0), SHAPE) == 1


def test_a_weak_adapter_keeps_its_directions() -> None:
    s = torch.tensor([9e-7, 8e-7, 7e-7])
    assert RankRule.parse("sv_fro=0.99").choose(s, SHAPE) == 3
    assert rank_in_sd_scripts(s.tolist(), "sv_fro", 0.99, 16) == 1


def test_auto_is_exact_until_the_factors_outgrow_the_change() -> None:
    s = torch.linspace(1.0, 0.01, 30)
    assert RankRule().choose(s, (60, 60)) == 30
    assert fits(30, (60, 60))
    assert not fits(31, (60, 60))
    smaller = RankRule().choose(s, (59, 60))
    assert smaller == RankRule("energy", 0.99).choose(s, (59, 60)) < 30
    assert RankRule(largest=4).choose(s, (60, 60)) == 4


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (None, RankRule("auto")),
        (16, RankRule("rank", 16)),
        ("16", RankRule("rank", 16)),
        (1, RankRule("rank", 1)),
        (1.0, RankRule("energy", 1.0)),
        ("1.0", RankRule("energy", 1.0)),
        ("0.99,max=64", RankRule("energy", 0.99, 64)),
        (" Exact, max=8", RankRule("exact", largest=8)),
        ("rank=4", RankRule("rank", 4)),
        ("sv_ratio=1e2", RankRule("sv_ratio", 100.0)),
    ],
)
def test_text_means(text: str | int | float | None, rule: RankRule) -> None:
    assert RankRule.parse(text) == rule


BAD = ["", "0", "-3", "1.5", "0.0", "nan", "inf", "best", "exact=3", "sv_fro", "sv_fro=0", "1e"]
BAD += ["sv_fro=1.1", "sv_ratio=0.5", "sv_knee=1", "16,max=8", "exact,max=0", "exact,max=", "1.2.3"]


@pytest.mark.parametrize("text", [*BAD, "rank=2.5", "sv_ratio=inf", "exact,8", "²", True])
def test_what_means_nothing_is_an_error(text: str) -> None:
    with pytest.raises(BadOption, match=r"sv_ratio=10"):
        RankRule.parse(text)


@given(
    st.one_of(
        st.builds(RankRule, st.just("rank"), st.integers(1, 999)),
        st.builds(RankRule, st.sampled_from(["auto", "exact"]), st.none(), st.integers(1, 99)),
        st.builds(RankRule, st.sampled_from(["energy", "sv_fro", "sv_cumulative"]), shares),
        st.builds(RankRule, st.just("sv_ratio"), st.floats(1, 1e6), st.integers(1, 99)),
    )
)
def test_text_and_json_give_the_rule_back(rule: RankRule) -> None:
    assert RankRule.parse(str(rule)) == rule
    assert RankRule.from_json(json.loads(json.dumps(rule.to_json()))) == rule


def test_json_of_something_else_is_an_error() -> None:
    with pytest.raises(BadOption):
        RankRule.from_json({"value": 3})
