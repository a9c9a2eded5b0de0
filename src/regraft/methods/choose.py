"""Choosing: carry, copy or don't, from what the weights show before anything is computed.

The rule rests on the battery (docs/retention.md): between bases whose weights still resemble each
other, plain copying kept the most of every adapter and projections less; it fades as the weights
move apart; between independent trainings no weight-space method kept anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from regraft.methods.predict import CURVE
from regraft.pairing import Pair
from regraft.subspaces import Closeness

VerdictWord = Literal["carry", "copy", "don't"]

#: Mean weight cosine from which two bases share an origin. Independent trainings lie at 0 ± 1/√n,
#: the furthest relative measured at 0.51.
RELATED = 0.1
#: Least predicted retention that is worth a file: below it copying was no better than chance.
LEAST = 0.1
#: Share of the adapter's energy that must have a place on the target.
COVERAGE = 0.3


@dataclass(frozen=True)
class PairFacts:
    """What is known of one paired site: its share of the adapter's energy, and the weights' cosine
    (None when shapes differ)."""

    share: float
    cosine: float | None
    difference: float | None
    identical: bool
    by_similarity: bool

    @classmethod
    def of(cls, share: float, close: Closeness | None, pair: Pair) -> PairFacts:
        """The facts of one pair; ``close`` is None when the shapes differ."""
        return cls(
            share=share,
            cosine=None if close is None else close.cosine,
            difference=None if close is None else close.difference,
            identical=close is not None and close.difference == 0.0,
            by_similarity=pair.how == "similarity" and pair.source != pair.target,
        )


@dataclass(frozen=True)
class Verdict:
    """The answer to "what should be done with this adapter on this target".

    ``method`` is what ``auto`` runs; for "don't" it is None. ``predicted`` is the retention R that
    copying would have, by :mod:`regraft.methods.predict`.
    """

    word: VerdictWord
    method: str | None
    why: str
    coverage: float
    cosine: float
    difference: float
    predicted: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(facts: Sequence[PairFacts]) -> Verdict:
    """Pick by coverage and mean cosine, both weighted by the adapter's energy per site.

    Parameters
    ----------
    facts : sequence of PairFacts
        One per pair; shares sum to at most 1.
    """
    fitting = [f for f in facts if f.cosine is not None]
    coverage = sum((f.share for f in fitting), 0.0)
    weight = max(coverage, 1e-30)
    cosine = sum((f.share * (f.cosine or 0.0) for f in fitting), 0.0) / weight
    difference = sum(f.share * min(f.difference or 0.0, 1e6) for f in fitting) / weight

    predicted = CURVE.retention(cosine, coverage)

    def verdict(word: VerdictWord, method: str | None, why: str) -> Verdict:
        return Verdict(word, method, why, coverage, cosine, difference, predicted)

    if not fitting or coverage < COVERAGE:
        return verdict(
            "don't",
            None,
            f"Only {coverage:.0%} of the adapter has a weight of its shape on the target; the "
            "methods of this version need equal shapes.",
        )
    if cosine < RELATED:
        return verdict(
            "don't",
            None,
            f"The two bases' weights are not related (mean cosine {cosine:.3f}): they were trained "
            "independently, and neither copying nor projecting weights works between such bases.",
        )
    if predicted < LEAST:
        return verdict(
            "don't",
            None,
            f"The target has moved too far from the source (mean cosine {cosine:.3f}): of what an "
            f"adapter trained there gains, copying would bring about {max(predicted, 0.0):.0%}.",
        )
    if all(f.identical for f in fitting):
        return verdict("copy", "copy", "The two bases are identical at every site it touches.")
    if any(f.by_similarity for f in fitting):
        return verdict(
            "carry",
            "copy",
            "The target has other blocks than the source; each takes the update of the source "
            f"block it resembles (mean cosine {cosine:.3f}).",
        )
    return verdict(
        "copy",
        "copy",
        f"The target's weights are still close to the source's (mean cosine {cosine:.3f}, moved by "
        f"{difference:.0%}); there, projections only remove part of the update.",
    )
