"""The embedded pair: a small text-to-image base, its successor, and style adapters for both.

Everything is in the formats users have: each base is a diffusers-style folder (``unet``,
``text_encoder``, ``tokenizer``), each adapter one ``.safetensors`` file written by diffusers'
own saver. How they were trained: ``lab/README.md`` and ``assets/manifest.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers  # noqa: F401  (absent: say so before any work)
import numpy as np
import transformers  # noqa: F401
from safetensors import safe_open

from regraft.demo.captions import DEFAULT_CAPTIONS
from regraft.running.emoji import EmojiPipeline, load_pipeline


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


def load_heldout(path: str | Path = HELDOUT) -> tuple[np.ndarray, list[str]]:
    """Held-out style images (uint8 ``[n, 32, 32, 3]``) and their captions, same order."""
    with safe_open(str(path), framework="numpy") as file:
        images = file.get_tensor("images")
        captions = json.loads(file.metadata()["captions"])
    return images, captions


def default_captions() -> list[str]:
    """Eight easily recognised subjects, all held out from the style adapters' training."""
    return list(DEFAULT_CAPTIONS)


__all__ = [
    "ADAPTER",
    "HELDOUT",
    "MANIFEST",
    "RETRAINED",
    "SOURCE",
    "TARGET",
    "EmojiPipeline",
    "assets_dir",
    "default_captions",
    "load_heldout",
    "load_pipeline",
]
