"""The other families of OneTrainer, ai-toolkit and ComfyUI, and those with one form."""

from __future__ import annotations

from tests.wild import pieces
from tests.wild.case import Case, add_to
from tests.wild.made import filed
from tests.wild.pieces import (
    AB,
    AB_ALPHA,
    KOHYA,
    dora,
    lora,
    lycoris,
)
from tests.wild.places import (
    FLUX_Q,
    IMAGE_QKV,
    LDM,
    LINEAR1,
    OT,
    SD,
    WAN_Q,
    WEIGHTS,
    at,
    dotted,
    flat,
)

CASES: list[Case] = []
add = add_to(CASES)

# ---------------------------------------------------------------- OneTrainer and ai-toolkit

for kind in WEIGHTS:
    for what, out in (("per input", False), ("per output", True)):
        add(
            "dora",
            "onetrainer legacy",
            kind,
            OT,
            filed(flat("lora_unet_", SD[kind]), maker=dora(KOHYA, ".dora_scale", out=out)),
            what=what,
        )
        add(
            "dora",
            "onetrainer comfy",
            kind,
            OT,
            filed(
                dotted("diffusion_model.", LDM[kind]), maker=dora(AB_ALPHA, ".dora_scale", out=out)
            ),
            what=what,
        )
        add(
            "dora",
            "onetrainer original",
            kind,
            OT,
            filed(LDM[kind], maker=dora(AB_ALPHA, ".dora_scale", out=out)),
            what=what,
        )
    add(
        "dora",
        "onetrainer diffusers",
        kind,
        OT,
        filed(dotted("unet.", SD[kind]), maker=dora(AB, ".dora_scale", out=False)),
        what="per input",
    )
    add(
        "loha",
        "onetrainer legacy",
        kind,
        OT,
        filed(flat("lora_unet_", SD[kind]), maker=lycoris("LohaModule")),
    )
    add(
        "loha",
        "onetrainer comfy",
        kind,
        OT,
        filed(dotted("diffusion_model.", LDM[kind]), maker=lycoris("LohaModule")),
    )
add(
    "dora",
    "onetrainer diffusers",
    "linear",
    OT,
    filed(
        dotted("unet.", SD["linear"]),
        maker=dora(AB, ".lora_magnitude_vector.weight", out=True, flat=True),
    ),
    what="per output",
)
for prefix, dialect in (("diffusion_model.", "onetrainer comfy"), ("", "onetrainer original")):
    place = at("flux", f"{prefix}single_blocks.1.linear1", *LINEAR1)
    for what, out in (("per input", False), ("per output", True)):
        add(
            "dora",
            dialect,
            "fused",
            OT,
            filed(place, maker=dora(AB_ALPHA, ".dora_scale", out=out)),
            what=what,
        )
    add("loha", dialect, "fused", OT, filed(place, maker=lycoris("LohaModule")))
add(
    "dora",
    "ai-toolkit",
    "linear",
    "ai-toolkit",
    filed(FLUX_Q, maker=dora(AB, ".magnitude", out=True, flat=True)),
)
add("lokr", "ai-toolkit", "linear", "ai-toolkit", filed(FLUX_Q, maker=pieces.kron()))
add(
    "lokr",
    "ai-toolkit",
    "linear",
    "ai-toolkit",
    filed(FLUX_Q, maker=pieces.kron(whole=True)),
    what="both halves whole, with an alpha",
)
add(
    "lokr",
    "lycoris",
    "linear",
    "ai-toolkit",
    filed(at("flux", "lycoris_transformer_blocks_1_attn_to_q", IMAGE_QKV[0]), maker=pieces.kron()),
    what="ai-toolkit's old form",
)
add(
    "full",
    "ai-toolkit",
    "norm",
    "ai-toolkit",
    filed(
        at("wan", "diffusion_model.blocks.1.norm3", "transformer.blocks.1.norm2"),
        maker=pieces.difference(".diff", ".diff_b"),
    ),
    what="Wan",
)
add(
    "full",
    "ai-toolkit",
    "linear",
    "ai-toolkit",
    filed(
        at("flux", "transformer.x_embedder", "transformer.x_embedder"),
        maker=pieces.difference(".diff"),
    ),
)
add(
    "lora bias",
    "ai-toolkit",
    "linear",
    "ai-toolkit",
    filed(FLUX_Q, maker=lora(AB, bias=".lora_B.bias")),
)

# ---------------------------------------------------------------- ComfyUI's whole changes

for kind in WEIGHTS:
    place = dotted("diffusion_model.", LDM[kind])
    add("full", "comfyui", kind, "ComfyUI", filed(place, maker=pieces.difference(".diff")))
    add(
        "ln-tuning",
        "comfyui",
        kind,
        "ComfyUI",
        filed(place, maker=pieces.new_value(".set_weight")),
        what="set_weight",
    )
add(
    "full",
    "comfyui",
    "norm",
    "ComfyUI",
    filed(dotted("diffusion_model.", LDM["norm"]), maker=pieces.difference(".diff", ".diff_b")),
)
add(
    "full",
    "comfyui",
    "bias",
    "ComfyUI",
    filed(dotted("diffusion_model.", LDM["bias"]), maker=pieces.difference(None, ".diff_b")),
)
add(
    "full",
    "comfyui",
    "fused",
    "ComfyUI",
    filed(
        at("flux", "diffusion_model.double_blocks.1.img_attn.qkv", *IMAGE_QKV),
        maker=pieces.difference(".diff", ".diff_b"),
    ),
)
add(
    "dora",
    "comfyui",
    "fused",
    "ComfyUI",
    filed(
        at("flux", "diffusion_model.double_blocks.1.img_attn.qkv", *IMAGE_QKV),
        maker=dora(AB_ALPHA, ".dora_scale", out=True),
    ),
)
add(
    "lora bias",
    "comfyui",
    "linear",
    "ComfyUI",
    filed(WAN_Q, maker=lora(AB, bias=".diff_b")),
    what="Wan, diff_b beside the factors",
)

# ---------------------------------------------------------------- families with one form

for kind in (*WEIGHTS, "norm"):
    add("svdiff", "svdiff-pytorch", kind, "svdiff-pytorch", filed(SD[kind], maker=pieces.svdiff))
add(
    "foura",
    "regraft",
    "linear",
    "none but ours",
    filed(dotted("unet.", SD["linear"]), maker=pieces.foura),
)
for kind in WEIGHTS:
    add("lora-x", "regraft", kind, "Regraft", filed(dotted("unet.", SD[kind]), maker=pieces.lora_x))
