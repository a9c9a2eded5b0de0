"""The lab's text-to-image family: ``python -m lab.diffusion_plan``.

One source (v1), a target for every kind of upgrade, three styles as adapters on v1, and the same
recipes retrained on every target as the reference. What matters most comes first.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lab import emoji, training
from lab.diffusion import (
    add_lora,
    build_pipeline,
    draw_batch,
    fold_lora,
    token_table,
    train,
    trainable,
)
from lab.steps import Shop, Step, main, printer
from lab.train_pair import save_base
from regraft.demo.captions import HELD_OUT_SUBJECTS, STYLE_SUBJECTS
from regraft.demo.pair import EmojiPipeline, load_heldout, load_pipeline
from regraft.demo.sampler import attach, denoising_loss, detach, to_model, velocity

#: style -> look
STYLES = {
    "line": emoji.STYLE_LOOK,
    "outlined": emoji.OUTLINED,
    "duotone": emoji.DUOTONE,
}
#: The smaller U-Net of the lab, 1.6 M parameters: a base trains in a quarter of an hour.
SMALL = {
    "block_out_channels": (32, 48, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": 2,
}
PRUNED = {**SMALL, "transformer_layers_per_block": 1}
BIG = {
    "block_out_channels": (40, 56, 64),
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
}
SMALL_HIDDEN, BIG_HIDDEN = 64, 80

#: A fine-tune's narrower world: animals in the soft 3D look.
ANIMALS = (
    *("cat face", "rabbit face", "bear", "koala", "lion", "pig face", "monkey face", "owl"),
    *("honeybee", "lady beetle", "turtle", "octopus", "tropical fish", "spouting whale"),
    *("elephant", "hedgehog", "eagle", "t rex", "wolf", "baby chick", "mouse face", "cow face"),
    *("snake", "crab", "dolphin", "giraffe", "bat", "spider", "dog face", "fox", "panda"),
    *("tiger face", "frog", "penguin", "unicorn", "butterfly", "snail", "fish", "shark"),
    *("flamingo", "horse face", "hamster", "gorilla", "parrot", "swan", "lobster", "squid"),
    *("camel", "kangaroo"),
)

SCRATCH = {"batch": 32, "lr": 1.5e-3}
BASES: dict[str, dict[str, Any]] = {
    "v1": {"look": emoji.BASE_LOOK, "unet": SMALL, "steps": 1800, "seed": 21, **SCRATCH},
    "continued": {
        "look": emoji.WARM_UP_LOOK,
        "start": "v1",
        "subjects": "all",
        "steps": 1000,
        "seed": 22,
        **SCRATCH,
    },
    "fine-tune": {
        "look": emoji.SUCCESSOR_LOOK,
        "start": "v1",
        "subjects": "animals",
        "steps": 200,
        "batch": 32,
        "lr": 4e-4,
        "seed": 23,
    },
    "pruned": {
        "look": emoji.BASE_LOOK,
        "start": "v1",
        "unet": PRUNED,
        "steps": 250,
        "batch": 32,
        "lr": 1e-3,
        "seed": 24,
    },
    "other-seed": {"look": emoji.BASE_LOOK, "unet": SMALL, "steps": 900, "seed": 25, **SCRATCH},
    "bigger": {
        "look": emoji.BASE_LOOK,
        "unet": BIG,
        "hidden": BIG_HIDDEN,
        "steps": 500,
        "seed": 26,
        **SCRATCH,
    },
}
TARGETS = ("fine-tune", "continued", "pruned", "bigger", "other-seed")

#: LoRA on attention and on the second convolution of every block: enough to learn a style, and a
#: file of 0.3 MB at rank 8.
LORA_TARGETS = ["conv2", "to_q", "to_k", "to_v", "to_out.0"]
ADAPTER = {"steps": 120, "batch": 16, "lr": 2e-3}

CHANCE_OF_TEACHER = 0.5  # weight of the teacher's velocity beside the data's


def subjects_of(which: str) -> list[str]:
    """The captions a base is trained on."""
    if which == "all":
        return emoji.successor_captions()
    return list(ANIMALS) if which == "animals" else emoji.base_captions()


def heldout_path(shop: Shop, style: str) -> Path:
    """Held-out pictures of a style, written once."""
    return shop.assets / "data" / f"{style}.safetensors"


def write_data(shop: Shop, step: Step) -> dict[str, Any]:
    """Every style on the 50 subjects that no adapter saw in it."""
    captions = list(HELD_OUT_SUBJECTS)
    for style, look in STYLES.items():
        path = heldout_path(shop, style)
        path.parent.mkdir(parents=True, exist_ok=True)
        images = torch.from_numpy(emoji.dataset(look, captions))
        save_file({"images": images}, path, {"captions": json.dumps(captions), "look": look})
        path.chmod(0o644)
    return {"images": len(captions)}


def prune(teacher: EmojiPipeline, student: EmojiPipeline) -> None:
    """Fill the student from the teacher: of two transformer blocks the down path and the middle
    keep the first, the up path the second, so that names no longer say which block it was."""
    weights = teacher.unet.state_dict()
    for name in student.unet.state_dict():
        kept = "1" if name.startswith("up_blocks") else "0"
        origin = re.sub(r"transformer_blocks\.0\.", f"transformer_blocks.{kept}.", name)
        student.unet.state_dict()[name].copy_(weights[origin])
    student.text_encoder.load_state_dict(teacher.text_encoder.state_dict())


def distil(
    teacher: EmojiPipeline, student: EmojiPipeline, captions: list[str], images: Any, recipe: Any
) -> dict[str, Any]:
    """Train the student toward the data and the teacher's velocity, half and half."""
    clean, tokens, batch = to_model(images), token_table(student, captions), recipe.pop("batch")

    def loss_of(draw: torch.Generator) -> Tensor:
        x0, mix, noise, ids = draw_batch(clean, tokens, batch, draw)
        noisy, t = (1 - mix) * x0 + mix * noise, mix.flatten()
        condition = student.text_encoder(input_ids=ids).last_hidden_state
        guess = velocity(student, noisy, t, condition)
        with torch.no_grad():
            taught = teacher.text_encoder(input_ids=ids).last_hidden_state
            shown = velocity(teacher, noisy, t, taught)
        toward_data = (guess - (noise - x0)).pow(2).mean()
        toward_teacher = (guess - shown).pow(2).mean()
        return (1 - CHANCE_OF_TEACHER) * toward_data + CHANCE_OF_TEACHER * toward_teacher

    student.unet.train()
    facts = training.train(trainable(student), loss_of, **recipe)
    return {"batch": batch, **facts}


def heldout_losses(shop: Shop, pipeline: EmojiPipeline) -> dict[str, float]:
    """Denoising loss of each style's held-out pictures."""
    found = {}
    for style in STYLES:
        images, captions = load_heldout(heldout_path(shop, style))
        found[style] = round(denoising_loss(pipeline, images, captions), 6)
    return found


def make_base(shop: Shop, step: Step) -> dict[str, Any]:
    """Train one base; its record holds the held-out loss of every style without an adapter."""
    plan = dict(step.recipe)
    look, which, start = plan.pop("look"), plan.pop("subjects", "base"), plan.pop("start", None)
    shape, hidden = plan.pop("unet", None), plan.pop("hidden", SMALL_HIDDEN)
    captions = subjects_of(which)
    images = emoji.dataset(look, captions)
    plan.update(checkpoint=shop.checkpoint(step), log=printer(step))
    origin = load_pipeline(shop.assets / "bases" / start) if start else None
    if shape is not None:
        # the vocabulary covers every base's subjects, so all share one tokenizer
        pipeline = build_pipeline(emoji.successor_captions(), plan["seed"], shape, hidden)
        if origin is not None:
            prune(origin, pipeline)
            facts = distil(origin, pipeline, captions, images, plan)
        else:
            facts = train(pipeline, images, captions, **plan)
    else:
        assert origin is not None
        pipeline = origin
        facts = train(pipeline, images, captions, **plan)
    folder = shop.assets / step.output
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_base(pipeline, folder)
    saved = load_pipeline(folder)
    parameters = sum(p.numel() for p in saved.unet.parameters())
    facts |= {"images": len(captions), "parameters": parameters}
    return {**facts, "heldout_loss": heldout_losses(shop, saved)}


def make_adapter(shop: Shop, step: Step) -> dict[str, Any]:
    """Train one LoRA; its record holds the held-out loss with the file as it was written."""
    plan = dict(step.recipe)
    base, style = plan.pop("base"), plan.pop("style")
    rank, alpha = plan.pop("rank"), plan.pop("alpha")
    pipeline = load_pipeline(shop.assets / "bases" / base)
    add_lora(pipeline, rank, alpha, 0.0, plan["seed"], LORA_TARGETS)
    fold_lora(pipeline)
    captions = list(STYLE_SUBJECTS)
    facts = train(
        pipeline,
        emoji.dataset(STYLES[style], captions),
        captions,
        checkpoint=shop.checkpoint(step),
        log=printer(step),
        weight_decay=0.0,
        warmup=20,
        ema=False,
        **plan,
    )
    for parameter in pipeline.unet.parameters():
        parameter.data = parameter.data.half()
    path = shop.assets / step.output
    path.parent.mkdir(parents=True, exist_ok=True)
    pipeline.unet.save_lora_adapter(
        path.parent, adapter_name="default", weight_name=path.name, safe_serialization=True
    )
    path.chmod(0o644)
    judged = load_pipeline(shop.assets / "bases" / base)
    images, shown = load_heldout(heldout_path(shop, style))
    bare = denoising_loss(judged, images, shown)
    with_adapter = denoising_loss(attach(judged, path), images, shown)
    detach(judged)
    return {**facts, "heldout_bare": round(bare, 6), "heldout_adapted": round(with_adapter, 6)}


def adapter_step(base: str, style: str, rank: int, seed: int) -> Step:
    """A LoRA of one style on one base."""
    name = f"{base}/{style}-r{rank}-s{seed}"
    recipe = {"base": base, "style": style, "rank": rank, "alpha": 2 * rank, "seed": 100 + seed}
    output = Path("adapters") / f"{name}.safetensors"
    return Step(
        name,
        output,
        {**recipe, **ADAPTER},
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
    first = [("v1", style, 8, seed) for seed in (0, 1, 2) for style in STYLES]
    near = ("continued", "fine-tune", "pruned", "other-seed")
    wide = [(base, "line", 32, 0) for base in ("v1", *near)]
    references = [(target, style, 8, 0) for target in near for style in STYLES]
    big = [("bigger", style, 8, 0) for style in STYLES] + [("bigger", "line", 32, 0)]
    return [
        Step("data", Path("data/line.safetensors"), {"styles": STYLES}, write_data),
        base_step("v1"),
        *(base_step(name) for name in near),
        *adapters([*first, *references, *wide]),
        base_step("bigger"),
        *adapters(big),
    ]


if __name__ == "__main__":
    main("diffusion", plan())
