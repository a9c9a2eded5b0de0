"""The small text-to-image bases made for this project: pixels, no VAE, rectified flow.

A folder in diffusers' layout with ``unet``, ``text_encoder`` and ``tokenizer``; its
``model_index.json`` names the class ``RegraftEmojiPipeline``. The embedded pair and the lab's bases
are of this kind.

Rectified flow (Liu et al. 2022, arXiv:2209.03003): ``x_t = (1 - t) x_0 + t e`` with noise ``e``,
and the U-Net predicts the velocity ``e - x_0``; ``t`` in [0, 1] goes to the U-Net as ``1000 t``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from regraft.parallel import single_threaded
from regraft.running.model import Condition, Diffusion, Pictures, fixed_noise, optional
from regraft.running.quantised import settle

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

#: ``_class_name`` in such a base's ``model_index.json``.
CLASS_NAME = "RegraftEmojiPipeline"
SIZE = 32  # pixels a side
FOLD = 2  # space-to-depth: [3, 32, 32] <-> [12, 16, 16], four times fewer positions to compute
TIME_SCALE = 1000.0  # the U-Net's sinusoidal embedding expects diffusion-style step numbers


@dataclass
class EmojiPipeline:
    """A small text-to-image base, weights in float32.

    The U-Net works on 32x32 RGB images folded 2x2 into ``[12, 16, 16]``; its condition is the
    text encoder's last hidden state ``[8, hidden]``.
    """

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: Any


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """None of transformers' and diffusers' while a base loads; the user's setting is put back."""
    names = ("transformers.utils.logging", "diffusers.utils.logging")
    imported = [sys.modules[name] for name in names if name in sys.modules]
    shown = [module for module in imported if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()


def convert(module: Any, dtype: torch.dtype) -> None:
    """Convert a model of diffusers or transformers in place.

    The argument that converts while loading is called differently across diffusers' versions, and
    its ``to`` warns even of an empty list of modules to keep in float32; a list with something in
    it is still warned of.
    """
    if module.dtype != dtype:
        keeps = getattr(module, "_keep_in_fp32_modules", None)
        (module.to if keeps else partial(nn.Module.to, module))(dtype)


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> EmojiPipeline:
    """Load a base from its folder (usually stored in float16), its weights converted to ``dtype``.

    Raises
    ------
    MissingDependency
        Without diffusers and transformers.
    OSError, ValueError
        From those libraries, when the folder is not whole.
    """
    with optional("Running a base"):
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, PreTrainedTokenizerFast

    folder = Path(folder)
    unet = UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", low_cpu_mem_usage=False, use_safetensors=True
    )
    with no_progress_bars():
        text_encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder", dtype=dtype, use_safetensors=True
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    convert(unet, dtype)
    settle(unet)
    return EmojiPipeline(unet.eval(), text_encoder.eval(), tokenizer)


def to_model(images: np.ndarray | Tensor) -> Float[Tensor, "n 12 16 16"]:
    """uint8 ``[n, 32, 32, 3]`` -> float32 ``[n, 12, 16, 16]`` in [-1, 1]."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    folded: Tensor = functional.pixel_unshuffle(pixels, FOLD)
    return folded


def to_images(latents: Float[Tensor, "n 12 16 16"]) -> UInt8[np.ndarray, "n 32 32 3"]:
    """float ``[n, 12, 16, 16]`` in [-1, 1] -> uint8 ``[n, 32, 32, 3]``."""
    pixels = functional.pixel_shuffle(latents.float(), FOLD).clamp(-1.0, 1.0)
    return ((pixels + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def encode(pipeline: EmojiPipeline, captions: Sequence[str]) -> Float[Tensor, "n 8 hidden"]:
    """Captions -> condition ``[n, 8, hidden]``; the empty caption is the unconditional one."""
    tokens = pipeline.tokenizer(
        list(captions), padding="max_length", truncation=True, return_tensors="pt"
    )
    ids = tokens["input_ids"].to(pipeline.text_encoder.device)
    hidden: Tensor = pipeline.text_encoder(input_ids=ids).last_hidden_state
    return hidden


def noise_for(seeds: Sequence[int]) -> Float[Tensor, "n 12 16 16"]:
    """Standard normal noise ``[n, 12, 16, 16]``, row i depending on ``seeds[i]`` only."""
    return fixed_noise(seeds, (3 * FOLD * FOLD, SIZE // FOLD, SIZE // FOLD))


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
) -> UInt8[np.ndarray, "n 32 32 3"]:
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
    device = pipeline.unet.device
    condition = torch.cat([encode(pipeline, captions), encode(pipeline, [""] * n)])

    def guided(x: Tensor, t: float) -> Tensor:
        if guidance == 1.0:
            return velocity(pipeline, x, torch.full((n,), t, device=device), condition[:n])
        times = torch.full((2 * n,), t, device=device)
        with_caption, without = velocity(pipeline, torch.cat([x, x]), times, condition).chunk(2)
        return without + guidance * (with_caption - without)

    x = noise_for(row_seeds).to(device)
    times = torch.linspace(1.0, 0.0, steps + 1).tolist()
    for now, after in pairwise(times):
        slope = guided(x, now)
        ahead = x + (after - now) * slope
        if after > 0.0:  # a plain Euler step at the end: the slope at t=0 is not trained for
            slope = (slope + guided(ahead, after)) / 2
            ahead = x + (after - now) * slope
        x = ahead
    return to_images(x)


class Emoji(Diffusion):
    """A small text-to-image base that runs."""

    size = SIZE
    batch = 64
    small = True

    def __init__(self, ref: str, pipeline: EmojiPipeline, device: torch.device) -> None:
        modules = {"unet": pipeline.unet.to(device), "text_encoder": pipeline.text_encoder}
        pipeline.text_encoder.to(device)
        super().__init__(ref, modules, device)
        self.pipeline = pipeline

    def clean(self, pictures: Pictures) -> Tensor:
        return to_model(pictures.images)

    def condition(self, captions: Sequence[str]) -> Condition:
        return {"hidden": encode(self.pipeline, captions)}

    def noisy(self, x0: Tensor, noise: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return (1 - t) * x0 + t * noise, noise - x0

    def predict(self, x: Tensor, t: float, condition: Condition) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        return velocity(self.pipeline, x, times, condition["hidden"])

    def sample(self, captions: Sequence[str], seeds: Sequence[int] | int = 0) -> np.ndarray:
        return sample(self.pipeline, captions, seeds)
