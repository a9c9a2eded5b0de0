"""Deterministic sampling and denoising loss for the embedded pair.

Rectified flow (Liu et al. 2022, arXiv:2209.03003): ``x_t = (1 - t) x_0 + t e`` with noise ``e``,
and the U-Net predicts the velocity ``e - x_0``; ``t`` in [0, 1] goes to the U-Net as ``1000 t``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from regraft.demo.pair import EmojiPipeline
from regraft.parallel import single_threaded

FOLD = 2  # space-to-depth: [3, 32, 32] <-> [12, 16, 16], four times fewer positions to compute
TIME_SCALE = 1000.0  # the U-Net's sinusoidal embedding expects diffusion-style step numbers
ADAPTER_NAME = "regraft"


def to_model(images: np.ndarray | Tensor) -> Tensor:
    """uint8 ``[n, 32, 32, 3]`` -> float32 ``[n, 12, 16, 16]`` in [-1, 1]."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    folded: Tensor = functional.pixel_unshuffle(pixels, FOLD)
    return folded


def to_images(latents: Tensor) -> np.ndarray:
    """float ``[n, 12, 16, 16]`` in [-1, 1] -> uint8 ``[n, 32, 32, 3]``."""
    pixels = functional.pixel_shuffle(latents.float(), FOLD).clamp(-1.0, 1.0)
    return ((pixels + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def encode(pipeline: EmojiPipeline, captions: Sequence[str]) -> Tensor:
    """Captions -> condition ``[n, 8, hidden]``; the empty caption is the unconditional one."""
    tokens = pipeline.tokenizer(
        list(captions), padding="max_length", truncation=True, return_tensors="pt"
    )
    hidden: Tensor = pipeline.text_encoder(input_ids=tokens["input_ids"]).last_hidden_state
    return hidden


def noise_for(seeds: Sequence[int]) -> Tensor:
    """Standard normal noise ``[n, 12, 16, 16]``, row i depending on ``seeds[i]`` only."""
    shape = (3 * FOLD * FOLD, 32 // FOLD, 32 // FOLD)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows)


def velocity(pipeline: EmojiPipeline, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """Predicted velocity, shape of ``x``, at times ``t`` (``[n]`` in [0, 1])."""
    predicted: Tensor = pipeline.unet(x, t * TIME_SCALE, condition, return_dict=False)[0]
    return predicted


@single_threaded()
@torch.no_grad()
def sample(
    pipeline: EmojiPipeline,
    captions: Sequence[str],
    seeds: Sequence[int] | int = 0,
    *,
    steps: int = 12,
    guidance: float = 2.0,
) -> np.ndarray:
    """Draw one image per caption: uint8 ``[n, 32, 32, 3]``.

    Heun's second-order method on a uniform grid from noise (t=1) to image (t=0), with
    classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598). The same captions and seeds
    give the same images. ``seeds``: one per caption, or one for all.
    """
    n = len(captions)
    row_seeds = [seeds] * n if isinstance(seeds, int) else list(seeds)
    if len(row_seeds) != n:
        raise ValueError(f"{n} captions but {len(row_seeds)} seeds")
    pipeline.unet.eval()
    condition = torch.cat([encode(pipeline, captions), encode(pipeline, [""] * n)])

    def guided(x: Tensor, t: float) -> Tensor:
        if guidance == 1.0:
            return velocity(pipeline, x, torch.full((n,), t), condition[:n])
        both = velocity(pipeline, torch.cat([x, x]), torch.full((2 * n,), t), condition)
        with_caption, without = both.chunk(2)
        return without + guidance * (with_caption - without)

    x = noise_for(row_seeds)
    times = torch.linspace(1.0, 0.0, steps + 1).tolist()
    for now, after in pairwise(times):
        slope = guided(x, now)
        ahead = x + (after - now) * slope
        if after > 0.0:  # a plain Euler step at the end: the slope at t=0 is not trained for
            slope = (slope + guided(ahead, after)) / 2
            ahead = x + (after - now) * slope
        x = ahead
    return to_images(x)


def default_timesteps(count: int = 8) -> list[float]:
    """Midpoints of ``count`` equal parts of [0, 1]."""
    return [(i + 0.5) / count for i in range(count)]


@single_threaded()
@torch.no_grad()
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

    Fixed noise per image and a fixed grid of t, so two adapters are compared on the very same
    terms: the difference has far less variance than with random draws.
    """
    times = default_timesteps(timesteps) if isinstance(timesteps, int) else list(timesteps)
    clean = to_model(images)
    noise = noise_for([seed * 100_003 + i for i in range(len(clean))])
    condition = encode(pipeline, captions)
    pipeline.unet.eval()
    total = 0.0
    for t in times:
        for low in range(0, len(clean), batch):
            x0, e = clean[low : low + batch], noise[low : low + batch]
            moment = torch.full((len(x0),), t)
            guess = velocity(pipeline, (1 - t) * x0 + t * e, moment, condition[low : low + batch])
            total += float((guess - (e - x0)).pow(2).mean()) * len(x0)
    return total / (len(times) * len(clean))


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
