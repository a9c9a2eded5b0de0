"""Rebuild the embedded pair: ``python -m lab.train_pair``.

Steps, in order: ``warm-up``, ``heldout``, ``base-v1``, ``style-v1``, ``base-v2``, ``style-v2``;
then the manifest is measured and written.
A finished step (its file is there) is skipped; a long one goes on from its checkpoint. Delete a
step's output, or name it with ``--redo``, to run it again.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lab import emoji
from lab.diffusion import MAX_TOKENS, add_lora, build_pipeline, train
from lab.manifest import write_manifest
from regraft.demo.captions import HELD_OUT_SUBJECTS, STYLE_SUBJECTS
from regraft.demo.pair import EmojiPipeline, assets_dir, load_pipeline

#: everything a run depends on, besides the data in ``lab/emoji.py``
PLAN: dict[str, dict[str, Any]] = {
    # a warm-up on another look: the general features, so that v1 needs fewer steps of its own
    "warm-up": {"steps": 5000, "stop": 2500, "batch": 32, "lr": 1.5e-3, "seed": 11},
    "base-v1": {"steps": 1500, "stop": 1000, "batch": 32, "lr": 1.2e-3, "seed": 14},
    "base-v2": {"steps": 1600, "stop": 1250, "batch": 32, "lr": 1.2e-3, "seed": 12},
    # few steps and dropout: with more steps it draws the subjects it saw by heart
    "style": {
        "steps": 250,
        "batch": 32,
        "lr": 2.0e-3,
        "seed": 13,
        "rank": 8,
        "alpha": 16,
        "dropout": 0.15,
    },
}

MODEL_INDEX = {
    "_class_name": "RegraftEmojiPipeline",
    "_diffusers_version": "0.42.0",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}

#: written by hand: the saver's own file differs between runs and names a newer class
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": MAX_TOKENS,
    "pad_token": "[PAD]",
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "unk_token": "[UNK]",
}

RETRAINED = "style-v2-retrained"


class Workshop:
    """Where outputs, checkpoints and records of one rebuild lie."""

    def __init__(self, assets: Path, runs: Path) -> None:
        self.assets = assets
        self.runs = runs
        assets.mkdir(parents=True, exist_ok=True)
        runs.mkdir(parents=True, exist_ok=True)

    def base(self, step: str) -> Path:
        """Where a base lies; the warm-up is no asset."""
        return (self.runs if step == "warm-up" else self.assets) / step

    def log(self, step: str) -> Callable[[str], None]:
        """A printer that names the step."""
        return lambda line: print(f"[{step}] {line}", flush=True)

    def record(self, step: str, facts: dict[str, Any]) -> None:
        """Keep what a finished step measured, for the manifest."""
        path = self.runs / f"{step}.json"
        path.write_text(json.dumps(facts, indent=1) + "\n")


def save_base(pipeline: EmojiPipeline, folder: Path) -> None:
    """Write a diffusers-style folder with float16 weights; renamed into place when complete."""
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    copy.deepcopy(pipeline.unet).half().save_pretrained(draft / "unet")
    copy.deepcopy(pipeline.text_encoder).half().save_pretrained(draft / "text_encoder")
    pipeline.tokenizer.save_pretrained(draft / "tokenizer")
    (draft / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    tidy(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def tidy(folder: Path) -> None:
    """Drop what the savers write about this machine and this release, and open the file modes."""
    config = json.loads((folder / "unet" / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "unet" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    text = json.dumps(TOKENIZER_CONFIG, indent=2) + "\n"
    (folder / "tokenizer" / "tokenizer_config.json").write_text(text)
    for path in folder.rglob("*.*"):
        path.chmod(0o644)


#: base step -> (look, captions, the base it starts from)
BASES: dict[str, tuple[str, Callable[[], list[str]], str | None]] = {
    "warm-up": (emoji.WARM_UP_LOOK, emoji.base_captions, None),
    "base-v1": (emoji.BASE_LOOK, emoji.base_captions, "warm-up"),
    "base-v2": (emoji.SUCCESSOR_LOOK, emoji.successor_captions, "base-v1"),
}


def train_base(shop: Workshop, step: str) -> None:
    """The warm-up from scratch, v1 from the warm-up, v2 from v1: see :data:`BASES`."""
    look, subjects, start = BASES[step]
    captions = subjects()
    if start is None:
        # the vocabulary covers v2's subjects too, so both bases share one tokenizer
        pipeline = build_pipeline(emoji.successor_captions(), PLAN[step]["seed"])
    else:
        pipeline = load_pipeline(shop.base(start))
    facts = train(
        pipeline,
        emoji.dataset(look, captions),
        captions,
        checkpoint=shop.runs / f"{step}.pt",
        log=shop.log(step),
        **PLAN[step],
    )
    save_base(pipeline, shop.base(step))
    shop.record(step, {"look": look, "images": len(captions), **facts})


def train_style(shop: Workshop, step: str) -> None:
    """The style LoRA on v1 (``style-v1``) or, same recipe and seed, on v2 (``style-v2``)."""
    base, name = {"style-v1": ("base-v1", "style-v1"), "style-v2": ("base-v2", RETRAINED)}[step]
    plan = dict(PLAN["style"])
    rank, alpha, dropout = plan.pop("rank"), plan.pop("alpha"), plan.pop("dropout")
    pipeline = load_pipeline(shop.assets / base)
    add_lora(pipeline, rank, alpha, dropout, plan["seed"])
    captions = list(STYLE_SUBJECTS)
    images = emoji.dataset(emoji.STYLE_LOOK, captions)
    facts = train(
        pipeline,
        images,
        captions,
        checkpoint=shop.runs / f"{step}.pt",
        log=shop.log(step),
        weight_decay=0.0,
        warmup=30,
        ema=False,
        **plan,
    )
    for parameter in pipeline.unet.parameters():
        parameter.data = parameter.data.half()
    pipeline.unet.save_lora_adapter(
        shop.assets,
        adapter_name="default",
        weight_name=f"{name}.safetensors",
        safe_serialization=True,
    )
    (shop.assets / f"{name}.safetensors").chmod(0o644)
    shop.record(
        step,
        {"look": emoji.STYLE_LOOK, "images": len(captions), "rank": rank, "alpha": alpha, **facts},
    )


def write_heldout(shop: Workshop, step: str) -> None:
    """Style images of the held-out subjects, captions in the file's metadata."""
    captions = list(HELD_OUT_SUBJECTS)
    images = torch.from_numpy(emoji.dataset(emoji.STYLE_LOOK, captions))
    metadata = {"captions": json.dumps(captions), "look": emoji.STYLE_LOOK}
    save_file({"images": images}, shop.assets / "heldout.safetensors", metadata)
    (shop.assets / "heldout.safetensors").chmod(0o644)
    shop.record(step, {"look": emoji.STYLE_LOOK, "images": len(captions)})


def main() -> None:
    """Run every step that is not done yet, then write the manifest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=assets_dir(), help="where outputs go")
    parser.add_argument("--runs", type=Path, default=emoji.CACHE / "runs", help="checkpoints")
    parser.add_argument("--threads", type=int, default=1, help="2 on idle cores")
    parser.add_argument("--redo", nargs="*", default=[], help="steps to run again")
    parser.add_argument("--only", nargs="*", help="run these steps alone, without the manifest")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    emoji.check_subjects()
    shop = Workshop(arguments.assets, arguments.runs)
    steps: list[tuple[str, Path, Callable[[Workshop, str], None]]] = [
        ("warm-up", shop.base("warm-up"), train_base),
        ("heldout", shop.assets / "heldout.safetensors", write_heldout),
        ("base-v1", shop.base("base-v1"), train_base),
        ("style-v1", shop.assets / "style-v1.safetensors", train_style),
        ("base-v2", shop.base("base-v2"), train_base),
        ("style-v2", shop.assets / f"{RETRAINED}.safetensors", train_style),
    ]
    for step, output, run in steps:
        if arguments.only is not None and step not in arguments.only:
            continue
        if step in arguments.redo:
            (shop.runs / f"{step}.pt").unlink(missing_ok=True)
        elif output.exists() and (shop.runs / f"{step}.json").exists():
            print(f"[{step}] there already")
            continue
        started = time.monotonic()
        run(shop, step)
        print(f"[{step}] done in {time.monotonic() - started:.0f} s", flush=True)
    if arguments.only is None:
        write_manifest(shop.assets, shop.runs, PLAN)


if __name__ == "__main__":
    main()
