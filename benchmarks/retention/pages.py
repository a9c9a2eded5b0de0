"""The battery as a page (``docs/retention.md``) and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.retention.evidence import Evidence
from benchmarks.retention.families_page import family_lines
from benchmarks.retention.markdown import table
from benchmarks.retention.picture import draw
from benchmarks.retention.prediction import prediction_lines
from benchmarks.retention.rows import Row
from benchmarks.retention.summary import MAIN, Cell, curve, grid, regrets, select, two, upgrades

#: below this mean R, no strength is worth naming
NOTHING = 0.05
KINDS = {"diffusion": "Text to image", "language": "Language"}

HEAD = """# Retention: what survives an upgrade

Written by `make retention`; do not edit. What it means: [metrics.md](metrics.md). What follows from
it: [findings.md](findings.md). All rows: `benchmarks/retention.json`.

R = (transferred − target base) / (retrained on the target − target base). 1: as good as retraining;
0: as good as no adapter; below 0: harm. A cell is the mean over adapters of the mean over training
seeds ± the standard deviation over seeds (lowest … highest single row).
"""


def write_pages(
    docs: Path,
    rows: Sequence[Row],
    seen: Sequence[Evidence],
    drift: Path,
    manifest: Path,
    *,
    quick: bool = False,
) -> None:
    """Write ``retention.md`` and ``images/retention.png`` under ``docs``.

    ``drift`` holds the rows of ``lab.drift``, ``manifest`` is the lab's.
    """
    lines = [HEAD]
    if quick:
        lines.append("**A quick run: few pictures and texts, one adapter. Not for quoting.**\n")
    lines.append("![R of every method over every upgrade](images/retention.png)\n")
    for kind in [k for k in KINDS if select(rows, kind=k)]:
        lines += _kind(kind, rows, seen)
    lines += prediction_lines(rows, seen, drift)
    lines += _auto(rows)
    lines += family_lines(rows, seen, manifest)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "retention.md").write_text("\n".join(lines).rstrip() + "\n")
    draw(rows, docs / "images" / "retention.png")


def _kind(kind: str, rows: Sequence[Row], seen: Sequence[Evidence]) -> list[str]:
    lines = [f"## {KINDS[kind]}\n", *_counts(kind, rows), *_evidence(kind, seen)]
    for rank in sorted({r.rank for r in rows if r.kind == kind and not r.recipe}):
        chosen = select(rows, kind=kind, rank=rank)
        lines += [f"### R on {MAIN[kind]}, LoRA rank {rank}\n", *_grid(chosen), *_refusals(chosen)]
    lines += _adapters(kind, rows)
    lines += _strengths(kind, rows)
    own = {r.metric for r in rows if r.kind == kind and not r.recipe}
    others = sorted(own - {MAIN[kind]})
    for metric in others:
        chosen = select(rows, kind=kind, metric=metric)
        if any(r.retention is not None for r in chosen):
            lines += [f"### R on {metric}\n", *_grid(chosen)]
        else:
            lines += [f"### {metric.capitalize()}: the value itself\n", *_values(chosen)]
    return [*lines, *_weights_only(kind, rows)]


def _counts(kind: str, rows: Sequence[Row]) -> list[str]:
    here = select(rows, kind=kind)
    mine = [r for r in here if r.method not in ("retrained", "random")]
    adapters = {(r.adapter, r.rank, r.seed) for r in mine}
    retrained = {(r.upgrade, r.adapter, r.rank, r.seed) for r in here if r.method == "retrained"}
    names = ", ".join(sorted({a for a, _, _ in adapters}))
    return [
        f"{len(adapters)} adapters ({names}; rank 8 and 32) on one source base; "
        f"{len(retrained)} retrained references.\n"
    ]


def _grid(rows: Sequence[Row]) -> list[str]:
    columns = upgrades(rows)
    found = grid(rows)
    body = [[m, *(cells[u].text() for u in columns)] for m, cells in found.items()]
    return table(["method", *columns], body)


def _refusals(rows: Sequence[Row]) -> list[str]:
    said: list[str] = []
    for method, cells in grid(rows).items():
        for upgrade, found in cells.items():
            if found.refused:
                said.append(_refusal(method, upgrade, found))
    return [*said, ""] if said else []


def _refusal(method: str, upgrade: str, found: Cell) -> str:
    return f"- {method}, {upgrade}: {found.refused} × “{found.reason}”"


def _adapters(kind: str, rows: Sequence[Row]) -> list[str]:
    chosen = select(rows, kind=kind, rank=8)
    columns = upgrades(chosen)
    body = []
    for adapter in sorted({r.adapter for r in chosen}):
        cells = grid([r for r in chosen if r.adapter == adapter]).get("copy", {})
        body.append([adapter, *(cells[u].text() if u in cells else "–" for u in columns)])
    title = "### Plain copying, adapter by adapter (rank 8)\n"
    return [title, *table(["adapter", *columns], body)]


def _strengths(kind: str, rows: Sequence[Row]) -> list[str]:
    chosen = select(rows, kind=kind, strength=None)
    body = []
    strengths: list[float] = []
    for method in grid(chosen):
        for upgrade in upgrades(chosen):
            found = curve(chosen, method, upgrade)
            if len(found) < 2:
                continue
            strengths = sorted(found)
            best = max(found, key=lambda s: found[s])
            right = abs(best - 1) <= 0.25 or found[best] - found[1.0] <= 0.02
            note = "yes" if right else f"**no: best at {best:g}**"
            if max(found.values()) < NOTHING:
                note = "nothing arrives at any strength"
            body.append([method, upgrade, *(two(found[s]) for s in strengths), note])
    if not body:
        return []
    head = ["method", "upgrade", *(f"×{s:g}" for s in strengths), "right at 1.0"]
    text = (
        "Mean over the adapters of seed 0. “Right at 1.0”: the best R lies at 1.0 ± 0.25, or is "
        "at most 0.02 above R at 1.0.\n"
    )
    return ["### Strength (rank 8, seed 0)\n", text, *table(head, body)]


def _values(rows: Sequence[Row]) -> list[str]:
    columns = upgrades(rows)
    methods = list(grid(rows))
    body = []
    for method in methods:
        line = [method]
        for upgrade in columns:
            got = [
                r.transferred
                for r in rows
                if r.method == method and r.upgrade == upgrade and r.transferred is not None
            ]
            line.append(f"{sum(got) / len(got):.3f}" if got else "–")
        body.append(line)
    return table(["method", *columns], body)


def _weights_only(kind: str, rows: Sequence[Row]) -> list[str]:
    chosen = select(rows, kind=kind, rank=8)
    columns = upgrades(chosen)
    lines = []
    for title, name in (("Energy kept", "energy_kept"), ("Intruder dimensions", "intruders")):
        body = []
        for method in grid(chosen):
            found: list[str] = []
            for upgrade in columns:
                got = [
                    getattr(r, name)
                    for r in chosen
                    if r.method == method and r.upgrade == upgrade and getattr(r, name) is not None
                ]
                found.append(f"{sum(got) / len(got):.2f}" if got else "–")
            if set(found) != {"–"}:
                body.append([method, *found])
        lines += [f"### {title} (rank 8)\n", *table(["method", *columns], body)]
    return lines


def _evidence(kind: str, seen: Sequence[Evidence]) -> list[str]:
    names: dict[str, Any] = {
        "cosine": "weight cosine",
        "difference": "moved by",
        "coverage": "coverage",
        "phi_left": "Φ_l",
        "phi_right": "Φ_r",
        "chance": "Φ by chance",
        "atc": "ATC",
        "cka": "CKA",
        "verdict": "verdict",
    }
    mine = [e for e in seen if e.kind == kind]
    body = [[e.upgrade, *(_fact(e, name) for name in names), str(e.facts["lineage"])] for e in mine]
    title = "### The bases, before any adapter is touched\n"
    return [title, *table(["upgrade", *names.values(), "lineage"], body)]


def _fact(seen: Evidence, name: str) -> str:
    """One figure of a pair of bases; none where no weights could be compared."""
    absent = name in ("cosine", "difference") and not seen.facts["coverage"]
    return _short(None if absent else seen.facts.get(name))


def _short(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _auto(rows: Sequence[Row]) -> list[str]:
    lines = ["## What `--method auto` chose, against plain copying\n"]
    body = []
    for kind in KINDS:
        found = regrets(select(rows, kind=kind))
        if found:
            row, most = found[0]
            worse = sum(1 for _, regret in found if regret > 0.005)
            case = f"{row.upgrade}, {row.adapter}, rank {row.rank}, seed {row.seed}"
            body.append([KINDS[kind], str(len(found)), str(worse), f"{most:+.3f} ({case})"])
    head = ["family", "rows", "auto keeps less than copy", "largest loss against copy"]
    return [*lines, *table(head, body)]
