"""How well R is predicted from what is seen before an adapter is touched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from benchmarks.retention.evidence import Evidence
from benchmarks.retention.markdown import table
from benchmarks.retention.rows import Row
from benchmarks.retention.summary import MAIN
from regraft.methods.predict import CURVE
from regraft.retention.fit import (
    Observation,
    figure_correlations,
    judge,
    observations,
    spearman,
)

#: what a pair of bases shows, and what it is called
FIGURES = {
    "cosine": "weight cosine",
    "difference": "how far the weights moved",
    "phi_left": "Φ_l",
    "phi_right": "Φ_r",
    "atc": "ATC",
    "cka": "CKA",
    "coverage": "coverage",
}


def drift_rows(path: Path) -> list[Observation]:
    """Rows of ``python -m lab.drift``: copying over distances that the battery lacks."""
    if not path.exists():
        return []
    return [
        Observation(
            group=("drift", row["stage"]),
            method="copy",
            cosine=row["cosine"],
            kept=1.0,
            retention=row["retention"],
            figures={},
        )
        for row in json.loads(path.read_text())["rows"]
    ]


def drift_table(path: Path) -> list[str]:
    """The same rows for reading, one line per stage."""
    stages: dict[int, dict[str, dict[str, float]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        stages.setdefault(row["steps"], {})[row["adapter"]] = row
    names = sorted({name for stage in stages.values() for name in stage})
    lines = [
        f"| steps on | cosine | moved by | {' | '.join(f'R, {n}' for n in names)} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for steps, stage in stages.items():
        first = stage[names[0]]
        values = " | ".join(f"{stage[n]['retention']:.2f}" for n in names)
        moved = f"{first['difference']:.0%}"
        lines.append(f"| {steps} | {first['cosine']:.2f} | {moved} | {values} |")
    return lines


def observed(rows: Sequence[Row], seen: Sequence[Evidence]) -> list[Observation]:
    """LoRA's rows of the main metrics, joined with the evidence of their bases."""
    main = [asdict(r) for r in rows if r.metric == MAIN[r.kind] and not r.recipe]
    return observations(main, [asdict(e) for e in seen])


def prediction_lines(rows: Sequence[Row], seen: Sequence[Evidence], drift: Path) -> list[str]:
    """The page's part on prediction."""
    battery = observed(rows, seen)
    found = [*battery, *drift_rows(drift)]
    groups = {o.group for o in found}
    if len(groups) < 3:
        return []
    judged = judge(found)
    shipped = spearman([o.predicted(CURVE) for o in found], [o.retention for o in found])
    lines = [
        "## Prediction\n",
        "R̂ = kept^q · ((1 + h) · cosine^p − h), from the weights alone "
        "(`src/regraft/methods/predict.py`), fitted to the rows above and to the drift below.\n",
        "| | |",
        "|---|---|",
        f"| rows, pairs of bases | {judged.n}, {judged.groups} |",
        f"| rank correlation of R̂ and R, each pair of bases left out of its fit | "
        f"{_number(judged.spearman)} |",
        f"| mean error of R̂, likewise | {judged.error:.2f} |",
        f"| rank correlation, fitted to all | {_number(judged.spearman_seen)} |",
        f"| rank correlation of the shipped constants | {_number(shipped)} |",
        f"| fitted p, h, q | {judged.curve.decay:.2f}, {judged.curve.harm:.2f}, "
        f"{judged.curve.energy:.2f} |",
        f"| shipped p, h, q | {CURVE.decay:.2f}, {CURVE.harm:.2f}, {CURVE.energy:.2f} |",
        "",
        "Each figure alone against R of plain copying, one point per pair of bases:\n",
        "| figure | rank correlation | pairs |",
        "|---|---|---|",
    ]
    alone = figure_correlations(battery)
    for name, label in FIGURES.items():
        if name in alone:
            rho, count = alone[name]
            lines.append(f"| {label} | {rho:+.2f} | {count} |")
    if drift.exists():
        lines += [
            "",
            "The drift: copying to bases trained on and on from v1 (`python -m lab.drift`).\n",
        ]
        lines += drift_table(drift)
    return [*lines, ""]


def correlation_lines(rows: Sequence[Row], seen: Sequence[Evidence]) -> list[str]:
    """How the shipped prediction does on families that it was not fitted to."""
    known = {(e.kind, e.upgrade) for e in seen}
    main = [r for r in rows if r.metric == MAIN[r.kind] and (r.kind, r.upgrade) in known]
    body = []
    for family in dict.fromkeys(r.family for r in main):
        mine = [asdict(r) for r in main if r.family == family and r.energy_kept is not None]
        found = observations(mine, [asdict(e) for e in seen])
        if len(found) < 3:
            continue
        guesses, measured = [o.predicted(CURVE) for o in found], [o.retention for o in found]
        error = fmean(abs(g - m) for g, m in zip(guesses, measured, strict=True))
        rho = _number(spearman(guesses, measured))
        body.append([family, str(len(found)), rho, f"{error:.2f}"])
    head = ["family", "rows", "rank correlation", "mean error"]
    text = "R̂ with the shipped constants, which were fitted to LoRA's rows alone, per family:\n"
    return ["### Prediction over families\n", text, *table(head, body)] if body else []


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
