"""Predicting retention from the weights of two bases, before any adapter is run.

    R̂ = kept^q · ((1 + h) · max(cosine, 0)^p − h)

* ``cosine``: the mean cosine of the paired weights. Retention falls with the distance between two
  bases: identical weights give the factor 1, unrelated ones −h, the harm of an update that fits
  another model.
* ``kept``: the share of the adapter's energy that a method puts on the target. Nothing carried is
  as good as no adapter: 0. With q = ½ it counts as a share of ‖ΔW‖.

Regraft's own; no paper gives one. It rises with ``kept`` where copying helps, and with ``cosine``
always. The constants are fitted by :mod:`regraft.retention.fit` on the measured battery.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Curve:
    """The constants of the formula.

    Attributes
    ----------
    decay : float
        p, above 0: how fast retention falls with the cosine.
    harm : float
        h, at least 0: −R where the bases are unrelated and everything is carried.
    energy : float
        q, above 0: how much a lost share of the energy costs.
    """

    decay: float
    harm: float
    energy: float

    def retention(self, cosine: float, kept: float) -> float:
        """R̂ of one method; ``kept`` in [0, 1], ``cosine`` in [-1, 1]."""
        fit = (1 + self.harm) * float(max(cosine, 0.0) ** self.decay) - self.harm
        return float(max(kept, 0.0) ** self.energy) * fit


#: Fitted to 555 rows of the battery and its drift (docs/retention.md), where it ranks held-out R
#: with a correlation of 0.90 and a mean error of 0.08. Small bases: trust the order more than the
#: digits.
CURVE = Curve(decay=2.38, harm=0.06, energy=0.45)


@dataclass(frozen=True)
class PairEvidence:
    """What is seen of a pair of bases and, where it is known, of an adapter between them.

    Attributes
    ----------
    cosine : float
        Mean cosine of the paired weights, weighted by the adapter's energy or by size.
    coverage : float
        Share of the adapter (or of the source's numbers) with a weight of its shape on the target.
    keeps : mapping of method to float
        Share of the energy that each method keeps of what is covered; copying always keeps 1.
    """

    cosine: float
    coverage: float
    keeps: Mapping[str, float] = field(default_factory=dict)

    def kept(self, method: str) -> float | None:
        """The share of the adapter's energy that ``method`` puts on the target, if known."""
        share = 1.0 if method == "copy" else self.keeps.get(method)
        return None if share is None else share * self.coverage


def predict(evidence: PairEvidence, curve: Curve = CURVE) -> dict[str, float]:
    """R̂ of copying and of every method whose energy kept is known, best first.

    Parameters
    ----------
    evidence : PairEvidence
    curve : Curve

    Returns
    -------
    dict of method to float
        Equal predictions are in order of name, copying first: it is the cheapest.
    """
    found = {}
    for name in dict.fromkeys(["copy", *sorted(evidence.keeps)]):
        kept = evidence.kept(name)
        if kept is not None:
            found[name] = curve.retention(evidence.cosine, kept)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
