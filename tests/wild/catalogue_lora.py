"""LoRA as the trainers write it."""

from __future__ import annotations

from tests.wild.case import Case, add_to
from tests.wild.made import filed
from tests.wild.pieces import (
    AB,
    AB_ALPHA,
    lora,
    lycoris,
)
from tests.wild.places import (
    CLIP,
    CLIP_FLUX,
    CLIP_G,
    IMAGE_QKV,
    LDM,
    LINEAR1,
    NATIVE,
    OT,
    SD,
    SINGLE,
    SPLIT,
    T5,
    T5_FLUX,
    T5_SD3,
    WAN_Q,
    WEIGHTS,
    at,
    dotted,
    flat,
)

CASES: list[Case] = []
add = add_to(CASES)

# ---------------------------------------------------------------- LoRA, every dialect

for kind in WEIGHTS:
    add(
        "lora",
        "kohya",
        kind,
        "sd-scripts",
        filed(flat("lora_unet_", SD[kind]), maker=lora()),
        what="SD",
    )
    add(
        "lora",
        "kohya",
        kind,
        "sd-scripts",
        filed(flat("lora_unet_", LDM[kind]), maker=lora()),
        what="SDXL",
    )
add(
    "lora",
    "kohya",
    "linear",
    "sd-scripts",
    filed(flat("lora_te_", CLIP), maker=lora()),
    what="CLIP",
)
add(
    "lora",
    "kohya",
    "linear",
    "sd-scripts",
    filed(flat("lora_te2_", CLIP_G), maker=lora()),
    what="SDXL's second CLIP",
)
add(
    "lora",
    "kohya",
    "linear",
    "sd-scripts",
    filed(flat("lora_te1_", CLIP_FLUX), maker=lora()),
    what="Flux's CLIP",
)
add(
    "lora",
    "kohya",
    "linear",
    "sd-scripts",
    filed(flat("lora_te3_", T5_FLUX), maker=lora()),
    what="Flux's T5",
)
add(
    "lora",
    "kohya",
    "linear",
    "sd-scripts",
    filed(flat("lora_te3_", T5_SD3), maker=lora()),
    what="SD3's T5",
)
add(
    "lora",
    "kohya",
    "linear",
    "sd-scripts",
    filed(
        flat("lora_unet_", SD["linear"]), maker=lora((".lora_down.weight", ".lora_up.weight", None))
    ),
    what="without alpha",
)
for what, kind, place in NATIVE:
    writer = (
        "sd-scripts" if place.world in ("flux", "sd3", "chroma", "lumina-2") else "musubi-tuner"
    )
    add("lora", "kohya", kind, writer, filed(flat("lora_unet_", place), maker=lora()), what=what)
for what, kind, place in SPLIT:
    add(
        "lora",
        "kohya",
        kind,
        "musubi-tuner",
        filed(flat("lora_unet_", place), maker=lora()),
        what=f"{what}, diffusers' names",
    )

for kind in WEIGHTS:
    add(
        "lora",
        "lycoris",
        kind,
        "LyCORIS",
        filed(flat("lycoris_", SD[kind]), maker=lycoris("LoConModule")),
    )

# musubi-tuner's convert_lora turns every underscore into a dot and mends some.
add(
    "lora",
    "musubi other",
    "fused",
    "musubi-tuner",
    filed(
        at("hunyuan-video", "diffusion_model.double_blocks.1.img_attn_qkv", *IMAGE_QKV),
        maker=lora(AB),
    ),
    what="HunyuanVideo",
)
add(
    "lora",
    "musubi other",
    "linear",
    "musubi-tuner",
    filed(
        at("wan", "diffusion_model.blocks.1.cross_attn.o", "transformer.blocks.1.attn2.to_out.0"),
        maker=lora(AB),
    ),
    what="Wan",
)
add(
    "lora",
    "musubi other",
    "linear",
    "musubi-tuner",
    filed(
        at(
            "hunyuan-video",
            "diffusion_model.single_blocks.1.modulation.linear",
            f"{SINGLE}.norm.linear",
        ),
        maker=lora(AB),
    ),
    what="HunyuanVideo modulation",
)
add(
    "lora",
    "musubi other",
    "linear",
    "musubi-tuner",
    filed(
        at(
            "hunyuan-video",
            "diffusion_model.txt.in.c.embedder.linear.1",
            "transformer.context_embedder.time_text_embed.text_embedder.linear_1",
        ),
        maker=lora(AB),
    ),
    what="a name it cannot mend",
)

# OneTrainer's five.
for kind in WEIGHTS:
    add("lora", "onetrainer legacy", kind, OT, filed(flat("lora_unet_", SD[kind]), maker=lora()))
    add("lora", "onetrainer kohya", kind, OT, filed(flat("lora_unet_", LDM[kind]), maker=lora()))
    add("lora", "onetrainer diffusers", kind, OT, filed(dotted("unet.", SD[kind]), maker=lora(AB)))
    add("lora", "onetrainer original", kind, OT, filed(LDM[kind], maker=lora(AB_ALPHA)))
    add(
        "lora",
        "onetrainer comfy",
        kind,
        OT,
        filed(dotted("diffusion_model.", LDM[kind]), maker=lora(AB_ALPHA)),
    )
add(
    "lora",
    "onetrainer legacy",
    "linear",
    OT,
    filed(
        at("flux", "lora_transformer_transformer_blocks_1_attn_to_q", IMAGE_QKV[0]), maker=lora()
    ),
    what="Flux",
)
add(
    "lora",
    "onetrainer legacy",
    "linear",
    OT,
    filed(flat("lora_te2_", T5_FLUX), maker=lora()),
    what="Flux's T5",
)
add(
    "lora",
    "onetrainer kohya",
    "fused",
    OT,
    filed(at("flux", "lora_unet_double_blocks_1_img_attn_qkv", *IMAGE_QKV), maker=lora()),
)
add(
    "lora",
    "onetrainer original",
    "fused",
    OT,
    filed(at("flux", "single_blocks.1.linear1", *LINEAR1), maker=lora(AB_ALPHA)),
)
add(
    "lora",
    "onetrainer comfy",
    "fused",
    OT,
    filed(at("flux", "diffusion_model.single_blocks.1.linear1", *LINEAR1), maker=lora(AB_ALPHA)),
)
add(
    "lora",
    "onetrainer comfy",
    "linear",
    OT,
    filed(
        at("flux", f"text_encoders.t5xxl.transformer.{T5}", f"text_encoder_2.{T5}"),
        maker=lora(AB_ALPHA),
    ),
    what="Flux's T5",
)

# ai-toolkit.
for what, kind, place in SPLIT:
    prefix = "transformer." if place.world in ("flux", "sd3") else "diffusion_model."
    if place.world != "wan":
        add(
            "lora",
            "ai-toolkit",
            kind,
            "ai-toolkit",
            filed(dotted(prefix, place), maker=lora(AB)),
            what=what,
        )
for kind in WEIGHTS:
    add(
        "lora",
        "ai-toolkit",
        kind,
        "ai-toolkit",
        filed(flat("lora_unet_", LDM[kind]), maker=lora()),
        what="SDXL",
    )
add("lora", "ai-toolkit", "linear", "ai-toolkit", filed(WAN_Q, maker=lora(AB)), what="Wan")
