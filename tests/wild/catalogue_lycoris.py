"""LyCORIS' families, and DyLoRA and OFT of sd-scripts."""

from __future__ import annotations

from tests.wild import pieces
from tests.wild.case import Case, add_to
from tests.wild.made import filed
from tests.wild.pieces import (
    Maker,
    lora,
    lycoris,
)
from tests.wild.places import (
    FUSED,
    LDM,
    SD,
    WAN_Q,
    WEIGHTS,
    flat,
)

CASES: list[Case] = []
add = add_to(CASES)

# ---------------------------------------------------------------- LyCORIS' families

LYCORIS: tuple[tuple[str, str, Maker, tuple[str, ...]], ...] = (
    ("lora", "Tucker", lycoris("LoConModule", use_tucker=True), ("3×3 conv",)),
    ("rslora", "", lycoris("LoConModule", rs_lora=True), WEIGHTS),
    ("dora", "per output", lycoris("LoConModule", weight_decompose=True, wd_on_out=True), WEIGHTS),
    ("dora", "per input", lycoris("LoConModule", weight_decompose=True, wd_on_out=False), WEIGHTS),
    ("dora", "of LoHa", lycoris("LohaModule", weight_decompose=True), ("linear",)),
    ("dora", "of LoKr", lycoris("LokrModule", weight_decompose=True, factor=4), ("linear",)),
    ("loha", "", lycoris("LohaModule"), WEIGHTS),
    ("loha", "Tucker", lycoris("LohaModule", use_tucker=True), ("3×3 conv",)),
    ("lokr", "", lycoris("LokrModule", factor=4), WEIGHTS),
    ("lokr", "both halves products", lycoris("LokrModule", factor=4, decompose_both=True), WEIGHTS),
    ("lokr", "both halves whole", lycoris("LokrModule", factor=4, full_matrix=True), WEIGHTS),
    ("lokr", "Tucker", lycoris("LokrModule", factor=4, use_tucker=True), ("3×3 conv",)),
    ("full", "", lycoris("FullModule"), WEIGHTS),
    ("full", "", lycoris("NormModule"), ("norm",)),
    ("ia3", "outputs", lycoris("IA3Module"), WEIGHTS),
    ("ia3", "inputs", lycoris("IA3Module", train_on_input=True), WEIGHTS),
    ("oft", "", lycoris("DiagOFTModule", lora_dim=4), WEIGHTS),
    (
        "oft",
        "constraint, rescaled",
        lycoris("DiagOFTModule", lora_dim=4, constraint=0.02, rescaled=True),
        WEIGHTS,
    ),
    ("boft", "", lycoris("ButterflyOFTModule", lora_dim=4), WEIGHTS),
    ("glora", "", lycoris("GLoRAModule"), WEIGHTS),
    ("t-lora", "", lycoris("TLoraModule"), ("linear", "1×1 conv")),
)
for family, what, maker, kinds in LYCORIS:
    for kind in kinds:
        add(
            family,
            "lycoris",
            kind,
            "LyCORIS",
            filed(flat("lycoris_", SD[kind]), maker=maker),
            what=what,
        )
        add(
            family,
            "kohya",
            kind,
            "LyCORIS",
            filed(flat("lora_unet_", LDM[kind]), maker=maker),
            what=what,
        )
add(
    "full",
    "lycoris",
    "bias",
    "LyCORIS",
    filed(flat("lycoris_", SD["bias"]), maker=pieces.difference(".diff", ".diff_b")),
)
add(
    "full",
    "kohya",
    "bias",
    "LyCORIS",
    filed(flat("lora_unet_", LDM["bias"]), maker=pieces.difference(".diff", ".diff_b")),
)
for family, what, maker, kinds in LYCORIS:
    if "linear" in kinds and family != "boft":  # 72 rows make no butterfly
        add(family, "kohya", "fused", "LyCORIS", filed(FUSED, maker=maker), what=what)
for family, maker in (("loha", lycoris("LohaModule")), ("lokr", pieces.kron())):
    add(family, "musubi other", "linear", "musubi-tuner", filed(WAN_Q, maker=maker))
for kind in ("linear", "1×1 conv", "3×3 conv"):
    add("dylora", "kohya", kind, "sd-scripts", filed(flat("lora_unet_", LDM[kind]), maker=lora()))
    add(
        "oft",
        "kohya",
        kind,
        "sd-scripts",
        filed(
            flat("oft_unet_", LDM[kind]),
            maker=lycoris("DiagOFTModule", lora_dim=4, constraint=0.02),
        ),
        what="networks/oft.py",
    )
