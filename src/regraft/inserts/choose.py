"""Choosing for inserts: copy, carry or don't, from the weights and from how well a map fits.

Prompt vectors, keys and values and bottlenecks mean something in a space that weights make: the
token embedding, the projections of keys and values, the module a bottleneck sits on. Where those
weights still resemble each other, so do the spaces, and the numbers can be copied. Where they do
not, a map between what both bases compute is fitted, and judged by how far the target then
changes as the source did; where that cannot be told, by its fit on what it has not seen.

The thresholds are of the lab's small bases (docs/methods/choosing.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regraft.methods.choose import COVERAGE, PairFacts, Verdict, VerdictWord
from regraft.methods.inserts import ACTIVATION_MAP, COPY

#: Mean cosine of the weights from which two spaces count as the same.
RELATED = 0.3
#: Least share of the wanted change (regraft.inserts.carry) that a carried insert has to make.
FOLLOWED = 0.4
#: Least R², on calibration that was kept back, of a map worth using where that share is not known.
FIT = 0.3


def from_weights(facts: Sequence[PairFacts]) -> Verdict | None:
    """The verdict where the weights settle it; None where a map has to be tried.

    Parameters
    ----------
    facts : sequence of PairFacts
        One per pair, of the weights that make its space; shares sum to at most 1.
    """
    if not facts:
        return _verdict(facts, "don't", None, "Nothing of the adapter has a place on the target.")
    coverage, cosine, difference = _means(facts)
    if coverage < COVERAGE or cosine < RELATED:
        return None
    if any(f.by_similarity for f in facts):
        why = (
            "The target has other blocks than the source; each takes what stood at the block it "
            f"resembles (mean cosine {cosine:.3f})."
        )
        return _verdict(facts, "carry", COPY.name, why)
    if all(f.identical for f in facts):
        why = "The weights that make its space are identical in the two bases."
        return _verdict(facts, "copy", COPY.name, why)
    why = (
        "The weights that make its space are still close to the source's (mean cosine "
        f"{cosine:.3f}, moved by {difference:.0%})."
    )
    return _verdict(facts, "copy", COPY.name, why)


@dataclass(frozen=True)
class MapEvidence:
    """How good a map was: R² on what was kept back, and the share of the wanted change that the
    carried insert makes on the target; None for what is not known."""

    fit: float | None
    followed: float | None = None

    @property
    def good(self) -> bool:
        """Whether it is worth using."""
        if self.followed is not None:
            return self.followed >= FOLLOWED
        return self.fit is not None and self.fit >= FIT

    def __str__(self) -> str:
        if self.followed is not None:
            return f"{self.followed:.2f} of the change it makes on the source"
        return "an unknown share" if self.fit is None else f"R² {self.fit:.2f} on unseen inputs"


def from_map(facts: Sequence[PairFacts], found: MapEvidence | None, why_not: str = "") -> Verdict:
    """The verdict where the weights say nothing.

    Parameters
    ----------
    facts : sequence of PairFacts
    found : MapEvidence or None
        None where no map was fitted.
    why_not : str
        Why none was fitted, as the end of a sentence.
    """
    apart = _apart(facts)
    if found is None:
        return _verdict(facts, "don't", None, f"{apart}, and {why_not}.")
    if not found.good:
        why = f"{apart}, and through a map between what they compute too little comes: {found}."
        return _verdict(facts, "don't", None, why)
    why = f"{apart}, but a map between what they compute carries it: {found}."
    return _verdict(facts, "carry", ACTIVATION_MAP.name, why)


def _apart(facts: Sequence[PairFacts]) -> str:
    coverage, cosine, _ = _means(facts)
    if coverage < COVERAGE:
        return "The weights that make its space have other shapes on the target"
    return f"The weights that make the two bases' spaces are not related (mean cosine {cosine:.3f})"


def _means(facts: Sequence[PairFacts]) -> tuple[float, float, float]:
    """Coverage, and the mean cosine and difference over what it covers."""
    fitting = [f for f in facts if f.cosine is not None]
    coverage = sum((f.share for f in fitting), 0.0)
    weight = max(coverage, 1e-30)
    cosine = sum((f.share * (f.cosine or 0.0) for f in fitting), 0.0) / weight
    difference = sum(f.share * min(f.difference or 0.0, 1e6) for f in fitting) / weight
    return coverage, cosine, difference


def _verdict(
    facts: Sequence[PairFacts], word: VerdictWord, method: str | None, why: str
) -> Verdict:
    # No curve predicts the retention of an insert.
    return Verdict(word, method, why, *_means(facts), predicted=0.0)
