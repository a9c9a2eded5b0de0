"""Steps of the lab: named, in order, each skipped when done and resumed when interrupted."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent
ASSETS = ROOT / "assets"
RUNS = ROOT / ".cache" / "runs"


@dataclass(frozen=True)
class Step:
    """One thing the lab makes.

    Attributes
    ----------
    name : str
        "v1", "continued", "v1/line-r8-s0", …
    output : Path
        Relative to the shop's assets.
    recipe : dict
        Everything the result depends on besides the code and the data.
    run : callable
        Makes the output; returns the facts for the record.
    needs : tuple of str
        Steps whose outputs it reads.
    shipped : bool
        Whether the output is part of the repository; of the others only the record is.
    """

    name: str
    output: Path
    recipe: dict[str, Any]
    run: Callable[[Shop, Step], dict[str, Any]]
    needs: tuple[str, ...] = ()
    shipped: bool = True


@dataclass
class Shop:
    """Where one family's outputs, checkpoints and records lie."""

    kind: str
    assets: Path = field(default=ASSETS)
    runs: Path = field(default=RUNS)

    def __post_init__(self) -> None:
        manifest = self.assets / "manifest.json"
        # a fresh checkout has the assets and their manifest, but no records of its own
        known = json.loads(manifest.read_text())["steps"] if manifest.exists() else {}
        self.shipped: dict[str, Any] = known.get(self.kind, {})
        self.assets, self.runs = self.assets / self.kind, self.runs / self.kind
        self.assets.mkdir(parents=True, exist_ok=True)
        self.runs.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, step: Step) -> Path:
        """Where an interrupted training goes on from."""
        return self.runs / f"{_flat(step.name)}.pt"

    def record(self, step: Step) -> Path:
        """What a finished step measured; the manifest is made of these."""
        return self.runs / f"{_flat(step.name)}.json"

    def done(self, step: Step) -> bool:
        """Whether the step's output is there, and known to have been made by this recipe."""
        record = self.facts(step)
        same = record is not None and record["recipe"] == json.loads(json.dumps(step.recipe))
        return same and (not step.shipped or (self.assets / step.output).exists())

    def facts(self, step: Step) -> dict[str, Any] | None:
        """What a finished step measured: its own record, else the manifest's."""
        if self.record(step).exists():
            found: dict[str, Any] = json.loads(self.record(step).read_text())
            return found
        return self.shipped.get(step.name)


def _flat(name: str) -> str:
    return name.replace("/", "__")


def run_steps(
    shop: Shop,
    steps: Sequence[Step],
    *,
    only: Sequence[str] | None = None,
    redo: Sequence[str] = (),
    minutes: float | None = None,
) -> list[str]:
    """Run what is not done yet, in order; returns the names of steps that were run.

    ``minutes``: start no new step after that long, so that the work can be split over many runs.
    """
    known = {step.name: step for step in steps}
    for name in (*(only or ()), *redo):
        if name not in known:
            raise SystemExit(f"no step {name!r}; there are: {', '.join(known)}")
    began = time.monotonic()
    ran = []
    for place, step in enumerate(steps, 1):
        if only is not None and step.name not in only:
            continue
        if step.name in redo:
            shop.checkpoint(step).unlink(missing_ok=True)
            shop.record(step).unlink(missing_ok=True)
            shop.shipped.pop(step.name, None)
        if shop.done(step):
            continue
        if minutes is not None and time.monotonic() - began > 60 * minutes:
            print(f"[{step.name}] left for another run", flush=True)
            break
        missing = [n for n in step.needs if not shop.done(known[n])]
        if missing:
            raise SystemExit(f"{step.name} needs {', '.join(missing)} first")
        print(f"[{place}/{len(steps)} {step.name}] starts", flush=True)
        facts = step.run(shop, step)
        record = {"step": step.name, "recipe": step.recipe, **facts}
        draft = shop.record(step).with_suffix(".tmp")
        draft.write_text(json.dumps(record, indent=1) + "\n")
        draft.replace(shop.record(step))
        shop.checkpoint(step).unlink(missing_ok=True)
        ran.append(step.name)
        print(f"[{place}/{len(steps)} {step.name}] {json.dumps(facts)[-300:]}", flush=True)
    return ran


def printer(step: Step) -> Callable[[str], None]:
    """A log that names the step."""
    return lambda line: print(f"[{step.name}] {line}", flush=True)


def main(kind: str, steps: Sequence[Step], argv: Sequence[str] | None = None) -> None:
    """The command line every plan shares."""
    parser = argparse.ArgumentParser(description=f"Train the lab's {kind} bases and adapters.")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where outputs go")
    parser.add_argument("--runs", type=Path, default=RUNS, help="checkpoints and records")
    parser.add_argument("--threads", type=int, default=1, help="2 on idle cores")
    parser.add_argument("--only", nargs="*", help="run these steps alone")
    parser.add_argument("--redo", nargs="*", default=[], help="steps to run again")
    parser.add_argument("--until", type=float, metavar="MINUTES", help="start nothing after")
    parser.add_argument("--list", action="store_true", help="name the steps and stop")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    shop = Shop(kind, arguments.assets, arguments.runs)
    if arguments.list:
        for step in steps:
            print("done" if shop.done(step) else "todo", step.name)
        return
    run_steps(
        shop,
        steps,
        only=arguments.only,
        redo=arguments.redo,
        minutes=arguments.until,
    )
