"""One family of the battery, from its assets to its rows."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks.retention.battery import Battery
from benchmarks.retention.diffusion import Diffusion
from benchmarks.retention.evidence import Evidence, gather
from benchmarks.retention.family import Family
from benchmarks.retention.language import Language
from benchmarks.retention.references import References
from benchmarks.retention.rows import Row
from regraft.subspaces import Cache, SubspaceLibrary

FAMILIES: dict[str, type[Family]] = {"diffusion": Diffusion, "language": Language}


def measure(
    kind: str, assets: Path, work: Path, kept: Path, quick: bool
) -> tuple[list[Row], list[Evidence], dict[str, dict[str, object]]]:
    """One family, in a process of its own, on one thread."""
    torch.set_num_threads(1)
    family = FAMILIES[kind](assets / kind, quick=quick)
    library = SubspaceLibrary(Cache(work / "cache" / kind))
    references = References(kept)
    battery = Battery(family, work / ("quick" if quick else "full"), library, references)
    rows: list[Row] = []
    todo = list(battery.units())
    began = time.monotonic()
    for done, unit in enumerate(todo, 1):
        rows += battery.run(unit)
        seconds = time.monotonic() - began
        left = seconds / done * (len(todo) - done)
        print(f"[{kind} {done}/{len(todo)}] {unit.name}: {left:.0f} s left", flush=True)
    seen = [gather(family, upgrade, library) for upgrade in family.present()]
    mine = {n: entry for n, entry in references.entries.items() if n.startswith(f"{kind}/")}
    # units that share a reference each bring its rows
    return list(dict.fromkeys(rows)), seen, mine
