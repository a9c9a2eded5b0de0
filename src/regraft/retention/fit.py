"""Fitting the prediction of retention to measured rows, and judging it on upgrades it has not seen.

Rows of one upgrade share their bases, so they are no independent proof of each other: the held-out
unit is the upgrade of one kind of base, all of its methods, adapters and seeds together.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regraft.errors import BadOption, MissingDependency
from regraft.methods.predict import CURVE, Curve, PairEvidence

#: Methods that are no prediction's business: a reference, a baseline, and a choice among the rest.
_NOT_METHODS = frozenset({"retrained", "random", "auto"})
#: decay, harm, energy: lowest and highest.
_BOUNDS = ((0.05, 0.0, 0.05), (60.0, 3.0, 4.0))
#: Residuals of R above this count less than squared: one disastrous row must not set the curve.
_USUAL = 0.3


@dataclass(frozen=True)
class Observation:
    """One measured R, and what was seen before it.

    ``group`` is what is held out together; ``figures`` are further figures of the pair of bases,
    by name.
    """

    group: Hashable
    method: str
    cosine: float
    kept: float
    retention: float
    figures: Mapping[str, float]

    def predicted(self, curve: Curve) -> float:
        """R̂ under a curve."""
        return curve.retention(self.cosine, self.kept)


@dataclass(frozen=True)
class Judgement:
    """How good a prediction is, over ``n`` rows of ``groups`` upgrades.

    Attributes
    ----------
    curve : Curve
        Fitted to all rows.
    spearman : float or None
        Rank correlation of R with the R̂ of curves that have not seen the row's upgrade.
    error : float
        Mean |R̂ − R| of the same.
    spearman_seen : float or None
        Rank correlation with the R̂ of ``curve``; an upper bound on what it is worth.
    within : dict of group to float
        Rank correlation among the rows of one upgrade, held out: does it order the methods?
        Upgrades with fewer than three rows, or with equal values only, are left out.
    """

    curve: Curve
    spearman: float | None
    error: float
    spearman_seen: float | None
    within: dict[Hashable, float]
    n: int
    groups: int


def observations(
    rows: Iterable[Mapping[str, Any]], evidence: Iterable[Mapping[str, Any]]
) -> list[Observation]:
    """Measured rows joined with the evidence of their pair of bases.

    Parameters
    ----------
    rows : iterable of mappings
        With ``kind``, ``upgrade``, ``method``, ``retention``, and if known ``energy_kept`` and
        ``strength``, as in ``benchmarks/retention.json``. Give those of one metric. Rows without R,
        at another strength than 1, and those of no method (retrained, random, auto) are left out.
    evidence : iterable of mappings
        With ``kind``, ``upgrade``, and ``facts``: ``cosine``, ``coverage``, ``keeps``, and further
        figures.

    Raises
    ------
    BadOption
        A row's pair of bases has no evidence.
    """
    seen = {(e["kind"], e["upgrade"]): e["facts"] for e in evidence}
    found = []
    for row in rows:
        other = row["method"] in _NOT_METHODS
        if other or row["retention"] is None or row.get("strength", 1.0) != 1.0:
            continue
        group = (row["kind"], row["upgrade"])
        if group not in seen:
            raise BadOption(f"No evidence for {' '.join(group)}, which has rows.")
        facts = seen[group]
        kept = row.get("energy_kept")
        if kept is None:
            pair = PairEvidence(facts["cosine"], facts["coverage"], facts.get("keeps", {}))
            kept = pair.kept(row["method"])
        if kept is not None:
            figures = {k: float(v) for k, v in facts.items() if _is_number(v)}
            found.append(
                Observation(
                    group=group,
                    method=row["method"],
                    cosine=float(facts["cosine"]),
                    kept=float(kept),
                    retention=float(row["retention"]),
                    figures=figures,
                )
            )
    return found


def fit(seen: Sequence[Observation], start: Curve = CURVE) -> Curve:
    """The curve with the least squared error, each upgrade weighing the same.

    Large errors count less (soft L1). The same observations give the same curve.

    Raises
    ------
    MissingDependency
        scipy is not installed.
    BadOption
        No observations.
    """
    if not seen:
        raise BadOption("There are no measured rows to fit a prediction to.")
    least_squares = _scipy("optimize").least_squares
    cosine, kept, measured = (
        np.array([getattr(o, name) for o in seen]) for name in ("cosine", "kept", "retention")
    )
    sizes: dict[Hashable, int] = {}
    for o in seen:
        sizes[o.group] = sizes.get(o.group, 0) + 1
    weight = np.array([1 / sizes[o.group] for o in seen]) ** 0.5
    cosine, kept = np.clip(cosine, 0, None), np.clip(kept, 0, None)

    def residuals(x: np.ndarray) -> np.ndarray:
        decay, harm, energy = x
        guess = kept**energy * ((1 + harm) * cosine**decay - harm)
        return np.asarray(weight * (guess - measured))

    low, high = (np.array(side) for side in _BOUNDS)
    best = None
    # A steep and a flat start besides the given one: the error has plateaus at both ends.
    for x in ((start.decay, start.harm, start.energy), (0.5, 0.1, 0.5), (15.0, 0.1, 0.5)):
        found = least_squares(
            residuals, np.clip(x, low, high), bounds=(low, high), loss="soft_l1", f_scale=_USUAL
        )
        if best is None or found.cost < best.cost - 1e-12:
            best = found
    assert best is not None
    return Curve(*(float(v) for v in best.x))


def judge(seen: Sequence[Observation]) -> Judgement:
    """Fit, and judge by leaving out one upgrade at a time.

    Raises
    ------
    MissingDependency
    BadOption
        Fewer than two upgrades: nothing can be held out.
    """
    groups = list(dict.fromkeys(o.group for o in seen))
    if len(groups) < 2:
        raise BadOption(f"A prediction is judged on upgrades left out; there are {len(groups)}.")
    curve = fit(seen)
    held_out: dict[int, float] = {}
    for group in groups:
        others = fit([o for o in seen if o.group != group], start=curve)
        held_out |= {i: o.predicted(others) for i, o in enumerate(seen) if o.group == group}
    guesses = [held_out[i] for i in range(len(seen))]
    measured = [o.retention for o in seen]
    within = {}
    for group in groups:
        mine = [i for i, o in enumerate(seen) if o.group == group]
        rho = spearman([guesses[i] for i in mine], [measured[i] for i in mine])
        if rho is not None:
            within[group] = rho
    return Judgement(
        curve=curve,
        spearman=spearman(guesses, measured),
        error=float(np.mean(np.abs(np.subtract(guesses, measured)))),
        spearman_seen=spearman([o.predicted(curve) for o in seen], measured),
        within=within,
        n=len(seen),
        groups=len(groups),
    )


def figure_correlations(
    seen: Sequence[Observation], method: str = "copy"
) -> dict[str, tuple[float, int]]:
    """How each figure of a pair of bases alone ranks one method's R: (Spearman, pairs of bases).

    R is averaged per pair of bases first, so pairs count once however many rows they have.
    """
    by_group: dict[Hashable, list[Observation]] = {}
    for o in seen:
        if o.method == method:
            by_group.setdefault(o.group, []).append(o)
    names = dict.fromkeys(name for group in by_group.values() for name in group[0].figures)

    found = {}
    for name in names:
        there = [group for group in by_group.values() if name in group[0].figures]
        measured = [float(np.mean([o.retention for o in group])) for group in there]
        rho = spearman([group[0].figures[name] for group in there], measured)
        if rho is not None:
            found[name] = (rho, len(there))
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three values or a side without variation."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values")
    if len(a) < 3 or min(np.ptp(a), np.ptp(b)) == 0:
        return None
    return float(_scipy("stats").spearmanr(a, b).statistic)


def _scipy(part: str) -> Any:
    try:
        return importlib.import_module(f"scipy.{part}")
    except ImportError as error:
        raise MissingDependency(
            f"Fitting a prediction needs the package {error.name!r}.",
            fix="pip install 'regraft[measure]'",
        ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
