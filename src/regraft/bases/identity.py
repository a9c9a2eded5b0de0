"""What a base is, read off its shapes: the names that users' tools expect in metadata."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.bases.base import Base


@dataclass(frozen=True)
class Architecture:
    """``modelspec`` is the ModelSpec architecture without "/lora"; ``kohya`` is kohya's
    ``ss_base_model_version``."""

    label: str
    modelspec: str
    kohya: str


_BY_CONTEXT = {
    768: Architecture("Stable Diffusion 1.x", "stable-diffusion-v1", "sd_v1"),
    1024: Architecture("Stable Diffusion 2.x", "stable-diffusion-v2-512", "sd_v2"),
    2048: Architecture("Stable Diffusion XL", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}


def architecture(base: Base) -> Architecture | None:
    """The known architecture with these shapes, or None.

    Read off the U-Net's first convolution (320 channels) and the width of its text condition.
    """
    first = next((w for s, w in base.weights.items() if s.module == "conv_in"), None)
    if first is None or first.shape[0] != 320:
        return None
    for site, weight in base.weights.items():
        if site.component == "unet" and site.module.endswith(".attn2.to_k"):
            return _BY_CONTEXT.get(weight.shape[1])
    return None
