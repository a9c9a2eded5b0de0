"""Where each dialect's writer puts a layer: its name in the file, and the sites that are meant.

The names are written out, not derived: they are what the writing programs produce, read from their
sources (sd-scripts, musubi-tuner, ai-toolkit, diffusers) or their documentation.
"""

from __future__ import annotations

from dataclasses import dataclass

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT_Q = Q.replace(".", "_")
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
FLAT_TEXT = TEXT.replace(".", "_")
T5 = "encoder.block.0.layer.0.SelfAttention.q"


@dataclass(frozen=True)
class Place:
    """A layer: its base, its name in the file, its sites in the order of the file's rows."""

    world: str
    name: str
    sites: tuple[str, ...]

    def named(self, name: str) -> Place:
        return Place(self.world, name, self.sites)


def at(world: str, name: str, *sites: str) -> Place:
    return Place(world, name, sites)


#: One place for each kind of layer of a U-Net, by its diffusers name.
SD = {
    "linear": at("sd", Q, f"unet.{Q}"),
    "1×1 conv": at("sd", "mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_in"),
    "3×3 conv": at("sd", "mid_block.resnets.0.conv1", "unet.mid_block.resnets.0.conv1"),
    "norm": at("sd", "mid_block.attentions.0.norm", "unet.mid_block.attentions.0.norm"),
    "bias": at("sd", "mid_block.resnets.0.conv1", "unet.mid_block.resnets.0.conv1"),
    "embedding": at(
        "sd",
        "text_model.embeddings.token_embedding",
        "text_encoder.text_model.embeddings.token_embedding",
    ),
}
#: The same of SDXL by its original name.
LDM = {
    "linear": at("xl", "middle_block.1.transformer_blocks.0.attn1.to_q", f"unet.{Q}"),
    "1×1 conv": at(
        "xl", "input_blocks.4.0.skip_connection", "unet.down_blocks.1.resnets.0.conv_shortcut"
    ),
    "3×3 conv": at("xl", "middle_block.0.in_layers.2", "unet.mid_block.resnets.0.conv1"),
    "norm": at("xl", "middle_block.1.norm", "unet.mid_block.attentions.0.norm"),
    "bias": at("xl", "middle_block.0.in_layers.2", "unet.mid_block.resnets.0.conv1"),
}
DOUBLE, SINGLE = "transformer.transformer_blocks.1", "transformer.single_transformer_blocks.1"
IMAGE_QKV = tuple(f"{DOUBLE}.attn.to_{p}" for p in "qkv")
TEXT_QKV = tuple(f"{DOUBLE}.attn.add_{p}_proj" for p in "qkv")
LINEAR1 = (*(f"{SINGLE}.attn.to_{p}" for p in "qkv"), f"{SINGLE}.proj_mlp")
#: Native layers of the transformers, dotted, and what they hold: (what, kind of layer, place).
NATIVE: tuple[tuple[str, str, Place], ...] = (
    ("Flux qkv", "fused", at("flux", "double_blocks.1.img_attn.qkv", *IMAGE_QKV)),
    ("Flux text qkv", "fused", at("flux", "double_blocks.1.txt_attn.qkv", *TEXT_QKV)),
    ("Flux linear1", "fused", at("flux", "single_blocks.1.linear1", *LINEAR1)),
    ("Flux linear2", "linear", at("flux", "single_blocks.1.linear2", f"{SINGLE}.proj_out")),
    ("Flux mlp", "linear", at("flux", "double_blocks.1.img_mlp.0", f"{DOUBLE}.ff.net.0.proj")),
    (
        "Flux modulation",
        "linear",
        at("flux", "double_blocks.1.img_mod.lin", f"{DOUBLE}.norm1.linear"),
    ),
    ("Chroma qkv", "fused", at("chroma", "double_blocks.1.img_attn.qkv", *IMAGE_QKV)),
    ("Chroma linear2", "linear", at("chroma", "single_blocks.1.linear2", f"{SINGLE}.proj_out")),
    ("Flux.2 qkv", "fused", at("flux-2", "double_blocks.1.img_attn.qkv", *IMAGE_QKV)),
    (
        "Flux.2 linear1",
        "linear",
        at("flux-2", "single_blocks.1.linear1", f"{SINGLE}.attn.to_qkv_mlp_proj"),
    ),
    ("SD3 qkv", "fused", at("sd3", "joint_blocks.1.x_block.attn.qkv", *IMAGE_QKV)),
    ("SD3 text qkv", "fused", at("sd3", "joint_blocks.1.context_block.attn.qkv", *TEXT_QKV)),
    (
        "SD3 mlp",
        "linear",
        at("sd3", "joint_blocks.1.x_block.mlp.fc1", f"{DOUBLE}.ff.net.0.proj"),
    ),
    ("HunyuanVideo qkv", "fused", at("hunyuan-video", "double_blocks.1.img_attn_qkv", *IMAGE_QKV)),
    ("HunyuanVideo linear1", "fused", at("hunyuan-video", "single_blocks.1.linear1", *LINEAR1)),
    (
        "HunyuanVideo mlp",
        "linear",
        at("hunyuan-video", "double_blocks.1.img_mlp.fc1", f"{DOUBLE}.ff.net.0.proj"),
    ),
    (
        "Wan self-attention",
        "linear",
        at("wan", "blocks.1.self_attn.q", "transformer.blocks.1.attn1.to_q"),
    ),
    (
        "Wan cross-attention",
        "linear",
        at("wan", "blocks.1.cross_attn.o", "transformer.blocks.1.attn2.to_out.0"),
    ),
    ("Wan ffn", "linear", at("wan", "blocks.1.ffn.0", "transformer.blocks.1.ffn.net.0.proj")),
    (
        "Qwen-Image",
        "linear",
        at("qwen-image", "transformer_blocks.1.attn.add_q_proj", f"{DOUBLE}.attn.add_q_proj"),
    ),
    (
        "Qwen-Image modulation",
        "linear",
        at("qwen-image", "transformer_blocks.1.img_mod.1", f"{DOUBLE}.img_mod.1"),
    ),
    (
        "Z-Image qkv",
        "fused",
        at(
            "z-image",
            "layers.1.attention.qkv",
            *(f"transformer.layers.1.attention.to_{p}" for p in "qkv"),
        ),
    ),
    (
        "Z-Image out",
        "linear",
        at("z-image", "layers.1.attention.out", "transformer.layers.1.attention.to_out.0"),
    ),
    (
        "Lumina 2 qkv",
        "fused",
        at(
            "lumina-2",
            "layers.1.attention.qkv",
            *(f"transformer.layers.1.attn.to_{p}" for p in "qkv"),
        ),
    ),
)
#: diffusers' own names of layers of the transformers.
SPLIT: tuple[tuple[str, str, Place], ...] = tuple(
    (what, "linear", at(world, name, f"transformer.{name}"))
    for what, world, name in (
        ("Flux", "flux", "transformer_blocks.1.attn.to_q"),
        ("Flux single", "flux", "single_transformer_blocks.1.proj_out"),
        ("SD3", "sd3", "transformer_blocks.1.attn.add_k_proj"),
        ("HunyuanVideo", "hunyuan-video", "transformer_blocks.1.attn.to_out.0"),
        ("Wan", "wan", "blocks.1.attn1.to_q"),
        ("Qwen-Image", "qwen-image", "transformer_blocks.1.txt_mlp.net.0.proj"),
        ("Z-Image", "z-image", "layers.1.attention.to_q"),
        ("Flux.2", "flux-2", "transformer_blocks.1.attn.to_q"),
        ("Chroma", "chroma", "transformer_blocks.1.attn.to_q"),
    )
)


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


#: Shared by several writers.
OT = "OneTrainer"
WAN_Q = at("wan", "diffusion_model.blocks.1.self_attn.q", "transformer.blocks.1.attn1.to_q")
FLUX_Q = at("flux", "transformer.transformer_blocks.1.attn.to_q", IMAGE_QKV[0])
FUSED = at("flux", "lora_unet_double_blocks_1_img_attn_qkv", *IMAGE_QKV)
