"""What is not carried, and the reason that is given."""

from __future__ import annotations

from typing import Any

from tests.wild.case import Case
from tests.wild.made import refused

CASES: list[Case] = []
HEAD = "model.layers.1.self_attn.q_proj"


def add(family: str, layer: str, make: Any, outcome: str, what: str = "") -> None:
    CASES.append(Case(family, "peft", layer, "PEFT", make, outcome, what))


PAIR = {f"base_model.model.{HEAD}.lora_{x}.weight": s for x, s in (("A", (4, 16)), ("B", (16, 4)))}
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
for family, says, keys, settings in (
    ("corda", "Training with corda changed the base", PAIR, {**LORA, "init_lora_weights": "corda"}),
    (
        "lora-ga",
        "Training with lora_ga changed the base",
        PAIR,
        {**LORA, "init_lora_weights": "lora_ga"},
    ),
    ("loftq", "LoftQ trained on a quantised base", PAIR, {**LORA, "init_lora_weights": "loftq"}),
    (
        "pissa",
        "started from a randomised SVD",
        PAIR,
        {**LORA, "init_lora_weights": "pissa_niter_4"},
    ),
    ("activated lora", "activated LoRA", PAIR, {**LORA, "alora_invocation_tokens": [1]}),
    ("kasa", "KaSA", PAIR, {**LORA, "kasa_config": {"beta": 1}}),
    ("layer replication", "layer replication", PAIR, {**LORA, "layer_replication": [[0, 2]]}),
    (
        "vera",
        "does not hold the random matrices",
        {f"base_model.model.{HEAD}.vera_lambda_{x}": (4,) for x in "bd"},
        {"peft_type": "VERA", "r": 4},
    ),
    (
        "prompt tuning",
        "PROMPT_TUNING",
        {"prompt_embeddings": (4, 16)},
        {"peft_type": "PROMPT_TUNING"},
    ),
    (
        "prefix tuning",
        "PREFIX_TUNING",
        {"prompt_embeddings": (4, 16)},
        {"peft_type": "PREFIX_TUNING"},
    ),
    (
        "randlora",
        "RANDLORA",
        {f"base_model.model.{HEAD}.randlora_lambda": (4, 4)},
        {"peft_type": "RANDLORA"},
    ),
    (
        "vb-lora",
        "VBLORA",
        {f"base_model.model.{HEAD}.vblora_logits_A": (4, 4)},
        {"peft_type": "VBLORA"},
    ),
    ("osf", "OSF", {f"base_model.model.{HEAD}.osf_U": (4, 4)}, {"peft_type": "OSF"}),
):
    what = (
        "randomised" if family == "pissa" else "without its projection" if family == "vera" else ""
    )
    add(family, "linear", refused(keys, "llama", settings), f"refused: {says}", what)
add(
    "lora",
    "linear",
    refused(
        {
            "base_model.model.lm_head.lora_A.weight": (4, 16),
            "base_model.model.lm_head.lora_B.weight": (40, 4),
        },
        "llama-tied",
        LORA,
    ),
    "refused: ties this head to its embeddings",
    "a tied output head",
)
add(
    "lora bias",
    "linear",
    refused(PAIR | {f"base_model.model.{HEAD}.lora_B.bias": (16,)}, "llama", LORA),
    "refused: which the base does not have",
    "a layer without a bias",
)
CASES.append(
    Case(
        "lora",
        "bfl",
        "linear",
        "Black Forest Labs",
        refused(
            {
                "img_in.lora_A.weight": (4, 8),
                "img_in.lora_B.weight": (24, 4),
                "double_blocks.0.img_attn.proj.lora_A.weight": (4, 24),
                "double_blocks.0.img_attn.proj.lora_B.weight": (24, 4),
            },
            "flux",
        ),
        "refused: it widens transformer.x_embedder from 4 inputs to 8",
        "control LoRA",
    )
)
UNET = "lora_unet_mid_block_attentions_0_proj_in"
for family, dialect, writer, says, names in (
    (
        "oft",
        "onetrainer legacy",
        "OneTrainer",
        "Scaled OFT",
        {f"{UNET}.oft_R.weight": (4, 6), f"{UNET}.oft_R.scaled_oft": (1,)},
    ),
    (
        "textual inversion",
        "onetrainer legacy",
        "OneTrainer",
        "bundled with the adapter",
        {
            f"{UNET}.lora_down.weight": (2, 32, 1, 1),
            f"{UNET}.lora_up.weight": (32, 2, 1, 1),
            "bundle_emb.cat.clip_l": (1, 16),
        },
    ),
    ("textual inversion", "kohya", "sd-scripts", "textual inversion", {"emb_params": (1, 16)}),
    (
        "textual inversion",
        "kohya",
        "sd-scripts",
        "textual inversion",
        {"clip_l": (1, 16), "clip_g": (1, 16)},
    ),
    (
        "bottleneck adapter",
        "adapters",
        "adapters",
        "bottleneck adapter",
        {"roberta.encoder.layer.0.output.adapters.x.adapter_down.0.weight": (4, 16)},
    ),
):
    what = (
        "two encoders"
        if "clip_l" in names
        else "bundled"
        if f"{UNET}.lora_up.weight" in names
        else ""
    )
    CASES.append(
        Case(
            family,
            dialect,
            "embedding" if "inversion" in family else "linear",
            writer,
            refused(names, "sd"),
            f"refused: {says}",
            what,
        )
    )
