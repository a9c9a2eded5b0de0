"""LoRA as diffusers, ComfyUI, the model makers and OMI write it."""

from __future__ import annotations

from tests.wild import pieces
from tests.wild.case import Case, add_to
from tests.wild.made import diffusers, filed
from tests.wild.pieces import (
    AB,
    BARE,
    DOWN_UP,
    OLD,
    OLD_ENCODER,
    PLAIN,
    lora,
)
from tests.wild.places import (
    CLIP,
    CLIP_G,
    DOUBLE,
    IMAGE_QKV,
    LDM,
    LINEAR1,
    NATIVE,
    SD,
    SINGLE,
    T5,
    T5_SD3,
    TEXT,
    TEXT_QKV,
    WEIGHTS,
    Q,
    at,
    dotted,
)

CASES: list[Case] = []
add = add_to(CASES)

# diffusers.
ATTENTION = "attn1.to_q"
for kind, target in (
    ("linear", Q),
    ("1×1 conv", SD["1×1 conv"].name),
    ("3×3 conv", SD["3×3 conv"].name),
):
    add(
        "lora",
        "diffusers",
        kind,
        "diffusers",
        diffusers("sd", "StableDiffusionPipeline", "unet", target),
        what="SD",
    )
    add(
        "rslora",
        "diffusers",
        kind,
        "diffusers",
        diffusers("sd", "StableDiffusionPipeline", "unet", target, use_rslora=True),
    )
add(
    "lora",
    "diffusers",
    "linear",
    "diffusers",
    diffusers("flux", "FluxPipeline", "transformer", "single_transformer_blocks.1.attn.to_q"),
    what="Flux",
)
add(
    "lora",
    "diffusers",
    "linear",
    "diffusers",
    diffusers("wan", "WanPipeline", "transformer", "blocks.1.attn2.to_k"),
    what="Wan",
)
add(
    "lora bias",
    "diffusers",
    "linear",
    "diffusers",
    filed(
        at("flux", "transformer.transformer_blocks.1.attn.to_q", IMAGE_QKV[0]),
        maker=lora(AB, bias=".lora_B.bias"),
    ),
)
add(
    "dora",
    "diffusers",
    "linear",
    "diffusers",
    diffusers("sd", "StableDiffusionPipeline", "unet", Q, use_dora=True),
)
add(
    "dora",
    "diffusers",
    "3×3 conv",
    "diffusers",
    diffusers("sd", "StableDiffusionPipeline", "unet", SD["3×3 conv"].name, use_dora=True),
)

# diffusers, old forms.
PROCESSOR = Q.replace("to_q", "processor.to_q")
add(
    "lora",
    "diffusers old",
    "linear",
    "diffusers before 0.22",
    filed(at("sd", f"unet.{PROCESSOR}", f"unet.{Q}"), maker=lora(OLD)),
    what="processor",
)
add(
    "lora",
    "diffusers old",
    "linear",
    "diffusers before 0.22",
    filed(
        at("sd", PROCESSOR.replace("to_q", "to_out"), f"unet.{Q.replace('to_q', 'to_out.0')}"),
        maker=lora(OLD),
    ),
    what="processor, output",
)
add(
    "lora",
    "diffusers old",
    "linear",
    "diffusers before 0.22",
    filed(
        at("sd", "text_encoder.text_model.encoder.layers.0.self_attn.to_q", CLIP.sites[0]),
        maker=lora(OLD),
    ),
    what="CLIP, attention",
)
add(
    "lora",
    "diffusers old",
    "linear",
    "diffusers before 0.22",
    filed(dotted("text_encoder.", CLIP), maker=lora(OLD_ENCODER)),
    what="CLIP",
)
for kind in WEIGHTS:
    add(
        "lora",
        "diffusers old",
        kind,
        "diffusers before 0.26",
        filed(dotted("unet.", SD[kind]), maker=lora(DOWN_UP)),
    )

# ComfyUI.
for what, kind, place in NATIVE:
    add(
        "lora",
        "comfyui",
        kind,
        "ComfyUI",
        filed(dotted("diffusion_model.", place), maker=lora(AB)),
        what=what,
    )
for what, name, sites in (
    ("HunyuanVideo qkv", "double_blocks.1.img_attn.qkv", IMAGE_QKV),
    ("HunyuanVideo mlp", "double_blocks.1.img_mlp.0", (f"{DOUBLE}.ff.net.0.proj",)),
    ("HunyuanVideo modulation", "single_blocks.1.modulation.lin", (f"{SINGLE}.norm.linear",)),
):
    add(
        "lora",
        "comfyui",
        "fused" if len(sites) > 1 else "linear",
        "ComfyUI",
        filed(at("hunyuan-video", f"diffusion_model.{name}", *sites), maker=lora(AB)),
        what=f"{what}, ComfyUI's names",
    )
for kind in WEIGHTS:
    add(
        "lora",
        "comfyui",
        kind,
        "ComfyUI",
        filed(dotted("diffusion_model.", LDM[kind]), maker=lora()),
        what="SDXL",
    )
for what, name, place in (
    ("CLIP L", "text_encoders.clip_l.transformer.", at("xl", TEXT, f"text_encoder.{TEXT}")),
    ("CLIP G", "text_encoders.clip_g.transformer.", CLIP_G),
    ("T5", "text_encoders.t5xxl.transformer.", T5_SD3),
):
    add("lora", "comfyui", "linear", "ComfyUI", filed(dotted(name, place), maker=lora()), what=what)
add(
    "lora",
    "comfyui",
    "linear",
    "ComfyUI",
    filed(at("mochi", "blocks.1.attn.proj_x", f"{DOUBLE}.attn1.to_out.0"), maker=lora(BARE)),
    what="Mochi",
)

# The original ("native") names of Black Forest Labs, fal and XLabs.
for what, kind, place in NATIVE:
    if place.world == "flux":
        add("lora", "bfl", kind, "Black Forest Labs", filed(place, maker=lora(AB)), what=what)
        add(
            "lora",
            "fal",
            kind,
            "fal",
            filed(dotted("base_model.model.", place), maker=lora(AB)),
            what=what,
        )
add(
    "lora bias",
    "bfl",
    "fused",
    "Black Forest Labs",
    filed(
        at("flux", "double_blocks.1.img_attn.qkv", *IMAGE_QKV), maker=lora(AB, bias=".lora_B.bias")
    ),
    what="control LoRA",
)
add(
    "whole",
    "bfl",
    "norm",
    "Black Forest Labs",
    filed(
        at("flux", "double_blocks.1.img_attn.norm.query_norm", f"{DOUBLE}.attn.norm_q"),
        maker=pieces.new_value(".scale"),
    ),
    what="control LoRA",
)
for what, name, sites in (
    ("qkv", "double_blocks.1.processor.qkv_lora1", IMAGE_QKV),
    ("text qkv", "double_blocks.1.processor.qkv_lora2", TEXT_QKV),
    ("single qkv", "single_blocks.1.processor.qkv_lora", LINEAR1[:3]),
    ("out", "double_blocks.1.processor.proj_lora1", (f"{DOUBLE}.attn.to_out.0",)),
    ("text out", "double_blocks.1.processor.proj_lora2", (f"{DOUBLE}.attn.to_add_out",)),
    ("single out", "single_blocks.1.processor.proj_lora", (f"{SINGLE}.proj_out",)),
):
    add(
        "lora",
        "xlabs",
        "fused" if len(sites) > 1 else "linear",
        "x-flux",
        filed(at("flux", name, *sites), maker=lora(PLAIN)),
        what=what,
    )

# OMI numbers the parts of fused layers.
for what, name, site in (
    ("Flux", "transformer.double_blocks.1.img_attn.qkv.1", IMAGE_QKV[1]),
    ("Flux single", "transformer.single_blocks.1.linear1.3", LINEAR1[3]),
    ("Flux's T5", f"t5.{T5}", f"text_encoder_2.{T5}"),
):
    add("lora", "omi", "linear", "OMI", filed(at("flux", name, site), maker=lora()), what=what)
for kind in WEIGHTS:
    add("lora", "omi", kind, "OMI", filed(dotted("unet.", LDM[kind]), maker=lora()), what="SDXL")
