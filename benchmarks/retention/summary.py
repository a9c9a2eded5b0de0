"""Rows put together: mean, spread over seeds, range over adapters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks.retention.rows import UPGRADES, Row
from benchmarks.retention.variants import DELTAS, INSERTS, RANDOM, RETRAINED, VARIANTS

#: The metric a verdict rests on; it is cheap and has the least noise.
MAIN = {"diffusion": "denoising loss", "language": "held-out loss"}
METHODS = (
    *dict.fromkeys(v.name for v in (*VARIANTS, *DELTAS, *INSERTS)),
    *(RANDOM, RETRAINED),
)


@dataclass(frozen=True)
class Cell:
    """R of one method over one upgrade.

    ``mean`` is the mean over adapters of the mean over their seeds; ``seeds_sd`` the standard
    deviation over seeds of one adapter, pooled over adapters (None with one seed each); ``low`` and
    ``high`` the extreme rows; ``count`` how many rows; ``refused`` how many were refused.
    """

    mean: float | None
    seeds_sd: float | None
    low: float | None
    high: float | None
    count: int
    refused: int
    reason: str = ""

    def text(self) -> str:
        """For a table: ``0.93 ± 0.02 (0.88…0.97)``."""
        if self.mean is None:
            return "refused" if self.refused else "–"
        spread = "" if self.seeds_sd is None else f" ± {self.seeds_sd:.2f}"
        return f"{two(self.mean)}{spread} ({two(self.low)}…{two(self.high)})"


def two(value: float | None) -> str:
    """Two digits, and no minus in front of zero."""
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}"


def cell(rows: Sequence[Row]) -> Cell:
    """Rows of one method, upgrade and metric."""
    by_adapter: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.retention is not None:
            by_adapter[row.adapter, row.rank].append(row.retention)
    refused = [row.refused for row in rows if row.refused]
    reason = max(set(refused), key=refused.count) if refused else ""
    if not by_adapter:
        return Cell(None, None, None, None, 0, len(refused), reason)
    values = [v for group in by_adapter.values() for v in group]
    spreads = [stdev(group) for group in by_adapter.values() if len(group) > 1]
    return Cell(
        mean=fmean(fmean(group) for group in by_adapter.values()),
        seeds_sd=fmean(s * s for s in spreads) ** 0.5 if spreads else None,
        low=min(values),
        high=max(values),
        count=len(values),
        refused=len(refused),
        reason=reason,
    )


def select(
    rows: Iterable[Row],
    *,
    kind: str,
    metric: str | None = None,
    rank: int | None = None,
    strength: float | None = 1.0,
    adapter: str | None = None,
    recipe: str = "",
    family: str | None = None,
) -> list[Row]:
    """Rows of one kind that match; the kind's main metric unless another is named, and LoRA by the
    battery's own recipe unless another recipe is."""
    wanted = metric or MAIN[kind]
    return [
        row
        for row in rows
        if row.kind == kind
        and row.metric == wanted
        and (rank is None or row.rank == rank)
        and (strength is None or row.strength == strength)
        and (adapter is None or row.adapter == adapter)
        and row.recipe == recipe
        and (family is None or row.family == family)
    ]


def grid(rows: Sequence[Row]) -> dict[str, dict[str, Cell]]:
    """method → upgrade → cell, in the order of the tables; methods without rows are left out."""
    found: dict[str, dict[str, Cell]] = {}
    for method in METHODS:
        mine = [row for row in rows if row.method == method]
        if mine:
            found[method] = {u: cell([r for r in mine if r.upgrade == u]) for u in upgrades(rows)}
    return found


def upgrades(rows: Iterable[Row]) -> list[str]:
    """The upgrades that have rows, in the order of the tables."""
    there = {row.upgrade for row in rows}
    return [u for u in UPGRADES if u in there]


def curve(rows: Sequence[Row], method: str, upgrade: str) -> dict[float, float]:
    """strength → mean R of one method over one upgrade (adapters that have a curve)."""
    mine = [r for r in rows if r.method == method and r.upgrade == upgrade]
    with_curve = {(r.adapter, r.rank, r.seed) for r in mine if r.strength != 1.0}
    found: dict[float, list[float]] = defaultdict(list)
    for row in mine:
        if (row.adapter, row.rank, row.seed) in with_curve and row.retention is not None:
            found[row.strength].append(row.retention)
    return {strength: fmean(found[strength]) for strength in sorted(found)}


def regrets(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Rows of "auto" and how much less they keep than plain copying; the largest first."""
    copies = {_adapter(r): r.retention for r in rows if r.method == "copy"}
    found = []
    for row in rows:
        copied = copies.get(_adapter(row))
        if row.method == "auto" and row.retention is not None and copied is not None:
            found.append((row, copied - row.retention))
    return sorted(found, key=lambda pair: -pair[1])


def _adapter(row: Row) -> tuple[object, ...]:
    """The adapter and the upgrade of a row."""
    where = (row.kind, row.upgrade)
    return (*where, row.recipe, row.family, row.adapter, row.rank, row.seed)
