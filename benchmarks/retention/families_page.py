"""The page's part on families: what is left of each, the paper's comparison, sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.retention.evidence import Evidence
from benchmarks.retention.markdown import table
from benchmarks.retention.prediction import correlation_lines
from benchmarks.retention.rows import SHARED, Row
from benchmarks.retention.summary import MAIN, regrets, two, upgrades
from benchmarks.retention.variants import COMPARED, DELTAS, INSERTS, RANDOM
from lab.families_plan import INSERTS as INSERTED
from lab.families_plan import RECIPES, TASKS, step_name

NAMES = {"diffusion": "Text to image", "language": "Language"}
BY = ("lora-x, 32 directions", "lora-x", "copy")
#: shown for metrics beside the main one
SHORT = ("copy", "lora-x", "activation-map")
#: the paper marks what is within this of a trained adapter
CLAIM = 0.10
#: what a file carried by copying weighs is measured where shapes are the source's
SAME_SHAPES = "continued"


def family_lines(rows: Sequence[Row], seen: Sequence[Evidence], manifest: Path) -> list[str]:
    """The whole part; nothing where there are no rows."""
    mine = [r for r in rows if r.recipe == SHARED]
    if not mine:
        return []
    lines = [
        "## Families\n",
        "Every family trained on v1 by one recipe (`lab/families_plan.py`: the same steps, batch "
        "and data for all, the better of two or three learning rates), carried with every method "
        "that applies, and held against the same family trained on the target by the same recipe. "
        "Written at the default rank: a LoRA's own; of other families every direction, or 99 % of "
        "the energy where that would be larger than ΔW. `lora-x` has every direction of these "
        "weights, `lora-x-32` the first 32 of them as the paper's 320 are of SDXL's, "
        "`lora-x-32-full` a full core. `qlora` and `qa-lora` are trained on the quantised base and "
        "judged on the base as it is.\n",
    ]
    for kind in [k for k in NAMES if any(r.kind == k for r in mine)]:
        here = [r for r in mine if r.kind == kind]
        lines += _kind(kind, here)
        lines += _claims(kind, here)
    lines += _sizes(mine, manifest)
    lines += correlation_lines(mine, seen)
    return [*lines, *_auto(mine)]


def _kind(kind: str, rows: Sequence[Row]) -> list[str]:
    counts = {name: len({r.seed for r in rows if r.family == name}) for name in _families(rows)}
    lines = [
        f"### {NAMES[kind]}: `{TASKS[kind]}`\n",
        f"{len(counts)} families, {max(counts.values())} training seed(s) each on v1, one of every "
        "reference.\n",
    ]
    for metric in _metrics(kind, rows):
        chosen = [r for r in rows if r.metric == metric]
        tried = dict.fromkeys(v.name for v in (*DELTAS, *INSERTS))
        for variant in tried if metric == MAIN[kind] else SHORT:
            part = [r for r in chosen if r.method == variant]
            if any(r.retention is not None for r in part):
                lines += [f"R on {metric}, **{variant}**\n", *_by_family(part)]
        if metric == MAIN[kind]:
            lines += [f"R on {metric}, {RANDOM} updates of the same size\n"]
            lines += _by_family([r for r in chosen if r.method == RANDOM])
    lines += _refusals(rows)
    lines += _one_scale(kind, rows)
    return lines


def _metrics(kind: str, rows: Sequence[Row]) -> list[str]:
    return [MAIN[kind], *sorted({r.metric for r in rows} - {MAIN[kind]})]


def _families(rows: Sequence[Row]) -> list[str]:
    there = {r.family for r in rows}
    return [name for name in RECIPES if name in there]


def _by_family(rows: Sequence[Row]) -> list[str]:
    columns = upgrades(rows)
    body = []
    for name in _families(rows):
        cells = []
        for upgrade in columns:
            part = [r for r in rows if (r.family, r.upgrade) == (name, upgrade)]
            said = _mean(r.retention for r in part)
            refused = bool(part) and all(r.refused for r in part)
            text = two(said)
            if refused:
                text = "don't" if said is not None else "refused"
            elif part and part[0].method == "auto" and said is not None:
                text += f" {part[0].chosen}"
            cells.append(text)
        body.append([name, *cells])
    return table(["family", *columns], body)


def _mean(values: Any) -> float | None:
    there = [v for v in values if v is not None]
    return fmean(there) if there else None


def _refusals(rows: Sequence[Row]) -> list[str]:
    """Each reason once, with the methods that gave it and where."""
    said: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for method in dict.fromkeys(r.method for r in rows if r.method != "auto"):
        reasons: dict[str, dict[str, list[str]]] = {}
        for row in rows:
            if row.method == method and row.refused:
                names = reasons.setdefault(row.refused, {}).setdefault(row.upgrade, [])
                names += [row.family] if row.family not in names else []
        for reason, found in reasons.items():
            where = tuple(f"{upgrade}: {', '.join(names)}" for upgrade, names in found.items())
            said.setdefault((reason, where), []).append(method)
    lines = [
        f"- {'; '.join(methods)}: “{reason}” ({'; '.join(where)})"
        for (reason, where), methods in said.items()
    ]
    return ["Refused:\n", *lines, ""] if lines else []


def _one_scale(kind: str, rows: Sequence[Row]) -> list[str]:
    """Families side by side: how much of a retrained LoRA's gain each reaches."""
    metric = MAIN[kind]
    chosen = [r for r in rows if r.metric == metric]
    columns = upgrades(chosen)
    body = []
    for name in _families(chosen):
        cells = []
        for upgrade in columns:
            part = [r for r in chosen if r.upgrade == upgrade]
            lora = next((r for r in part if r.family == "lora" and r.retrained is not None), None)
            mine = [r for r in part if r.family == name]
            kept = [r for r in mine if r.method == _carrier(name) and r.transferred is not None]
            if lora is None or not mine or lora.retrained is None:
                cells.append("–")
                continue
            gain = lora.retrained - lora.target
            again = mine[0].retrained
            carried = _mean(r.transferred for r in kept)
            parts = [None if v is None else (v - lora.target) / gain for v in (again, carried)]
            cells.append(" / ".join(two(v) for v in parts))
        body.append([name, *cells])
    text = (
        f"On one scale, {metric}: (value − target base) / (LoRA retrained there − target base), "
        "**retrained / carried** by plain copying (prompts, prefixes and bottlenecks: by "
        "`activation-map`).\n"
    )
    return [text, *table(["family", *columns], body)]


def _carrier(family: str) -> str:
    return "activation-map" if family in INSERTED else "copy"


def _claims(kind: str, rows: Sequence[Row]) -> list[str]:
    """LoRA-X's own comparison on these rows."""
    lines = [
        f"#### LoRA-X's comparison, {NAMES[kind].lower()}\n",
        "A cell: the metric with the transferred adapter, against the same family retrained on the "
        "target, and the difference in percent of the latter; **bold** within 10 %, as the paper "
        "marks it. The first line is the bare target, held against the retrained LoRA.\n",
    ]
    there = [u for u in upgrades(rows) if any(r.upgrade == u and r.method == "copy" for r in rows)]
    for metric in _metrics(kind, rows):
        chosen = [r for r in rows if r.metric == metric]
        body = [["no adapter", "", *(_bare(chosen, u) for u in there)]]
        for name in COMPARED:
            for method in BY:
                part = [r for r in chosen if (r.family, r.method) == (name, method)]
                if part:
                    body.append([name, method, *(_raw(part, u) for u in there)])
        lines += [f"{metric}\n", *table(["adapter", "method", *there], body)]
    return [*lines, *_verdict(kind, rows)]


def _bare(rows: Sequence[Row], upgrade: str) -> str:
    lora = [r for r in rows if r.family == "lora" and r.upgrade == upgrade]
    return _against(lora[0].target, lora[0].retrained) if lora else "–"


def _raw(rows: Sequence[Row], upgrade: str) -> str:
    part = [r for r in rows if r.upgrade == upgrade]
    if not part:
        return "–"
    return _against(_mean(r.transferred for r in part), part[0].retrained)


def _against(value: float | None, trained: float | None) -> str:
    if value is None or trained is None:
        return "refused" if value is None else "–"
    off = _off(value, trained)
    text = f"{value:.3f}, {trained:.3f}"
    if off is None:
        return text
    said = f"{text}: {value / trained:.0f}×" if abs(off) > 9.99 else f"{text}: {off:+.0%}"
    return f"**{said}**" if abs(off) <= CLAIM else said


def _off(value: float, trained: float) -> float | None:
    """How far a value lies from the retrained one, as a share of that."""
    return (value - trained) / abs(trained) if trained else None


def within(rows: Sequence[Row], measure: Callable[[Row], float | None]) -> bool | None:
    """Whether every row's ``measure`` is at most the claim's 10 %; None without any."""
    found = [abs(m) for m in map(measure, rows) if m is not None]
    return max(found) <= CLAIM if found else None


def on_metric(row: Row) -> float | None:
    """(transferred − retrained) / retrained, as the paper has it."""
    if row.transferred is None or row.retrained is None:
        return None
    return _off(row.transferred, row.retrained)


def on_gain(row: Row) -> float | None:
    """The share of the gain that is missing, 1 − R."""
    return None if row.retention is None else 1 - row.retention


def _verdict(kind: str, rows: Sequence[Row]) -> list[str]:
    columns = upgrades(rows)
    pairs = [(name, method) for name in COMPARED for method in BY]
    body = [[*pair, *(_holds(rows, *pair, upgrade) for upgrade in columns)] for pair in pairs]
    text = (
        "The claim “a transferred adapter is within 10 % of a trained one”, over all metrics "
        f"({', '.join(_metrics(kind, rows))}) and seeds: on the **metric** itself, |transferred − "
        "retrained| / |retrained|, as the paper has it; on the **gain**, |1 − R|. A metric that "
        "retraining brings near 0 leaves the first little room.\n"
    )
    return [text, *table(["adapter", "method", *columns], body)]


def _holds(rows: Sequence[Row], family: str, method: str, upgrade: str) -> str:
    """On what the claim holds for one adapter, method and relation."""
    part = [r for r in rows if (r.family, r.method, r.upgrade) == (family, method, upgrade)]
    if not any(r.transferred is not None for r in part):
        return "refused" if part else "–"
    found = [n for n, m in (("metric", on_metric), ("gain", on_gain)) if within(part, m)]
    return {2: "**both**", 1: "".join(found), 0: "no"}[len(found)]


def _sizes(rows: Sequence[Row], manifest: Path) -> list[str]:
    """Numbers trained and bytes, beside LoRA's."""
    if not manifest.exists():
        return []
    steps: Mapping[str, Any] = json.loads(manifest.read_text())["steps"]
    lines = [
        "### Parameters and file sizes\n",
        "Numbers trained, the file as trained, and after copying to `"
        f"{SAME_SHAPES}` (LoRA-X: by `lora-x` in as many directions; inserts: by "
        "`activation-map`), in kB (1,000 bytes) and as a multiple of LoRA's. fp32. LoRA-X is "
        "trained without its singular bases in the file, and written with them when it is "
        "carried.\n",
    ]
    for kind in NAMES:
        found = {}
        for name in RECIPES:
            record = steps.get(kind, {}).get(step_name(kind, "v1", name, 0))
            if record:
                found[name] = (record["parameters"], record["bytes"], _written(rows, kind, name))
        if "lora" not in found:
            continue
        plain = found["lora"]
        body = [
            [
                name,
                f"{count:,}",
                _times(count, plain[0]),
                f"{size / 1000:,.1f}",
                _times(size, plain[1]),
                "–" if after is None else f"{after / 1000:,.1f}",
                "–" if after is None else _times(after, plain[2]),
            ]
            for name, (count, size, after) in found.items()
        ]
        head = [NAMES[kind], "numbers", "× LoRA", "kB", "× LoRA", "kB carried", "× LoRA"]
        lines += table(head, body)
    return lines


def _written(rows: Sequence[Row], kind: str, name: str) -> int | None:
    method = _carrier(name)
    if RECIPES[name].family == "lora-x":
        method = "lora-x" if name == "lora-x" else "lora-x, 32 directions"
    for row in rows:
        same = (row.kind, row.family, row.method) == (kind, name, method)
        if same and row.upgrade == SAME_SHAPES and row.bytes is not None:
            return row.bytes
    return None


def _times(size: int, plain: int | None) -> str:
    return "–" if not plain else f"{size / plain:.2f}"


def _auto(rows: Sequence[Row]) -> list[str]:
    body = []
    for kind in NAMES:
        found = regrets([r for r in rows if r.kind == kind and r.metric == MAIN[kind]])
        if found:
            row, most = found[0]
            worse = sum(1 for _, regret in found if regret > 0.005)
            case = f"{row.upgrade}, {row.family}, seed {row.seed}"
            body.append([NAMES[kind], str(len(found)), str(worse), f"{most:+.3f} ({case})"])
    head = ["", "rows", "auto keeps less than copy", "largest loss against copy"]
    return ["### What `--method auto` chose, over families\n", *table(head, body)]
