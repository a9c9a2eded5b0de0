"""Denoising loss for the embedded pair, and adapters through diffusers' own loader.

Sampling and the rest of the flow: :mod:`regraft.running.emoji`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from regraft.running import Pictures, default_timesteps, denoising_losses
from regraft.running.emoji import (
    Emoji,
    EmojiPipeline,
    encode,
    noise_for,
    sample,
    to_images,
    to_model,
    velocity,
)

ADAPTER_NAME = "regraft"


def denoising_loss(
    pipeline: EmojiPipeline,
    images: np.ndarray,
    captions: Sequence[str],
    *,
    seed: int = 0,
    timesteps: Sequence[float] | int = 8,
    batch: int = 64,
) -> float:
    """Mean squared velocity error of ``images`` (uint8 ``[n, 32, 32, 3]``) given ``captions``.

    The mean of :func:`regraft.running.denoising_losses`.
    """
    model = Emoji("pipeline", pipeline, pipeline.unet.device)
    pictures = Pictures(images, captions)
    losses = denoising_losses(model, pictures, seed=seed, timesteps=timesteps, batch=batch)
    return float(losses.mean())


def attach(pipeline: EmojiPipeline, lora_file: str | Path, strength: float = 1.0) -> EmojiPipeline:
    """Load a LoRA file into the U-Net with diffusers' own loader, in place; returns the pipeline.

    Any adapter attached before is removed first. ``strength`` multiplies alpha / rank.
    """
    detach(pipeline)
    path = Path(lora_file)
    pipeline.unet.load_lora_adapter(
        str(path.parent),
        weight_name=path.name,
        prefix=None,
        adapter_name=ADAPTER_NAME,
        use_safetensors=True,
    )
    pipeline.unet.set_adapters([ADAPTER_NAME], weights=[strength])
    return pipeline


def detach(pipeline: EmojiPipeline) -> EmojiPipeline:
    """Remove any attached adapter, in place; returns the pipeline."""
    attached = getattr(pipeline.unet, "peft_config", None)
    if attached:
        pipeline.unet.delete_adapters(list(attached))
    return pipeline


__all__ = [
    "attach",
    "default_timesteps",
    "denoising_loss",
    "detach",
    "encode",
    "noise_for",
    "sample",
    "to_images",
    "to_model",
    "velocity",
]
