"""``python -m benchmarks.retention``: the whole battery, from the lab's finished assets."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import torch

from benchmarks.retention.battery import Battery, units
from benchmarks.retention.diffusion import Diffusion
from benchmarks.retention.evidence import Evidence, gather, write_evidence
from benchmarks.retention.family import Family
from benchmarks.retention.language import Language
from benchmarks.retention.pages import write_pages
from benchmarks.retention.rows import Row, write_rows
from regraft.subspaces import Cache, SubspaceLibrary

HERE = Path(__file__).parent.parent
FAMILIES: dict[str, type[Family]] = {"diffusion": Diffusion, "language": Language}


def measure(kind: str, assets: Path, work: Path, quick: bool) -> tuple[list[Row], list[Evidence]]:
    """One family, in a process of its own, on one thread."""
    torch.set_num_threads(1)
    family = FAMILIES[kind](assets / kind, quick=quick)
    library = SubspaceLibrary(Cache(work / "cache" / kind))
    battery = Battery(family, work / ("quick" if quick else "full"), library)
    rows: list[Row] = []
    todo = list(units(family, quick=quick))
    began = time.monotonic()
    for done, unit in enumerate(todo, 1):
        rows += battery.run(unit)
        seconds = time.monotonic() - began
        left = seconds / done * (len(todo) - done)
        print(f"[{kind} {done}/{len(todo)}] {unit.name}: {left:.0f} s left", flush=True)
    seen = [gather(family, upgrade, library) for upgrade in family.present()]
    return rows, seen


def main() -> None:
    """Run it, write the rows, the evidence, the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=HERE.parent / "lab" / "assets")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "retention")
    parser.add_argument("--out", type=Path, default=HERE, help="where retention.json goes")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    parser.add_argument("--kind", choices=sorted(FAMILIES), help="one family only")
    parser.add_argument("--quick", action="store_true", help="few texts and pictures, one task")
    arguments = parser.parse_args()
    began = time.monotonic()
    kinds = [arguments.kind] if arguments.kind else sorted(FAMILIES)
    jobs = [(kind, arguments.assets, arguments.work, arguments.quick) for kind in kinds]
    # a fresh process each: threads of one family's libraries do not get in the other's way
    with multiprocessing.get_context("spawn").Pool(len(jobs)) as pool:
        found = pool.starmap(measure, jobs)
    rows = [row for family_rows, _ in found for row in family_rows]
    seen = [evidence for _, family_seen in found for evidence in family_seen]
    write_rows(arguments.out / "retention.json", rows)
    write_evidence(arguments.out / "retention_evidence.json", seen)
    write_pages(arguments.docs, rows, seen, quick=arguments.quick)
    print(f"{len(rows)} rows in {time.monotonic() - began:.0f} s: {arguments.out}/retention.json")


if __name__ == "__main__":
    main()
