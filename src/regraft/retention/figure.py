"""The figure: retention R, its error, its spread, and what it does with the adapter's strength.

Plain arithmetic on numbers that were measured elsewhere.

R = (transferred − target) / (retrained − target): 1 is as good as training the adapter again on the
target, 0 as good as no adapter. A loss or a score will do: a change of scale, of origin or of sign
of the metric leaves R as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

#: A value within this of a curve's best counts as the best: R is rarely measured more finely.
TOLERANCE = 0.02
#: How far from 1 the best strength may lie and still be right.
NEAR_ONE = 0.25


@dataclass(frozen=True)
class Retention:
    """R and what it is made of, in the metric's units.

    ``value`` is None where R is not defined; ``reason`` then says why. ``error`` is R's standard
    error, where items were measured one by one.
    """

    value: float | None
    target: float
    transferred: float
    retrained: float
    reason: str = ""
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def retention(
    *,
    target: float,
    transferred: float,
    retrained: float,
    margin: float = 0.0,
    better: Literal["lower", "higher"] | None = None,
) -> Retention:
    """R from three values of one metric on the same data.

    Parameters
    ----------
    target : float
        The bare target base.
    transferred : float
        The target base with the transferred adapter.
    retrained : float
        The target base with an adapter trained on it.
    margin : float
        In the metric's units: where retraining moved the metric by this or less, R is not defined,
        because it would divide by noise.
    better : "lower" or "higher", optional
        Which way the metric gets better. If given, R is not defined either where retraining made
        it worse.

    Returns
    -------
    Retention

    Raises
    ------
    ValueError
        A negative margin.
    """
    if not margin >= 0:
        raise ValueError(f"a margin of {margin}")
    reason = ""
    gain = retrained - target
    if not all(map(math.isfinite, (target, transferred, retrained))):
        reason = "a measured value is not finite"
    elif abs(gain) <= margin:
        reason = f"retraining moved the metric by {gain:.3g}, not more than the margin {margin:.3g}"
    elif better is not None and (gain > 0) != (better == "higher"):
        reason = f"retraining made the metric worse, by {abs(gain):.3g}"
    # adding 0.0 turns -0.0, of an adapter that changed nothing, into 0.0
    value = None if reason else (transferred - target) / gain + 0.0
    return Retention(value, target, transferred, retrained, reason)


def mean_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values, s / √n; None for fewer than two.

    For two adapters on the same items, give the differences item by item: what makes an item hard
    for both then cancels.
    """
    found = spread(values).sd
    return None if found is None else found / math.sqrt(len(values))


def ratio_error(above: Sequence[float], below: Sequence[float]) -> float | None:
    """Standard error of mean(above) / mean(below), both measured on the same n items.

    The linearised variance of a ratio of means, Σ (aᵢ − R bᵢ)² / (n (n − 1)) / mean(b)² (Cochran
    1977, "Sampling Techniques", §2.11 without its finite-population factor). With a the gains of
    the transferred adapter and b those of the retrained one, it is the error of R.

    Returns
    -------
    float or None
        None for fewer than two items, or where mean(below) is 0.
    """
    n = len(above)
    if n != len(below):
        raise ValueError(f"{n} and {len(below)} items")
    bottom = math.fsum(below) / n if n else 0.0
    if n < 2 or bottom == 0:
        return None
    ratio = math.fsum(above) / n / bottom
    squares = math.fsum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True))
    return math.sqrt(squares / (n * (n - 1))) / abs(bottom)


@dataclass(frozen=True)
class Spread:
    """Several values of one figure, such as R over seeds. ``sd`` is the sample standard deviation
    (n − 1), None for a single value."""

    mean: float
    sd: float | None
    least: float
    most: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation, least, most and count.

    Raises
    ------
    ValueError
        No values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    mean = math.fsum(values) / n
    sd = None if n == 1 else math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Spread(mean, sd, min(values), max(values), n)


@dataclass(frozen=True)
class StrengthCurve:
    """R (or another figure of which more is better) at several strengths of one adapter.

    Attributes
    ----------
    strengths : tuple of float
        Ascending; 1.0 is among them.
    values : tuple of float
        The figure at each.
    """

    strengths: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.strengths) != len(self.values):
            raise ValueError(f"{len(self.strengths)} strengths but {len(self.values)} values")
        if list(self.strengths) != sorted(set(self.strengths)):
            raise ValueError("the strengths are not ascending, or not all different")
        if 1.0 not in self.strengths:
            raise ValueError("strength 1.0 is not among the strengths")
        if not all(map(math.isfinite, (*self.strengths, *self.values))):
            raise ValueError("a strength or a value is not finite")

    @property
    def at_one(self) -> float:
        """The figure at strength 1.0."""
        return self.values[self.strengths.index(1.0)]

    @property
    def best(self) -> float:
        """The strength with the highest figure; among equals the one nearest 1, then the lower."""
        top = max(self.values)
        equals = [s for s, v in zip(self.strengths, self.values, strict=True) if v == top]
        return min(equals, key=lambda s: (abs(s - 1.0), s))

    @property
    def best_value(self) -> float:
        """The highest figure."""
        return max(self.values)

    @property
    def right_at_one(self) -> bool:
        """Whether a user who leaves the strength at 1.0 is served well.

        True if the best strength is within :data:`NEAR_ONE` of 1, or if the figure at 1.0 is
        within :data:`TOLERANCE` of the best: on a plateau the exact maximum means nothing.
        """
        near = abs(self.best - 1.0) <= NEAR_ONE + 1e-9
        return near or self.best_value - self.at_one <= TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the best strength and whether 1.0 is right."""
        derived = {"best": self.best, "right_at_one": self.right_at_one}
        return {"strengths": list(self.strengths), "values": list(self.values), **derived}
