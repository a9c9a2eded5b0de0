"""The prefixes by which files say which component is meant."""

from __future__ import annotations

import re

#: What a LoRA-X file says of itself in its metadata, under ``regraft.format``.
LORA_X_FORMAT = "lora-x/1"

#: kohya prefix → the components it may mean, most likely first.
KOHYA_PREFIXES: dict[str, tuple[str, ...]] = {
    "lora_unet_": ("unet", "transformer", ""),
    "lora_transformer_": ("transformer", "unet", ""),
    "lora_prior_unet_": ("prior", "unet"),
    "lora_prior_te_": ("prior_text_encoder", "text_encoder"),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    # SD3's T5 is its third encoder, Flux's its second; trainers call both te3.
    "lora_te3_": ("text_encoder_3", "text_encoder_2", "text_encoder"),
    "lora_te_": ("text_encoder",),
    "lycoris_": ("unet", "transformer", ""),
    "oft_unet_": ("unet", "transformer", ""),
}
_T5 = ("text_encoder_3", "text_encoder_2", "text_encoder")
# HunyuanVideo's CLIP is its second encoder.
_CLIP_L, _CLIP_G = ("text_encoder", "text_encoder_2"), ("text_encoder_2",)
#: The same for dotted names.
DOTTED_PREFIXES: dict[str, tuple[str, ...]] = {
    "model.diffusion_model.": ("unet", "transformer", ""),
    "diffusion_model.": ("unet", "transformer", ""),
    "transformer.": ("transformer",),
    "transformer_2.": ("transformer_2",),
    "unet.": ("unet",),
    "prior.": ("prior",),
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",),
    # ComfyUI's names of the encoders; "model" inside is left out or not.
    "text_encoders.clip_l.transformer.": _CLIP_L,
    "text_encoders.clip_l.": _CLIP_L,
    "text_encoders.clip_g.transformer.": _CLIP_G,
    "text_encoders.clip_g.": _CLIP_G,
    "text_encoders.t5xxl.transformer.": _T5,
    "text_encoders.t5xxl.": _T5,
    # OMI's.
    "clip_l.": _CLIP_L,
    "clip_g.": _CLIP_G,
    "t5.": _T5,
}
#: Any other encoder under ComfyUI's names: ``text_encoders.qwen25_7b.transformer.``.
_ENCODER = re.compile(r"text_encoders\.\w+\.(?:transformer\.)?")
Split = tuple[str, tuple[str, ...], str]


def split_kohya(name: str) -> Split | None:
    """(prefix, components it may mean, flattened module name) of a kohya module name."""
    if "." in name:
        return None
    for prefix, components in KOHYA_PREFIXES.items():
        if name.startswith(prefix):
            return prefix, components, name.removeprefix(prefix)
    return None


def split_dotted(name: str) -> Split | None:
    """(prefix, components it may mean, module name) of a dotted name with a component in front."""
    for prefix, components in DOTTED_PREFIXES.items():
        if name.startswith(prefix):
            return prefix, components, name.removeprefix(prefix)
    if match := _ENCODER.match(name):
        return match[0], ("text_encoder", "text_encoder_2", "text_encoder_3"), name[match.end() :]
    return None


def flatten(module: str) -> str:
    """kohya's way to write a module name: every dot becomes an underscore (not reversible)."""
    return module.replace(".", "_")
