"""Stable Diffusion 1.x, 2.x and XL (and their prunings), through diffusers.

The noisy latent is x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) e (Ho et al. 2020, arXiv:2006.11239, Eq. 4). The
U-Net predicts e, or v = √ᾱ_t e − √(1 − ᾱ_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512), as the
base's scheduler config says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from regraft.errors import CannotRun
from regraft.files import Located
from regraft.files.select import weight_files
from regraft.running.emoji import convert, no_progress_bars
from regraft.running.model import Condition, Diffusion, Pictures, not_whole, optional
from regraft.running.quantised import settle

#: ``_class_name`` in the ``model_index.json`` of the bases this module runs.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|non_ema)[.-]")


def open_stable_diffusion(
    located: Located, name: str, device: torch.device, dtype: torch.dtype
) -> StableDiffusion:
    """Load a pipeline folder, without its safety checker: nothing here shows pictures.

    Raises
    ------
    CannotRun
        The folder is not whole, or the U-Net predicts something else than noise or v.
    MissingDependency
    """
    with optional("Running Stable Diffusion"):
        import diffusers

    folder = located.path
    files = weight_files(folder / "unet") if (folder / "unet").is_dir() else []
    variant = next((m[1] for f in files if (m := _VARIANT.search(f.name))), None)
    extra: dict[str, Any] = {}
    if "XL" not in name:
        extra |= {"safety_checker": None, "requires_safety_checker": False}
    if _quantised(folder):
        extra["torch_dtype"] = dtype  # left to itself, diffusers rounds all of it to bf16
    try:
        with no_progress_bars():
            pipeline = getattr(diffusers, name).from_pretrained(
                folder,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                **extra,
            )
            # Any scheduler's config holds the noise schedule the base was trained on.
            schedule = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise not_whole(error, folder) from error
    if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise CannotRun(
            f"The U-Net predicts {schedule.config.prediction_type!r}.",
            file=folder,
            fix="Regraft runs bases that predict epsilon or v_prediction.",
        )
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, *_text_encoders(pipeline).values()):
        convert(part, dtype)
    pipeline.to(device)
    settle(pipeline.unet)
    return StableDiffusion(located.ref, pipeline, schedule, device)


def _quantised(folder: Path) -> bool:
    try:
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # from_pretrained says what is wrong
    return isinstance(config, dict) and "quantization_config" in config


def _text_encoders(pipeline: Any) -> dict[str, Any]:
    found = {part: getattr(pipeline, part, None) for part in ("text_encoder", "text_encoder_2")}
    return {part: module for part, module in found.items() if module is not None}


class StableDiffusion(Diffusion):
    """A Stable Diffusion base that runs; ``pipeline`` is diffusers' own."""

    def __init__(self, ref: str, pipeline: Any, schedule: Any, device: torch.device) -> None:
        super().__init__(ref, {"unet": pipeline.unet, **_text_encoders(pipeline)}, device)
        self.pipeline = pipeline
        self.two_encoders = "text_encoder_2" in self.modules
        self.size = int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor)
        self.velocity = schedule.config.prediction_type == "v_prediction"
        self.alphas: Tensor = schedule.alphas_cumprod.to(device)
        # Adapters leave the VAE alone, so a picture is encoded once.
        self._clean: WeakKeyDictionary[Pictures, Tensor] = WeakKeyDictionary()

    def clean(self, pictures: Pictures) -> Tensor:
        if pictures not in self._clean:
            rows = [self._encode(picture) for picture in pictures.images]
            self._clean[pictures] = torch.cat(rows)
        return self._clean[pictures]

    def _encode(self, picture: np.ndarray) -> Tensor:
        """One picture's latent: the mean of the VAE's posterior, scaled."""
        vae = self.pipeline.vae
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(vae.device).float()
        latent: Tensor = vae.encode((pixels / 127.5 - 1.0).to(vae.dtype)).latent_dist.mode()
        return latent.float().cpu() * float(vae.config.scaling_factor)

    def condition(self, captions: Sequence[str]) -> Condition:
        options = {"device": self.device, "num_images_per_prompt": 1}
        found = self.pipeline.encode_prompt(
            prompt=list(captions), do_classifier_free_guidance=False, **options
        )
        if not self.two_encoders:
            return {"hidden": found[0]}
        # SDXL is told the picture's size, where it was cropped, and the size to draw.
        where = [self.size, self.size, 0, 0, self.size, self.size]
        ids = torch.tensor([where] * len(captions), device=self.device, dtype=found[0].dtype)
        return {"hidden": found[0], "text_embeds": found[2], "time_ids": ids}

    def _step(self, t: float) -> int:
        """The training step at time t in [0, 1]."""
        return min(int(t * len(self.alphas)), len(self.alphas) - 1)

    def noisy(self, x0: Tensor, noise: Tensor, t: float) -> tuple[Tensor, Tensor]:
        alpha = self.alphas[self._step(t)]
        signal, amount = alpha.sqrt(), (1 - alpha).sqrt()
        wanted = signal * noise - amount * x0 if self.velocity else noise
        return signal * x0 + amount * noise, wanted

    def predict(self, x: Tensor, t: float, condition: Condition) -> Tensor:
        unet = self.pipeline.unet
        told = {k: v for k, v in condition.items() if k != "hidden"}
        guess: Tensor = unet(
            x.to(unet.dtype),
            torch.full((len(x),), self._step(t), device=x.device),
            condition["hidden"],
            added_cond_kwargs=told or None,
            return_dict=False,
        )[0]
        return guess

    @torch.no_grad()
    def sample(
        self, captions: Sequence[str], seeds: Sequence[int] | int = 0, *, steps: int = 25
    ) -> np.ndarray:
        n = len(captions)
        rows = [seeds] * n if isinstance(seeds, int) else list(seeds)
        if len(rows) != n:
            raise ValueError(f"{n} captions but {len(rows)} seeds")
        drawn = [
            self.pipeline(
                prompt=caption,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images
            for caption, seed in zip(captions, rows, strict=True)
        ]
        return (np.concatenate(drawn) * 255).round().astype(np.uint8)
