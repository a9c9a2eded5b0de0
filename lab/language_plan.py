"""The lab's language family: ``python -m lab.language_plan``.

One source (v1), a target for every kind of upgrade, three tasks as adapters on v1, and the same
recipes retrained on every target as the reference. What matters most comes first.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.utils import logging

from lab import text
from lab.language import (
    BIG,
    CONTEXT,
    SMALL,
    add_lora,
    bpe_tokenizer,
    build,
    byte_tokenizer,
    drop_layers,
    item_batches,
    open_base,
    save_adapter,
    save_base,
    stream_batches,
    train,
)
from lab.steps import Shop, Step, main, printer
from regraft.retention.text import exact_score, held_out_loss
from regraft.running import Text

#: corpus -> how often a row is drawn from it
MIX = {"pride-and-prejudice": 0.25, "sense-and-sensibility": 0.25, "code-diffusers": 0.5}
NEXT_MIX = {"northanger-abbey": 0.25, "persuasion": 0.25, "code-transformers": 0.5}

SCRATCH = {"mix": MIX, "batch": 32, "lr": 4e-3, "weight_decay": 0.01}
BASES: dict[str, dict[str, Any]] = {
    "v1": {**SCRATCH, "shape": SMALL, "steps": 2000, "seed": 21},
    "continued": {
        **SCRATCH,
        "start": "v1",
        "mix": NEXT_MIX,
        "steps": 800,
        "seed": 22,
    },
    "fine-tune": {
        **SCRATCH,
        "start": "v1",
        "mix": {"persuasion": 1.0},
        "steps": 200,
        "lr": 5e-4,
        "seed": 23,
    },
    # one layer of four removed, then distilled: how SSD-1B was made of SDXL
    "pruned": {
        **SCRATCH,
        "start": "v1",
        "layers": (0, 1, 3),
        "steps": 400,
        "lr": 1.5e-3,
        "seed": 24,
    },
    "other-seed": {**SCRATCH, "shape": SMALL, "steps": 1300, "seed": 25},
    "bigger": {**SCRATCH, "shape": BIG, "steps": 1000, "lr": 3e-3, "seed": 26},
    # its tokens are about two bytes long, so half the rows are as much text
    "other-tokenizer": {
        **SCRATCH,
        "shape": SMALL,
        "tokens": 512,
        "batch": 16,
        "steps": 1300,
        "seed": 27,
    },
}
TARGETS = ("continued", "fine-tune", "pruned", "other-seed", "bigger", "other-tokenizer")

ADAPTER: dict[str, dict[str, Any]] = {
    "bible": {"steps": 100, "batch": 16, "lr": 5e-3, "dropout": 0.05},
    "timezones": {"steps": 100, "batch": 16, "lr": 5e-3, "dropout": 0.05},
    # short rows, so more of them
    "spell": {"steps": 180, "batch": 32, "lr": 5e-3, "dropout": 0.0},
}

#: tasks of the rank 32 adapters
WIDE = ("bible", "spell")

#: What is shipped beside the measurements: the rest would weigh more than the bases.
KEPT = {("v1", 8), ("v1", 32)}


def held_out(shop: Shop, task: str) -> list[Text]:
    """A task's held-out items, as they are shipped."""
    lines = (shop.assets / "data" / f"{task}.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in lines]
    return [
        Text(item.get("completion", item.get("text")), item.get("prompt", "")) for item in items
    ]


def judge(shop: Shop, task: str, model: Any, tokenizer: Any) -> dict[str, float]:
    """Held-out loss in nats per byte, and the share of exact answers where a task asks for them."""
    items = held_out(shop, task)
    found = {"heldout_loss": round(held_out_loss(model, tokenizer, items), 5)}
    if items[0].prompt:
        right = exact_score(model, tokenizer, items)
        found["exact"] = round(sum(right) / len(right), 4)
    return found


def write_data(shop: Shop, step: Step) -> dict[str, Any]:
    """The held-out items of every task."""
    folder = shop.assets / "data"
    return {task: text.write_held_out(task, folder / f"{task}.jsonl") for task in text.TASKS}


def make_base(shop: Shop, step: Step) -> dict[str, Any]:
    """Train one base; its record holds what it makes of every task without an adapter."""
    plan = dict(step.recipe)
    mix, batch, start = plan.pop("mix"), plan.pop("batch"), plan.pop("start", None)
    shape, tokens, layers = (
        plan.pop("shape", None),
        plan.pop("tokens", None),
        plan.pop("layers", ()),
    )
    texts = text.corpora(mix)
    teacher = None
    if start is None:
        tokenizer = bpe_tokenizer(texts, tokens) if tokens else byte_tokenizer()
        model = build(tokenizer, shape, plan["seed"])
    else:
        model, tokenizer = open_base(shop.assets / "bases" / start)
        if layers:
            teacher = model.requires_grad_(False)
            model = drop_layers(teacher, layers).requires_grad_(True)
    facts = train(
        model,
        stream_batches(tokenizer, texts, batch, CONTEXT, list(mix.values())),
        teacher=teacher,
        checkpoint=shop.checkpoint(step),
        log=printer(step),
        **plan,
    )
    folder = shop.assets / step.output
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_base(model, tokenizer, folder)
    saved, tokenizer = open_base(folder)
    facts["parameters"] = sum(p.numel() for p in saved.parameters())
    return {**facts, "heldout": {t: judge(shop, t, saved, tokenizer) for t in text.TASKS}}


def make_adapter(shop: Shop, step: Step) -> dict[str, Any]:
    """Train one LoRA; its record holds the held-out figures with the file as it was written."""
    plan = dict(step.recipe)
    base, task, kept = plan.pop("base"), plan.pop("task"), plan.pop("kept")
    rank, alpha, dropout = plan.pop("rank"), plan.pop("alpha"), plan.pop("dropout")
    batch = plan.pop("batch")
    folder = shop.assets / "bases" / base
    bare, tokenizer = open_base(folder)
    before = judge(shop, task, bare, tokenizer)
    model = add_lora(bare, rank, alpha, dropout, plan["seed"])
    facts = train(
        model,
        item_batches(tokenizer, text.task(task)[0], batch),
        checkpoint=shop.checkpoint(step),
        log=printer(step),
        weight_decay=0.0,
        warmup=20,
        ema=False,
        **plan,
    )
    path = shop.assets / step.output if kept else shop.runs / "not-kept" / step.name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(model, f"bases/{base}", path)
    judged = PeftModel.from_pretrained(open_base(folder)[0], path).eval()
    return {**facts, "bare": before, "adapted": judge(shop, task, judged, tokenizer)}


def adapter_step(base: str, task: str, rank: int, seed: int) -> Step:
    """A LoRA of one task on one base; one that is not kept leaves its measurements only."""
    name = f"{base}/{task}-r{rank}-s{seed}"
    kept = (base, rank) in KEPT or (rank, seed) == (8, 0)
    recipe = {"base": base, "task": task, "rank": rank, "alpha": 2 * rank, "seed": 100 + seed}
    output = Path("adapters") / name if kept else Path("data")
    return Step(
        name,
        output,
        {**recipe, **ADAPTER[task], "kept": kept},
        make_adapter,
        needs=("data", base),
        shipped=base == "v1",
    )


def base_step(name: str) -> Step:
    """A base; see :data:`BASES`."""
    start = BASES[name].get("start")
    needs = ("data", start) if start else ("data",)
    return Step(name, Path("bases") / name, BASES[name], make_base, needs)


def plan() -> list[Step]:
    """Every step, the most telling first."""
    adapters = partial(map, lambda key: adapter_step(*key))
    first = [("v1", task, 8, 0) for task in text.TASKS]
    references = [(target, task, 8, 0) for target in TARGETS for task in text.TASKS]
    seeds = [("v1", task, 8, seed) for seed in (1, 2) for task in text.TASKS]
    wide = [(base, task, 32, 0) for base in ("v1", *TARGETS) for task in WIDE]
    more = [(t, task, 8, seed) for seed in (1, 2) for t in TARGETS for task in text.TASKS]
    return [
        Step("data", Path("data/bible.jsonl"), {"tasks": text.TASKS}, write_data),
        base_step("v1"),
        *adapters(first),
        *(base_step(name) for name in TARGETS),
        *adapters([*references, *seeds, *wide, *more]),
    ]


if __name__ == "__main__":
    logging.disable_progress_bar()
    main("language", plan())
