"""One row of the battery: one adapter, one upgrade, one method, one metric."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["diffusion", "language"]

#: the recipe of ``lab/families_plan.py``
SHARED = "families"

#: in the order every table and picture shows them
UPGRADES = ("fine-tune", "continued", "pruned", "bigger", "other-seed", "other-tokenizer")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes
    ----------
    kind, upgrade, family, adapter, rank, seed
        What was carried: "diffusion", "continued", "lora", "line", 8, 0. A family without a rank
        has 0.
    method : str
        A method with its options, "retrained", or "random" (ΔW of the same norm per site).
    metric : str
    strength : float
        What ΔW was multiplied by; 1 except for strength curves.
    base, target, transferred, retrained : float or None
        The metric on the bare source base, on the bare target, on the target with the carried
        adapter, and with the adapter retrained there (mean over its seeds).
    retention : float or None
        None when the method refused, or the metric has no reference.
    seconds : float
        What the transfer took.
    refused : str
        Why nothing was carried; empty when something was.
    energy_kept, intruders : float or None
        Share of ‖ΔW‖² that arrived; mean number of intruder dimensions per site.
    sites_refused : int
    recipe : str
        Which recipe of the lab trained it: "" the battery's own for LoRA, :data:`SHARED` the one
        that all families share.
    bytes : int or None
        Size of the carried adapter's weights file.
    chosen : str
        What "auto" chose.
    """

    kind: str
    upgrade: str
    family: str
    adapter: str
    rank: int
    seed: int
    method: str
    metric: str
    strength: float
    base: float | None
    target: float
    transferred: float | None
    retrained: float | None
    retention: float | None
    seconds: float
    refused: str = ""
    energy_kept: float | None = None
    intruders: float | None = None
    sites_refused: int = 0
    recipe: str = ""
    bytes: int | None = None
    chosen: str = ""


#: left out of the file where they say nothing
_LATER = ("recipe", "bytes", "chosen")


def write_rows(path: Path, rows: list[Row]) -> None:
    """One row per line, sorted, numbers to six digits: a rebuild shows up as a small diff."""
    place = {name: i for i, name in enumerate(UPGRADES)}
    ordered = sorted(
        rows,
        key=lambda r: (
            *(r.recipe, r.kind, place.get(r.upgrade, 99), r.adapter, r.family, r.rank, r.seed),
            *(r.metric, r.method, r.strength),
        ),
    )
    lines = [json.dumps({k: _short(v) for k, v in _said(row).items()}) for row in ordered]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def read_rows(path: Path) -> list[Row]:
    """What :func:`write_rows` wrote."""
    return [Row(**entry) for entry in json.loads(path.read_text())]


def _said(row: Row) -> dict[str, object]:
    return {k: v for k, v in asdict(row).items() if v not in ("", None) or k not in _LATER}


def _short(value: object) -> object:
    return round(value, 6) if isinstance(value, float) else value
