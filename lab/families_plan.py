"""Every family, trained alike: ``python -m lab.families_plan KIND``.

One task on each kind of base (language: ``spell``, diffusion: ``line``), by ``regraft train``'s own
trainer, on v1 and again on every target. Nothing of it is shipped: the records are in the manifest,
the scores in ``benchmarks/retention_references.json``, and the battery trains what it needs of v1
anew, which takes minutes and, on the same kind of CPU, gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lab import diffusion_plan, emoji, language_plan, text
from lab.steps import ASSETS, RUNS, Shop, Step, main
from regraft.demo.captions import STYLE_SUBJECTS
from regraft.training import Settings, train

TASKS = {"language": "spell", "diffusion": "line"}
TARGETS = {"language": language_plan.TARGETS, "diffusion": diffusion_plan.TARGETS}
#: What all families share: the same budget, whatever the family.
SHARED: dict[str, dict[str, Any]] = {
    "language": {"steps": 150, "batch": 16},
    "diffusion": {"steps": 100, "batch": 8},
}
COMMON = {"schedule": "cosine", "warmup": 10, "weight_decay": 0.0, "device": "cpu"}
#: Where the battery's LoRA sits: attention, and the second convolution of every block.
ATTENTION_AND_CONV2 = r".*\.(conv2|to_q|to_k|to_v|to_out\.0)"
#: The training pictures of ``line``, so that no package need be fetched to train on them.
PICTURES = Path(__file__).parent / "data" / "line.safetensors.xz"


@dataclass(frozen=True)
class Recipe:
    """How one family is trained.

    Attributes
    ----------
    family : str
        As :mod:`regraft.training` calls it.
    rank : int or None
        Rank, directions, width or virtual tokens; None where it has none.
    language, diffusion : float or None
        Learning rate, the better of those tried on v1; None where the family does not exist.
    convolutions : bool
        In U-Nets: changes the same modules as the battery's LoRA, else the family's own choice.
    options : dict
        Of its PEFT config.
    quantise : str or None
        What the base is quantised to before it is trained on.
    group : dict of kind to int
        How many inputs share a scale: a number that divides every width of that kind's bases.
    """

    family: str
    rank: int | None
    language: float | None
    diffusion: float | None
    convolutions: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    quantise: str | None = None
    group: dict[str, int] = field(default_factory=dict)

    def rate(self, kind: str) -> float | None:
        """The learning rate on one kind of base."""
        return self.language if kind == "language" else self.diffusion


#: Singular bases are the base's own and can be computed again; with them a file is of full size.
NO_BASES = {"store_bases": False}

#: name → recipe; a family joins the lab and the battery by standing here
RECIPES: dict[str, Recipe] = {
    "lora": Recipe("lora", 8, 6e-3, 6e-3, convolutions=True),
    # the paper's 320 is every direction of weights as narrow as these; 32 is a real cut
    "lora-x": Recipe("lora-x", 320, 0.2, 0.1, convolutions=True, options=NO_BASES),
    "lora-x-32": Recipe("lora-x", 32, 0.2, 0.1, convolutions=True, options=NO_BASES),
    "lora-x-32-full": Recipe(
        "lora-x", 32, 2e-2, 1e-2, convolutions=True, options={"core": "full", **NO_BASES}
    ),
    "dora": Recipe("dora", 8, 6e-3, 6e-3, convolutions=True),
    "pissa": Recipe("pissa", 8, 3e-3, 3e-3),
    "svdiff": Recipe("svdiff", None, 0.1, 5e-2),
    "foura": Recipe("foura", 8, 1e-2, 6e-3, convolutions=True),
    "loha": Recipe("loha", 8, 1e-2, 1e-2, convolutions=True),
    "lokr": Recipe("lokr", 8, 4e-2, 2e-2, convolutions=True),
    "qlora": Recipe("lora", 8, 6e-3, 6e-3, quantise="nf4"),
    "qa-lora": Recipe(
        "qa-lora", 8, 2e-2, 1e-2, quantise="int4", group={"language": 16, "diffusion": 8}
    ),
    "bottleneck": Recipe("bottleneck", 16, 1.2e-2, 1.5e-2),
    "prompt": Recipe("prompt", 16, 1.0, None),
    "prefix": Recipe("prefix", 16, 0.1, None),
}
#: Families without a ΔW: what they add is carried as inserts.
INSERTS = ("prompt", "prefix", "bottleneck")


def names(kind: str) -> list[str]:
    """The families of one kind of base."""
    return [name for name, recipe in RECIPES.items() if recipe.rate(kind) is not None]


def settings(kind: str, name: str, base: Path, data: Path, seed: int) -> dict[str, Any]:
    """What the trainer is told."""
    recipe = RECIPES[name]
    told = {"family": recipe.family, "rank": recipe.rank, "lr": recipe.rate(kind), "seed": seed}
    told |= {"options": recipe.options, **SHARED[kind], **COMMON}
    if recipe.quantise:
        told |= {"quantise": recipe.quantise, "group": recipe.group.get(kind)}
    if recipe.convolutions and kind == "diffusion":
        told["targets"] = ATTENTION_AND_CONV2
    return {**told, "base": str(base), "data": str(data)}


def training_data(kind: str, runs: Path) -> Path:
    """The task's training items, written on first use.

    ``runs`` is the kind's own folder of runs.
    """
    task = TASKS[kind]
    if kind == "language":
        path, body = runs / f"{task}.jsonl", b""
        body = "".join(json.dumps(item) + "\n" for item in text.task(task)[0]).encode()
    else:
        path = runs / f"{task}.safetensors"
        body = lzma.decompress(PICTURES.read_bytes())
    if not path.exists() or path.read_bytes() != body:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".tmp")
        draft.write_bytes(body)
        draft.replace(path)
    return path


def pack_pictures() -> None:
    """Write :data:`PICTURES` from the icon set."""
    captions = list(STYLE_SUBJECTS)
    images = torch.from_numpy(emoji.dataset(diffusion_plan.STYLES[TASKS["diffusion"]], captions))
    plain = PICTURES.with_suffix("")
    save_file({"images": images}, plain, {"captions": json.dumps(captions)})
    PICTURES.write_bytes(lzma.compress(plain.read_bytes(), preset=9))
    plain.unlink()


@dataclass(frozen=True)
class Workshop:
    """Where the adapters of one kind of base lie, and how one comes to be there."""

    kind: str
    assets: Path = ASSETS
    runs: Path = RUNS

    def folder(self, base: str, name: str, seed: int) -> Path:
        """Where it is, or would be."""
        return self.runs / self.kind / "families" / base / f"{name}-s{seed}"

    def there(self, base: str, name: str, seed: int) -> bool:
        """Whether it is there, trained by the recipe as it stands."""
        record = self.folder(base, name, seed) / "training.json"
        if not record.exists():
            return False
        found = json.loads(record.read_text())["settings"]
        wanted = asdict(Settings.of(self._settings(base, name, seed)))
        wanted = json.loads(json.dumps(wanted))
        return all(value == wanted.get(key) for key, value in found.items())

    def make(self, base: str, name: str, seed: int) -> dict[str, Any]:
        """Train it; what there is to say of it."""
        path = self.folder(base, name, seed)
        training_data(self.kind, self.runs / self.kind)
        began = time.monotonic()
        told = Settings.of(self._settings(base, name, seed))
        result = train(told, path, overwrite=True)
        with (path / "log.csv").open() as lines:
            losses = [float(row["loss"]) for row in csv.DictReader(lines) if row["loss"]]
        size = max(1, len(losses) // 10)
        parts = [losses[i : i + size] for i in range(0, len(losses), size)]
        return {
            "seed": seed,
            "seconds": round(time.monotonic() - began, 1),
            "loss_by_tenth": [round(sum(part) / len(part), 4) for part in parts],
            "validation_before": round(result.validation_before or 0.0, 5),
            "validation": round(result.validation or 0.0, 5),
            "parameters": result.parameters,
            "bytes": result.bytes,
        }

    def _settings(self, base: str, name: str, seed: int) -> dict[str, Any]:
        folder = self.assets / self.kind / "bases" / base
        data = training_data(self.kind, self.runs / self.kind)
        return settings(self.kind, name, folder, data, seed)


def make_adapter(shop: Shop, step: Step) -> dict[str, Any]:
    """Train one adapter."""
    recipe = step.recipe
    workshop = Workshop(shop.kind, shop.assets.parent, shop.runs.parent)
    return workshop.make(recipe["base"], recipe["name"], recipe["seed"])


def step_name(kind: str, base: str, name: str, seed: int) -> str:
    """As in the manifest."""
    return f"{base}/{TASKS[kind]}-{name}-s{seed}"


def adapter_step(kind: str, base: str, name: str, seed: int) -> Step:
    """One family on one base."""
    told = settings(kind, name, Path(), Path(), seed)
    recipe = {"base": base, "name": name} | {k: v for k, v in told.items() if k not in _PLACES}
    return Step(
        step_name(kind, base, name, seed),
        Path("families") / base / f"{name}-s{seed}",
        recipe,
        make_adapter,
        needs=("data", base),
        shipped=False,
    )


_PLACES = ("base", "data")
#: Seeds on v1 and of the references.
SEEDS = {"language": ((0, 1), (0,)), "diffusion": ((0,), (0,))}


def plan(kind: str) -> list[Step]:
    """Every step of one kind of base, the most telling first."""
    mine, again = SEEDS[kind]
    keys = [("v1", name, 0) for name in names(kind)]
    keys += [(base, name, 0) for base in TARGETS[kind] for name in names(kind)]
    keys += [("v1", name, seed) for seed in mine[1:] for name in names(kind)]
    keys += [(b, n, seed) for seed in again[1:] for b in TARGETS[kind] for n in names(kind)]
    return [adapter_step(kind, *key) for key in keys]


def run(argv: Sequence[str] | None = None) -> None:
    """The command line: a kind of base, then what every plan takes."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("kind", choices=sorted(TASKS), help="language or diffusion")
    arguments, rest = parser.parse_known_args(argv)
    kind = arguments.kind
    bases = language_plan.plan() if kind == "language" else diffusion_plan.plan()
    main(kind, [*(s for s in bases if "/" not in s.name), *plan(kind)], rest)


if __name__ == "__main__":
    run()
