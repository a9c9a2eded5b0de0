"""The two sizes of the measurement. No heavy imports: the parent process must stay small."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: What both sizes share with Stable Diffusion XL's U-Net.
_COMMON: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}

#: The configuration that the SDXL base model is published with.
_SDXL: dict[str, Any] = {
    **_COMMON,
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
}

_SMALL: dict[str, Any] = {
    **_COMMON,
    "sample_size": 32,
    "block_out_channels": (64, 128, 256),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 8),
    "cross_attention_dim": 512,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Scale:
    """One size.

    Attributes
    ----------
    rank, alpha : int
        Of the LoRA.
    dimension : int
        Of the singular subspaces (LoRA-X's paper: 320).
    rounds : int
        Interleaved repetitions of the warm measurements.
    sample : int
        Weights per distinct shape in the comparison with the full SVD.
    """

    name: str
    unet: dict[str, Any] = field(repr=False)
    rank: int
    alpha: int
    dimension: int
    rounds: int
    sample: int


SCALES = {
    "full": Scale("full", _SDXL, rank=32, alpha=16, dimension=320, rounds=5, sample=2),
    "small": Scale("small", _SMALL, rank=8, alpha=4, dimension=48, rounds=5, sample=2),
}
