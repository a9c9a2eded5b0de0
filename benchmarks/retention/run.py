"""One kind of base, from its assets to its rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.retention.battery import Battery
from benchmarks.retention.diffusion import Diffusion
from benchmarks.retention.evidence import Evidence, gather
from benchmarks.retention.families import Families
from benchmarks.retention.family import Family
from benchmarks.retention.language import Language
from benchmarks.retention.references import References
from benchmarks.retention.rows import Row
from lab.families_plan import Workshop
from lab.steps import RUNS
from regraft.subspaces import Cache, SubspaceLibrary

FAMILIES: dict[str, type[Family]] = {"diffusion": Diffusion, "language": Language}


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes
    ----------
    kind : str
    families : sequence of str or None
        The shared recipe of these families (all if empty); None for the battery of LoRAs.
    """

    kind: str
    families: tuple[str, ...] | None
    assets: Path
    work: Path
    kept: Path
    quick: bool = False
    runs: Path = RUNS


@dataclass
class Found:
    """What it found."""

    rows: list[Row] = field(default_factory=list)
    seen: list[Evidence] = field(default_factory=list)
    references: dict[str, dict[str, object]] = field(default_factory=dict)


def measure(job: Job) -> Found:
    """Run one job, in a process of its own, on one thread."""
    torch.set_num_threads(1)
    family = FAMILIES[job.kind](job.assets / job.kind, quick=job.quick)
    library = SubspaceLibrary(Cache(job.work / "cache" / job.kind))
    references = References(job.kept)
    before = dict(references.entries)
    place = job.work / ("quick" if job.quick else "full")
    what = job.kind
    if job.families is None:
        battery = Battery(family, place, library, references)
    else:
        what += ", families"
        shop = Workshop(job.kind, job.assets, job.runs)
        battery = Families(
            family, place / "families", library, references, shop, job.families or None
        )
    rows: list[Row] = []
    todo = list(battery.units())
    began = time.monotonic()
    for done, unit in enumerate(todo, 1):
        rows += battery.run(unit)
        seconds = time.monotonic() - began
        left = seconds / done * (len(todo) - done)
        print(f"[{what} {done}/{len(todo)}] {unit.name}: {left:.0f} s left", flush=True)
    seen = []
    if job.families is None:
        seen = [gather(family, upgrade, library) for upgrade in family.present()]
    mine = {n: e for n, e in references.entries.items() if before.get(n) != e}
    # units that share a reference each bring its rows
    return Found(list(dict.fromkeys(rows)), seen, mine)
