"""Time and memory of carrying a LoRA between two bases of Stable Diffusion XL's shape.

    python -m benchmarks.transfer_sdxl [--scale full|small] [--work DIR] [--json FILE] [--keep]

Prints tables, writes JSON. ``benchmarks/README.md`` says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.processes import ROOT, drop_from_memory, run_task
from benchmarks.scales import SCALES, Scale
from benchmarks.tables import show
from benchmarks.targets import judge, shape_class

Answer = dict[str, Any]


class Bench:
    """One benchmark run in one work folder."""

    def __init__(self, scale: Scale, folder: Path, console: Console) -> None:
        self.scale, self.folder, self.console = scale, folder, console
        self.cache = folder / "cache"
        self.output = folder / "out" / "carried.safetensors"

    def adapter(self, number: int) -> str:
        return str(self.folder / f"adapter-{number}.safetensors")

    def carry(self, label: str, method: str, cache: str, number: int = 1) -> Answer:
        """One transfer in a fresh process, with the cache folder called ``cache``."""
        self.console.print(f"  {label}", style="dim")
        return run_task(
            "carry",
            cache=self.cache / cache,
            adapter=self.adapter(number),
            source=str(self.folder / "base-a"),
            target=str(self.folder / "base-b"),
            output=str(self.output),
            method=method,
            dimension=self.scale.dimension,
        )

    def floor(self) -> Answer:
        return run_task("floor", adapter=self.adapter(1), output=str(self.output))

    def first_runs(self) -> dict[str, Answer]:
        """With nothing remembered. ProLoRA follows LoRA-X: the target's bases are there by then."""
        shutil.rmtree(self.cache, ignore_errors=True)
        return {
            "copy, first": self.carry("copy, first", "copy", "copy"),
            "lora-x, first": self.carry("lora-x, first", "lora-x", "projections"),
            "prolora, first after lora-x": self.carry(
                "prolora, first after lora-x", "prolora", "projections"
            ),
        }

    def warm_runs(self) -> dict[str, list[Answer]]:
        """Everything remembered; the floor and the transfers take turns."""
        runs: dict[str, list[Answer]] = {}
        for turn in range(self.scale.rounds):
            label = f"warm round {turn + 1} of {self.scale.rounds}: "
            runs.setdefault("floor", []).append(self.floor())
            for name, method, cache, number in (
                ("copy, warm", "copy", "copy", 1),
                ("lora-x, warm", "lora-x", "projections", 1),
                ("lora-x, warm, other adapter", "lora-x", "projections", 2),
                ("prolora, warm", "prolora", "projections", 1),
            ):
                made = self.carry(label + name, method, cache, number)
                runs.setdefault(name, []).append(made)
        return runs

    def from_disk(self) -> dict[str, Answer]:
        """Warm, but with every file dropped from the system's memory first."""
        if not drop_from_memory(self.folder):
            return {}
        return {"lora-x, warm, files on disk": self.carry("from disk", "lora-x", "projections")}

    def svd(self) -> Answer:
        """The way with full SVDs, on a sample of each shape."""
        self.console.print("  full SVD on a sample", style="dim")
        found = run_task(
            "svd",
            adapter=self.adapter(1),
            source=str(self.folder / "base-a"),
            target=str(self.folder / "base-b"),
            dimension=self.scale.dimension,
            sample=self.scale.sample,
        )
        for row in found["shapes"]:
            row["class"] = shape_class(row["shape"])
        for way in ("svd", "decompose"):
            total = sum(row["sites"] * row[f"seconds_{way}"] for row in found["shapes"])
            found[f"extrapolated_seconds_{way}"] = total
        found["extrapolated"] = "mean of the sampled weights × number of weights, per shape"
        return found


def _middle(answers: list[Answer]) -> Answer:
    """The median run by seconds, with every run's seconds and the largest peak."""
    ordered = sorted(answers, key=lambda a: a["seconds"])
    return {
        **ordered[len(ordered) // 2],
        "all_seconds": [a["seconds"] for a in answers],
        "peak_mb": max(a["peak_mb"] for a in answers),
    }


def _ratio(runs: list[Answer], floors: list[Answer], key: str) -> float:
    """Median over the rounds of this round's transfer against this round's floor."""
    ratios = [float(run["seconds"] / low[key]) for run, low in zip(runs, floors, strict=True)]
    return median(ratios)


def measure(scale: Scale, folder: Path, console: Console) -> Answer:
    """Run everything; returns what the JSON file holds."""
    bench = Bench(scale, folder, console)
    console.print("Writing the synthetic bases and adapters", style="dim")
    made = run_task("make", scale=scale.name, folder=str(folder))
    about = run_task("about")
    console.print("Measuring", style="dim")
    first = bench.first_runs()
    warm = bench.warm_runs()
    found: Answer = {
        "benchmark": "transfer_sdxl",
        "scale": {k: v for k, v in asdict(scale).items() if k != "unet"},
        "versions": about["versions"],
        "threads": about["threads"],
        "inputs": {k: made[k] for k in sorted(made) if "peak" not in k and "process" not in k},
        "runs": {**first, **{name: _middle(runs) for name, runs in warm.items()}},
    }
    found["runs"] |= bench.from_disk()
    others = {name: runs for name, runs in warm.items() if name != "floor"}
    for key, into in (
        ("seconds", "warm_to_floor"),
        ("seconds_three_hashes", "warm_to_floor_with_three_hashes"),
    ):
        found[into] = {n: _ratio(runs, warm["floor"], key) for n, runs in others.items()}
    found["same_bytes_every_time"] = {
        "lora-x": _one([first["lora-x, first"], *warm["lora-x, warm"]]),
        "prolora": _one([first["prolora, first after lora-x"], *warm["prolora, warm"]]),
    }
    found["warm_decompositions"] = sum(r["decompositions"] for n in others for r in others[n])
    found["svd"] = bench.svd()
    found["targets"] = [asdict(t) for t in judge(found)]
    return found


def _one(runs: list[Answer]) -> bool:
    return len({run["output_sha256"] for run in runs}) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a transfer at SDXL's size.")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / ".work")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "transfer_sdxl.json")
    parser.add_argument("--keep", action="store_true", help="keep the bases and the cache")
    options = parser.parse_args()
    console = Console()
    folder = (options.work / options.scale).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(SCALES[options.scale], folder, console)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(text, encoding="utf-8")
    show(found, console)


if __name__ == "__main__":
    main()
