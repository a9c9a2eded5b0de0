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
from benchmarks.retention.rows import read_rows, write_rows
from benchmarks.retention.run import FAMILIES, measure

HERE = Path(__file__).parent.parent


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
    kept = HERE / "retention_references.json"
    jobs = [(k, arguments.assets, arguments.work, kept, arguments.quick) for k in kinds]
    # a fresh process each: threads of one family's libraries do not get in the other's way
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(jobs), mp_context=fresh) as pool:
        found = list(pool.map(measure, *zip(*jobs, strict=True)))
    rows = [row for family_rows, _, _ in found for row in family_rows]
    seen = [evidence for _, family_seen, _ in found for evidence in family_seen]
    references = References(kept)
    for _, _, mine in found:
        references.entries |= mine
    references.write()
    if arguments.kind and (arguments.out / "retention.json").exists():
        # one family's run leaves the other's results as they are
        others = read_rows(arguments.out / "retention.json")
        rows += [row for row in others if row.kind != arguments.kind]
        kept_seen = read_evidence(arguments.out / "retention_evidence.json")
        seen = [*(e for e in kept_seen if e.kind != arguments.kind), *seen]
        seen.sort(key=lambda evidence: evidence.kind)
    write_rows(arguments.out / "retention.json", rows)
    write_evidence(arguments.out / "retention_evidence.json", seen)
    # from the files, so that the page and they agree to the last digit
    rows = read_rows(arguments.out / "retention.json")
    seen = read_evidence(arguments.out / "retention_evidence.json")
    drift = HERE / "retention_drift.json"
    write_pages(arguments.docs, rows, seen, drift, quick=arguments.quick)
    print(f"{len(rows)} rows in {time.monotonic() - began:.0f} s: {arguments.out}/retention.json")


if __name__ == "__main__":
    main()
