"""``python -m benchmarks.retention``: the whole battery, from the lab's finished assets."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.retention.evidence import read_evidence, write_evidence
from benchmarks.retention.pages import write_pages
from benchmarks.retention.references import References
from benchmarks.retention.rows import Row, read_rows, write_rows
from benchmarks.retention.run import FAMILIES, Job, measure
from lab.families_plan import RECIPES

HERE = Path(__file__).parent.parent


def _part(row: Row) -> tuple[str, str, str]:
    """What of the battery a row belongs to."""
    return row.kind, row.recipe, row.family


def main() -> None:
    """Run it, write the rows, the evidence, the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=HERE.parent / "lab" / "assets")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "retention")
    parser.add_argument("--out", type=Path, default=HERE, help="where retention.json goes")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    parser.add_argument("--kind", choices=sorted(FAMILIES), help="one kind of base only")
    parser.add_argument(
        "--family",
        nargs="*",
        metavar="NAME",
        help="only the adapters that all families share a recipe of; of these families, or all",
    )
    parser.add_argument("--quick", action="store_true", help="few texts and pictures, one task")
    arguments = parser.parse_args()
    for name in arguments.family or ():
        if name not in RECIPES:
            parser.error(f"no family {name!r}; there are: {', '.join(RECIPES)}")
    began = time.monotonic()
    kinds = [arguments.kind] if arguments.kind else sorted(FAMILIES)
    kept = HERE / "retention_references.json"
    shared = tuple(arguments.family or ())
    parts: list[tuple[str, ...] | None] = [shared]
    if arguments.family is None:
        parts.insert(0, None)
    jobs = [
        Job(kind, part, arguments.assets, arguments.work, kept, arguments.quick)
        for part in parts
        for kind in kinds
    ]
    # a fresh process each: threads of one family's libraries do not get in the other's way
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=fresh, max_tasks_per_child=1) as pool:
        found = list(pool.map(measure, jobs))
    rows = [row for part in found for row in part.rows]
    seen = [evidence for part in found for evidence in part.seen]
    references = References(kept)
    for part in found:
        references.entries |= part.references
    references.write()
    out = arguments.out
    in_part = arguments.kind is not None or arguments.family is not None
    if in_part and (out / "retention.json").exists():
        # what was not run stays as it is
        ran = {_part(row) for row in rows}
        rows += [row for row in read_rows(out / "retention.json") if _part(row) not in ran]
        kinds_seen = {evidence.kind for evidence in seen}
        kept_seen = read_evidence(out / "retention_evidence.json")
        seen = [*(e for e in kept_seen if e.kind not in kinds_seen), *seen]
        seen.sort(key=lambda evidence: evidence.kind)
    write_rows(out / "retention.json", rows)
    write_evidence(out / "retention_evidence.json", seen)
    # from the files, so that the page and they agree to the last digit
    rows = read_rows(out / "retention.json")
    seen = read_evidence(out / "retention_evidence.json")
    drift = HERE / "retention_drift.json"
    manifest = arguments.assets / "manifest.json"
    write_pages(arguments.docs, rows, seen, drift, manifest, quick=arguments.quick)
    print(f"{len(rows)} rows in {time.monotonic() - began:.0f} s: {arguments.out}/retention.json")


if __name__ == "__main__":
    main()
