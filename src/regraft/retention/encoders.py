"""CLIP and DINOv2 from the user's own weights, through transformers.

Weights are a folder, or a hub id that is already in the local Hugging Face cache; nothing is
downloaded unless asked for. Only safetensors are read.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from regraft.errors import InputNotFound, MalformedFile, MissingDependency
from regraft.retention.images import Pictures

BATCH = 32  # pictures at a time: 224 x 224 activations of a large encoder stay under 2 GB


@dataclass(frozen=True)
class ClipEncoder:
    """CLIP (Radford et al. 2021, arXiv:2103.00020): projected features, length 1."""

    model: Any
    processor: Any
    tokenizer: Any
    name: str = "CLIP"

    @torch.no_grad()
    def encode(self, images: Pictures) -> Float[Tensor, "n d"]:
        """Projected image features of length 1, float32."""
        rows = [
            self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)
            for x in processed(images, self.processor)
        ]
        return functional.normalize(torch.cat(rows).float(), dim=1)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Projected text features of length 1, float32; texts are cut at the model's length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return functional.normalize(self.model.text_projection(pooled).float(), dim=1)


@dataclass(frozen=True)
class Dinov2Encoder:
    """DINOv2 (Oquab et al. 2023, arXiv:2304.07193): the class token after the last norm."""

    model: Any
    processor: Any
    name: str = "DINOv2"

    @torch.no_grad()
    def encode(self, images: Pictures) -> Float[Tensor, "n d"]:
        """Class tokens scaled to length 1, float32."""
        rows = [
            self.model(pixel_values=x).last_hidden_state[:, 0]
            for x in processed(images, self.processor)
        ]
        return functional.normalize(torch.cat(rows).float(), dim=1)


def load_clip(ref: str | Path, *, download: bool = False) -> ClipEncoder:
    """CLIP from a folder or hub id (``openai/clip-vit-large-patch14``), float32 on the CPU.

    Raises
    ------
    MissingDependency
        transformers or Pillow is not installed.
    InputNotFound
        No such folder, or not in the local cache (and ``download`` is off), or no safetensors.
    MalformedFile
        It holds another kind of model.
    """
    transformers = package("transformers", "regraft[demo]")
    package("PIL", "regraft[demo]")
    model = _pretrained(transformers.CLIPModel, ref, "CLIP", download)
    processor = _part(transformers.AutoImageProcessor, ref, download)
    tokenizer = _part(transformers.AutoTokenizer, ref, download)
    return ClipEncoder(model, processor, tokenizer)


def load_dinov2(ref: str | Path, *, download: bool = False) -> Dinov2Encoder:
    """DINOv2 from a folder or hub id (``facebook/dinov2-base``), float32 on the CPU.

    Raises
    ------
    MissingDependency, InputNotFound, MalformedFile
        As :func:`load_clip`.
    """
    transformers = package("transformers", "regraft[demo]")
    package("PIL", "regraft[demo]")
    model = _pretrained(transformers.Dinov2Model, ref, "DINOv2", download)
    return Dinov2Encoder(model, _part(transformers.AutoImageProcessor, ref, download))


def package(name: str, install: str) -> Any:
    """Import an optional package, or raise MissingDependency with what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"The package {error.name or name!r} is not installed.", fix=f"pip install '{install}'"
        ) from error


def processed(images: Pictures, processor: Any) -> Iterator[Float[Tensor, "n 3 h w"]]:
    """The model's own resizing, cropping and normalising, a batch at a time."""
    pillow = package("PIL.Image", "regraft[demo]")
    for low in range(0, len(images), BATCH):
        pictures = [pillow.fromarray(image) for image in images[low : low + BATCH]]
        yield processor(images=pictures, return_tensors="pt")["pixel_values"]


def _pretrained(kind: Any, ref: str | Path, what: str, download: bool) -> Any:
    """``kind.from_pretrained`` that refuses pickles, downloads and half-filled models."""
    with _no_progress_bars():
        config = _part(kind.config_class, ref, download)
        if config.model_type != kind.config_class.model_type:
            raise _wrong_model(ref, what)
        try:
            model, loading = kind.from_pretrained(
                str(ref),
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=not download,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise _not_found(ref, error) from error
    if loading["missing_keys"]:  # transformers would fill them with random numbers
        raise _wrong_model(ref, what)
    return model.eval()


def _part(kind: Any, ref: str | Path, download: bool) -> Any:
    try:
        return kind.from_pretrained(str(ref), local_files_only=not download)
    except (OSError, ValueError) as error:
        raise _not_found(ref, error) from error


def _wrong_model(ref: str | Path, what: str) -> MalformedFile:
    return MalformedFile(
        f"{ref} holds no complete {what} model.", fix=f"Name a {what} folder or hub id."
    )


def _not_found(ref: str | Path, error: Exception) -> InputNotFound:
    reason = (str(error).strip().splitlines() or [""])[0]
    return InputNotFound(
        f"{ref} could not be read from this machine: {reason}",
        fix=f"Name a folder with safetensors, or fetch it once: hf download {ref}",
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A bar for a load of seconds is only noise; the user's setting is put back."""
    logging = package("transformers.utils.logging", "regraft[demo]")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
