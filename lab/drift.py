"""How far is too far: copying from v1 to bases trained on and on from it, ``python -m lab.drift``.

Between a fine-tune (weight cosine above 0.9) and a stranger (0) the battery has nothing. Here v1 of
the language family is trained on in stages with a large learning rate; at each stage an adapter is
copied from v1, another is trained there with the same recipe, and R is measured. Bases stay in the
cache; the rows go to ``benchmarks/retention_drift.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel

import regraft
from lab import text
from lab.language import add_lora, item_batches, open_base, save_base, stream_batches, train
from lab.language_plan import ADAPTER, NEXT_MIX, judge
from lab.steps import ASSETS, RUNS
from regraft.retention.figure import retention

#: seven times the learning rate of v1's own training, and weight decay that forgets
RECIPE: dict[str, Any] = {"steps": 300, "lr": 2e-2, "weight_decay": 0.1, "warmup": 20}
STAGES = 4
TASKS = ("bible", "spell")
OUTPUT = Path(__file__).parents[1] / "benchmarks" / "retention_drift.json"


def drift(start: Path, runs: Path, stage: int) -> Path:
    """The base after one more stage of training."""
    folder = runs / f"stage-{stage}"
    if folder.exists():
        return folder
    model, tokenizer = open_base(start)
    batches = stream_batches(tokenizer, text.corpora(NEXT_MIX), 32, shares=list(NEXT_MIX.values()))
    train(model, batches, seed=200 + stage, checkpoint=runs / f"{stage}.pt", **RECIPE)
    save_base(model, tokenizer, folder)
    return folder


def retrained_loss(folder: Path, task: str, checkpoint: Path) -> float:
    """Held-out loss with an adapter of v1's recipe trained on the base itself."""
    base, tokenizer = open_base(folder)
    plan = dict(ADAPTER[task])
    model = add_lora(base, 8, 16, plan.pop("dropout"), 100)
    batches = item_batches(tokenizer, text.task(task)[0], plan.pop("batch"))
    train(
        model,
        batches,
        seed=100,
        checkpoint=checkpoint,
        weight_decay=0.0,
        warmup=20,
        ema=False,
        **plan,
    )
    return judge(DATA, task, model, tokenizer)["heldout_loss"]


#: what :func:`lab.language_plan.judge` asks of a shop
DATA: Any = SimpleNamespace(assets=ASSETS / "language")


def row(folder: Path, stage: int, task: str, runs: Path) -> dict[str, Any]:
    """One adapter copied to one stage."""
    v1 = DATA.assets / "bases" / "v1"
    adapter = DATA.assets / "adapters" / "v1" / f"{task}-r8-s0"
    seen = regraft.transfer(adapter, source=v1, target=folder, method="copy", dry_run=True)
    base, tokenizer = open_base(folder)
    bare = judge(DATA, task, base, tokenizer)["heldout_loss"]
    copied = PeftModel.from_pretrained(base, adapter).eval()
    with_copy = judge(DATA, task, copied, tokenizer)["heldout_loss"]
    again = retrained_loss(folder, task, runs / f"{task}-{stage}.pt")
    found = retention(target=bare, transferred=with_copy, retrained=again, better="lower")
    return {
        "stage": stage,
        "steps": stage * RECIPE["steps"],
        "adapter": task,
        "cosine": round(seen.evidence["cosine"], 4),
        "difference": round(seen.evidence["difference"], 4),
        "target": bare,
        "transferred": with_copy,
        "retrained": again,
        "retention": None if found.value is None else round(found.value, 4),
    }


def main() -> None:
    """Every stage and task, then the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RUNS / "drift")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    folder = DATA.assets / "bases" / "v1"
    rows = []
    for stage in range(1, STAGES + 1):
        folder = drift(folder, arguments.runs, stage)
        for task in TASKS:
            rows.append(row(folder, stage, task, arguments.runs))
            print(json.dumps(rows[-1]), flush=True)
    recipe = {"recipe": RECIPE, "mix": NEXT_MIX, "from": "v1", "command": "python -m lab.drift"}
    arguments.output.write_text(json.dumps({**recipe, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
