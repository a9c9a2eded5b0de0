"""The embedded pair: a small text-to-image base, its successor, and style adapters for both.

Everything is in the formats users have: each base is a diffusers-style folder (``unet``,
``text_encoder``, ``tokenizer``), each adapter one ``.safetensors`` file written by diffusers'
own saver. How they were trained: ``lab/README.md`` and ``assets/manifest.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from regraft.demo.captions import DEFAULT_CAPTIONS


def assets_dir() -> Path:
    """The folder with the embedded pair, inside the installed package."""
    return Path(__file__).parent / "assets"


#: Base v1, the one the adapter was trained on.
SOURCE: Path = assets_dir() / "base-v1"
#: Base v2, continued from v1: more subjects, and shading where v1 draws flat colours.
TARGET: Path = assets_dir() / "base-v2"
#: Style LoRA (rank 8, alpha 16) trained on v1.
ADAPTER: Path = assets_dir() / "style-v1.safetensors"
#: The same recipe trained on v2: what a carried adapter is judged against, never an input.
RETRAINED: Path = assets_dir() / "style-v2-retrained.safetensors"
#: Style images of subjects no adapter saw in the style, with captions in the file's metadata.
HELDOUT: Path = assets_dir() / "heldout.safetensors"
#: Hashes, seeds, steps, losses and measured differences.
MANIFEST: Path = assets_dir() / "manifest.json"


@dataclass
class EmojiPipeline:
    """A text-to-image base of the embedded pair, weights in float32 on the CPU.

    The U-Net works on 32x32 RGB images folded 2x2 into ``[12, 16, 16]``; its condition is the
    text encoder's last hidden state ``[8, hidden]``.
    """

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: Any


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A bar for a load of milliseconds is only noise; the user's setting is put back."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_pipeline(folder: str | Path) -> EmojiPipeline:
    """Load a base from a diffusers-style folder (stored in float16, loaded in float32)."""
    folder = Path(folder)
    unet = UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    with _no_progress_bars():
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return EmojiPipeline(unet.eval(), text_encoder.eval(), tokenizer)


def load_heldout(path: str | Path = HELDOUT) -> tuple[np.ndarray, list[str]]:
    """Held-out style images (uint8 ``[n, 32, 32, 3]``) and their captions, same order."""
    with safe_open(str(path), framework="numpy") as file:
        images = file.get_tensor("images")
        captions = json.loads(file.metadata()["captions"])
    return images, captions


def default_captions() -> list[str]:
    """Eight easily recognised subjects, all held out from the style adapters' training."""
    return list(DEFAULT_CAPTIONS)
