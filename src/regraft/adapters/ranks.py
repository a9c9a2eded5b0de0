"""The rank of an output: how many directions of ΔW are kept, and by which rule.

A rule is written as text, as on the command line:

=====================  ===========================================================================
``auto``               every direction, unless the factors would outgrow ΔW itself: then 99 % of
                       its energy
``exact``              every direction above rounding noise
``16``                 at most this many
``0.99``               the fewest with this share of the energy, Σσ² kept / Σσ²
``sv_fro=0.9``         … of the norm, ‖kept‖ / ‖all‖: a share of the energy of 0.9²
``sv_cumulative=0.9``  … of the sum of singular values, Σσ kept / Σσ
``sv_ratio=10``        every direction with σ above σ₁ / 10
=====================  ===========================================================================

``,max=32`` behind any of them but a number sets the largest rank.

The three ``sv_`` rules are those of kohya-ss/sd-scripts, ``networks/resize_lora.py`` (Apache-2.0),
``--dynamic_method``, ``--dynamic_param``, with ``--new_rank`` as the largest. They choose the same
rank as that script does since its pull request 2194; before, it kept one direction more. On purpose
different:

* they see ΔW with its scale, and only a ΔW of zero falls to rank 1 (there: σ₁ ≤ 1e-6 before the
  scale, which drops all but one direction of a weak adapter);
* no rule keeps directions that are rounding noise, or more than ΔW has (there a fixed rank above
  a weight's width leaves ``alpha`` too large);
* σ is compared in fp64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from regraft.adapters.algebra import rank_for_energy
from regraft.errors import BadOption

Kind = Literal["auto", "exact", "rank", "energy", "sv_fro", "sv_cumulative", "sv_ratio"]

#: Directions with σ at or below this share of σ₁ are rounding noise of fp32.
NOISE = 1e-7
#: The share of the energy that ``auto`` keeps where the exact factors would outgrow ΔW.
AUTO_ENERGY = 0.99

_SHARES = ("energy", "sv_fro", "sv_cumulative")
_FIX = "Write a number (16), a share of the energy (0.99), exact, auto, sv_fro=0.9, \
sv_cumulative=0.9 or sv_ratio=10; all but a number take a largest rank (exact,max=32)."


@dataclass(frozen=True)
class RankRule:
    """How an output rank is chosen from singular values.

    Parameters
    ----------
    kind : str
        One of :data:`Kind`.
    value : int or float, optional
        The number of directions, the share in (0, 1], or the ratio of at least 1; none for
        "auto" and "exact".
    largest : int, optional
        Never more than this.

    Raises
    ------
    BadOption
        The value is missing, not asked for, or out of range.
    """

    kind: Kind = "auto"
    value: int | float | None = None
    largest: int | None = None

    def __post_init__(self) -> None:
        problem = _problem(self.kind, self.value)
        if problem:
            what = "A rank" if self.kind == "rank" else f"The rank rule {self.kind}"
            raise BadOption(f"{what} {problem}.", fix=_FIX)
        if self.largest is not None and (self.kind == "rank" or self.largest < 1):
            raise BadOption(
                f"The largest rank cannot be {self.largest} with the rule {self.kind}.", fix=_FIX
            )

    @classmethod
    def parse(cls, text: str | int | float | RankRule | None) -> RankRule:
        """The rule that a text, a number or None (the default) stands for.

        An int is a rank and a float a share of the energy: 1 is rank 1, 1.0 is all of it.

        Raises
        ------
        BadOption
        """
        if isinstance(text, RankRule):
            return text
        if text is None:
            return cls()
        written = "".join(str(text).split()).lower()
        rule, comma, largest = written.partition(",max=")
        if isinstance(text, bool) or (comma and not largest.isdecimal()):
            raise BadOption(f"No rank rule {str(text)!r}.", fix=_FIX)
        most = int(largest) if comma else None
        name, equals, number = rule.partition("=")
        if name in ("auto", "exact") and not equals:
            return cls(name, largest=most)  # type: ignore[arg-type]
        if not equals:
            name, number = ("rank" if rule.lstrip("+-").isdecimal() else "energy"), rule
        if name not in get_args(Kind) or not re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", number):
            raise BadOption(f"No rank rule {str(text)!r}.", fix=_FIX)
        try:
            value = float(number)
        except ValueError:
            raise BadOption(f"No rank rule {str(text)!r}.", fix=_FIX) from None
        return cls(name, value, most)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The text that :meth:`parse` reads back as this rule."""
        if self.kind == "rank":
            return str(int(self.value or 0))
        text: str = self.kind if self.value is None else f"{self.kind}={self.value!r}"
        return text if self.largest is None else f"{text},max={self.largest}"

    def to_json(self) -> dict[str, Any]:
        """For provenance; :meth:`from_json` is its inverse."""
        fields = {"rule": self.kind, "value": self.value, "largest": self.largest}
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RankRule:
        """The rule that :meth:`to_json` wrote.

        Raises
        ------
        BadOption
        """
        if data.get("rule") not in get_args(Kind):
            raise BadOption(f"No rank rule {data.get('rule')!r}.", fix=_FIX)
        return cls(data["rule"], data.get("value"), data.get("largest"))

    def choose(self, s: Float[Tensor, " q"], shape: tuple[int, int]) -> int:
        """How many directions to keep.

        Parameters
        ----------
        s : Tensor of shape (q,)
            The singular values of ΔW, largest first, scale included. Those beyond q are zero.
        shape : (m, n)
            Of ΔW seen as a matrix; only "auto" asks for it.

        Returns
        -------
        int
            At least 1, also for a ΔW of zero; at most :func:`exact_rank` and ``largest``.
        """
        exact = exact_rank(s)
        if s.numel() == 0 or float(s[0]) <= 0:
            return 1
        rank = max(1, min(exact, self._wanted(s.double(), shape, exact)))
        return rank if self.largest is None else min(rank, self.largest)

    def _wanted(self, s: Tensor, shape: tuple[int, int], exact: int) -> int:
        value = self.value or 0.0
        if self.kind == "rank":
            return int(value)
        if self.kind == "energy":
            return rank_for_energy(s, value)
        if self.kind == "sv_fro":
            return _first_reaching(s.square(), value**2)
        if self.kind == "sv_cumulative":
            return _first_reaching(s, value)
        if self.kind == "sv_ratio":
            return int((s > s[0] / value).sum())
        if self.kind == "auto" and not fits(exact, shape):
            return rank_for_energy(s, AUTO_ENERGY)
        return exact


def exact_rank(s: Float[Tensor, " q"]) -> int:
    """The number of singular values above rounding noise, :data:`NOISE` times the first."""
    return int((s.double() > float(s[0]) * NOISE).sum()) if s.numel() else 0


def fits(rank: int, shape: tuple[int, int]) -> bool:
    """Whether two factors of this rank hold no more numbers than the m × n matrix itself."""
    m, n = shape
    return rank * (m + n) <= m * n


def _first_reaching(parts: Tensor, share: float) -> int:
    """The smallest k whose first k parts hold this share of the sum."""
    sums = parts.cumsum(0) / parts.sum()
    return min(int(torch.searchsorted(sums, share)) + 1, parts.numel())


def _problem(kind: str, value: int | float | None) -> str:
    if kind in ("auto", "exact"):
        return "" if value is None else "takes no value"
    if value is None:
        return "needs a value"
    if kind == "rank":
        return "" if value >= 1 and float(value).is_integer() else f"cannot be {value:g}"
    if kind in _SHARES:
        return "" if 0 < value <= 1 else f"needs a share in (0, 1], not {value:g}"
    return "" if 1 <= value < float("inf") else f"needs a ratio of at least 1, not {value:g}"
