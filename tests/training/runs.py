"""Short runs on the lab's bases, and what was written."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from regraft.running import open_model
from regraft.training import FAMILIES, Settings
from regraft.training.facts import generator
from regraft.training.items import objective_for

ASSETS = Path(__file__).parents[2] / "lab" / "assets"
LANGUAGE = {
    "base": str(ASSETS / "language" / "bases" / "v1"),
    "data": str(ASSETS / "language" / "data" / "spell.jsonl"),
}
DIFFUSION = {
    "base": str(ASSETS / "diffusion" / "bases" / "v1"),
    "data": str(ASSETS / "diffusion" / "data" / "duotone.safetensors"),
    "targets": r"mid_block\..*attn\d\.to_(v|out\.0)",
}
#: Families that Regraft reads as a change of weights, and those that have none.
WITH_CHANGE = ("lora", "lora-x", "dora", "pissa", "svdiff", "foura", "loha", "lokr")
WITHOUT = ("bottleneck", "prompt", "prefix")


def settings(where, family="lora", **more):
    usual = {"steps": 8, "batch": 4, "lr": 1e-2, "save_every": 3, "device": "cpu"}
    if FAMILIES[family].rank is not None:
        usual["rank"] = 4
    return Settings.of({**usual, **where, "family": family, **more})


def short(where, **more):
    """Few items, so that holding out costs little."""
    return settings(where, **{"validation": 0.02, **more})


def contents(folder):
    """Every file of a folder, those in its folders too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def logged(folder):
    """The log's steps, without step 0, as numbers by column."""
    lines = (folder / "log.csv").read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    return [
        {name: float(cell) for name, cell in row.items() if cell} for row in rows if row["loss"]
    ]


class Stop(Exception):
    """What a user's Ctrl-C is, at a known step."""


def stopping_at(step):
    def progress(stage, done, total):
        if stage == "training" and done == step:
            raise Stop

    return progress


def held_out(goal, folder):
    """The items that were held out from what is in ``folder``."""
    facts = json.loads((folder / "training.json").read_text())
    split = generator(facts["settings"]["seed"], "split")
    order = torch.randperm(goal.count, generator=split)
    return sorted(order[: facts["data"]["held_out"]].tolist())


def reloaded_loss(where, folder, chosen):
    """Held-out loss of what was written, as PEFT loads it onto the bare base."""
    from peft import PeftModel

    import regraft.tuners  # noqa: F401

    model = open_model(where["base"])
    goal = objective_for(model, chosen)
    loaded = PeftModel.from_pretrained(model.modules[goal.component], folder).eval()
    return goal.held_out(loaded, held_out(goal, folder))
