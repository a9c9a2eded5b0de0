"""Every case: who writes which family in which dialect, on which kind of layer."""

from __future__ import annotations

from typing import Any

from tests.wild import catalogue_peft, pieces
from tests.wild.case import Case
from tests.wild.made import diffusers, filed
from tests.wild.pieces import (
    AB,
    AB_ALPHA,
    BARE,
    DOWN_UP,
    KOHYA,
    OLD,
    OLD_ENCODER,
    PLAIN,
    Maker,
    dora,
    lora,
    lycoris,
)
from tests.wild.places import (
    DOUBLE,
    IMAGE_QKV,
    LDM,
    LINEAR1,
    NATIVE,
    SD,
    SINGLE,
    SPLIT,
    T5,
    TEXT,
    TEXT_QKV,
    Place,
    Q,
    at,
)

CASES: list[Case] = []


def add(
    family: str,
    dialect: str,
    layer: str,
    writer: str,
    make: Any,
    outcome: str = "exact",
    what: str = "",
) -> None:
    CASES.append(Case(family, dialect, layer, writer, make, outcome, what))


def flat(prefix: str, place: Place) -> Place:
    return place.named(prefix + place.name.replace(".", "_"))


def dotted(prefix: str, place: Place) -> Place:
    return place.named(prefix + place.name)


WEIGHTS = ("linear", "1×1 conv", "3×3 conv")
CLIP = at("sd", TEXT, f"text_encoder.{TEXT}")
CLIP_G = at("xl", TEXT, f"text_encoder_2.{TEXT}")
T5_FLUX = at("flux", T5, f"text_encoder_2.{T5}")
T5_SD3 = at("sd3", T5, f"text_encoder_3.{T5}")
CLIP_FLUX = at("flux", TEXT, f"text_encoder.{TEXT}")

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
OT = "OneTrainer"
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
WAN_Q = at("wan", "diffusion_model.blocks.1.self_attn.q", "transformer.blocks.1.attn1.to_q")
add("lora", "ai-toolkit", "linear", "ai-toolkit", filed(WAN_Q, maker=lora(AB)), what="Wan")

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
FUSED = at("flux", "lora_unet_double_blocks_1_img_attn_qkv", *IMAGE_QKV)
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
FLUX_Q = at("flux", "transformer.transformer_blocks.1.attn.to_q", IMAGE_QKV[0])
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
CASES += catalogue_peft.CASES
