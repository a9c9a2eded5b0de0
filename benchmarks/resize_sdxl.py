"""Resizing a LoRA, and baking other families into one, at Stable Diffusion XL's size.

    python -m benchmarks.resize_sdxl [--quick] [--work DIR] [--json FILE] [--keep]

Regraft beside the ways that others take: seconds, memory, and the error against the exact ΔW.
Prints tables, writes JSON. ``benchmarks/README.md`` says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.processes import ROOT, run_task

Answer = dict[str, Any]
#: kohya name → (module, shape)
Modules = dict[str, tuple[str, tuple[int, int]]]

OURS = "Regraft"
WAYS = {
    OURS: "regraft",
    "sd-scripts resize": "sd-resize",
    "its svd_lowrank": "sd-lowrank",
    "sd-scripts extract": "sd-extract",
    "PEFT convert": "peft",
}
SEED = 0
#: Raise it when the same scale gives other adapters: kept work folders are then made again.
VERSION = 1


@dataclass(frozen=True)
class Job:
    """One adapter, the rank it is brought to, and the ways that can do it."""

    family: str
    what: str
    rank: int
    ways: tuple[str, ...]
    #: Of Regraft; the others run once.
    rounds: int = 3


def jobs(rank: int) -> list[Job]:
    """What is measured, for a LoRA of ``rank``."""
    every = tuple(WAYS)
    extract, peft = every[-2:]
    return [
        Job("lora", f"resize LoRA {rank} → {rank // 4}", rank // 4, every),
        Job("loha", "bake LoHa 8 → LoRA 64", 64, (OURS, peft)),
        Job("lokr", "bake LoKr 8 → LoRA 64", 64, (OURS, peft)),
        Job("dora", f"bake DoRA {rank // 4} → LoRA {rank}", rank, (OURS, extract, peft), rounds=1),
    ]


def sample(modules: Modules, per_shape: int) -> dict[str, str]:
    """kohya name → module of a declared random choice of each shape (seed 0)."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, (_, shape) in sorted(modules.items()):
        by_shape.setdefault(tuple(shape), []).append(name)
    pick = random.Random(SEED)
    chosen = [pick.sample(names, min(per_shape, len(names))) for names in by_shape.values()]
    return {name: modules[name][0] for names in chosen for name in names}


def scaled(seconds: dict[str, float], modules: Modules) -> float:
    """Seconds of all modules from those of a sample: mean per shape × number of that shape."""
    counts = Counter(tuple(shape) for _, shape in modules.values())
    taken: dict[tuple[int, ...], list[float]] = {}
    for name, value in seconds.items():
        taken.setdefault(tuple(modules[name][1]), []).append(value)
    return sum(count * fmean(taken[shape]) for shape, count in counts.items())


class Bench:
    """One run in one work folder."""

    def __init__(
        self, scale: str, rank: int, folder: Path, threads: Iterable[int], console: Console
    ) -> None:
        self.scale, self.rank, self.folder = scale, rank, folder
        self.threads, self.console = tuple(threads), console

    def make(self) -> None:
        done = self.folder / "done.json"
        asked = json.dumps([VERSION, self.scale, self.rank])
        if not done.is_file() or done.read_text(encoding="utf-8") != asked:
            self._task("make", None, scale=self.scale, folder=str(self.folder), rank=self.rank)
            done.write_text(asked, encoding="utf-8")
        self.plan: dict[str, Modules] = json.loads((self.folder / "plan.json").read_bytes())

    def _task(self, name: str, threads: int | None, **arguments: Any) -> Answer:
        return run_task(name, module="benchmarks.resizing", threads=threads, **arguments)

    def _median(self, rounds: int, name: str, threads: int, arguments: Answer) -> Answer:
        """The median run by seconds, with every run's seconds and the largest peak."""
        runs = [self._task(name, threads, **arguments) for _ in range(rounds)]
        runs.sort(key=lambda run: run["seconds"])
        return {
            **runs[rounds // 2],
            "all_seconds": [run["seconds"] for run in runs],
            "peak_mb": max(run["peak_mb"] for run in runs),
        }

    def measure(self, job: Job, per_shape: int) -> Answer:
        """One job by all its ways, with each number of threads."""
        modules = self.plan[job.family]
        names = sample(modules, per_shape)
        adapter = str(self.folder / f"{job.family}.safetensors")
        base = str(self.folder / "base") if job.family == "dora" else None
        outputs, ways = {}, {}
        for way in job.ways:
            outputs[way] = str(self.folder / f"{job.family}-{WAYS[way]}.safetensors")
            common = {"adapter": adapter, "output": outputs[way], "rank": job.rank, "base": base}
            if way != OURS:
                common["names"] = names
            runs: dict[str, Answer] = {}
            for count in self.threads:
                self.console.print(f"  {job.what}: {way}, threads: {count}", style="dim")
                if way == OURS:
                    run = self._median(job.rounds, WAYS[way], count, common)
                else:
                    run = self._task(WAYS[way], count, **common)
                    run["seconds_sampled"] = run["seconds"]
                    run["seconds"] = scaled(run["seconds"], modules)
                runs[str(count)] = run
            ways[way] = {
                "threads": runs,
                "scaled": way != OURS,
                "modules": len(modules if way == OURS else names),
            }
        found = self._task(
            "errors", None, adapter=adapter, outputs=outputs, names=names, rank=job.rank, base=base
        )
        for way, answer in ways.items():
            answer |= found[way]
            for count, run in answer["threads"].items():
                run["ratio"] = run["seconds"] / ways[OURS]["threads"][count]["seconds"]
        for path in outputs.values():
            Path(path).unlink(missing_ok=True)
        return {
            "job": job.what,
            "family": job.family,
            "rank": job.rank,
            "modules": len(modules),
            "sampled": len(names),
            "lost_by_the_exact_cut": found["the exact cut"]["lost"],
            "ways": ways,
        }


def measure(
    scale: str,
    folder: Path,
    console: Console,
    *,
    rank: int = 64,
    per_shape: int = 1,
    threads: Iterable[int] = (1, 2),
) -> Answer:
    """Run everything; returns what the JSON file holds."""
    bench = Bench(scale, rank, folder, threads, console)
    console.print("Writing the synthetic adapters and the DoRA's base", style="dim")
    bench.make()
    console.print("Measuring", style="dim")
    rows = [bench.measure(job, per_shape) for job in jobs(rank)]
    return {
        "benchmark": "resize_sdxl",
        "scale": scale,
        "threads": list(bench.threads),
        "cores": os.cpu_count(),
        "sample": {"per_shape": per_shape, "seed": SEED},
        "versions": run_task("about")["versions"],
        "jobs": rows,
    }


def tables(found: Answer) -> list[Table]:
    """One table per job: what is a ratio stands first."""
    return [_table(row, [str(count) for count in found["threads"]]) for row in found["jobs"]]


def _table(row: Answer, threads: list[str]) -> Table:
    title = f"{row['job']}, {row['modules']} modules"
    table = Table(
        title=title, title_justify="left", caption_justify="left", box=box.SIMPLE, pad_edge=False
    )
    table.caption = (
        f"~ scaled from {row['sampled']} modules, without reading and writing. Any LoRA of rank "
        f"{row['rank']} loses at least {row['lost_by_the_exact_cut']:.1%} of ΔW's norm."
    )
    table.add_column("way", no_wrap=True)
    for label in ("× ours", "seconds"):
        for count in threads:
            table.add_column(f"{label}\n{count} thr.", justify="right", no_wrap=True)
    for name in ("peak\nMB", "error", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, way in row["ways"].items():
        runs, mark = [way["threads"][count] for count in threads], "~" if way["scaled"] else ""
        table.add_row(
            name,
            *[mark + _short(run["ratio"]) for run in runs],
            *[mark + _short(run["seconds"]) for run in runs],
            f"{max(run['peak_mb'] for run in runs):.0f}",
            f"{way['error']:.0e}",
            f"{way['lost']:.1%}",
        )
    return table


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Resizing and baking at SDXL's size.")
    parser.add_argument("--quick", action="store_true", help="a toy: does everything work?")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / ".work")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sample", type=int, default=1, help="modules per shape for slow ways")
    parser.add_argument("--keep", action="store_true", help="keep the adapters")
    options = parser.parse_args()
    scale = "small" if options.quick else "full"
    folder = (options.work / f"resize-{scale}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    try:
        found = measure(scale, folder, console, per_shape=options.sample)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    # a toy's numbers do not replace the real ones
    kept = ROOT / "benchmarks" / ("resize_sdxl.json" if scale == "full" else ".work/quick.json")
    path: Path = options.json or kept
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
    for table in tables(found):
        console.print(table)
    if scale != "full":
        console.print("Ratios are meant for the full size; this run only shows that all works.")


if __name__ == "__main__":
    main()
