"""The text-to-image family: denoising loss, style similarity and diversity."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.retention.family import Family
from lab.encoder import EmojiEncoder, load_encoder
from regraft.activations import gather
from regraft.demo.sampler import sample
from regraft.retention.images import diversity, style_similarity
from regraft.running import Model, Pictures, denoising_losses
from regraft.running.data import read_pictures

#: drawn for the metrics on generated pictures: recognisable, and held out in every style
PROMPTS = 12
SEEDS = (0, 1)
STEPS = 6
#: noise levels: with fixed noise, twice as many moved R by less than 0.02
TIMES = 4
SIZE = 32  # pixels a side
INPUTS = 32  # for hidden states


class Diffusion(Family):
    """U-Nets on emoji."""

    kind = "diffusion"
    upgrades = ("fine-tune", "continued", "pruned", "bigger", "other-seed")
    tasks = ("line", "outlined", "duotone")
    higher_is_better = ("style similarity",)
    margins = {"style similarity": 0.02}  # noqa: RUF012
    without_reference = ("diversity",)

    def adapter(self, base: str, task: str, rank: int, seed: int) -> Path:
        return self.assets / "adapters" / base / f"{task}-r{rank}-s{seed}.safetensors"

    @property
    def data(self) -> list[Path]:
        return [self.assets / "data" / f"{task}.safetensors" for task in self.tasks]

    @cached_property
    def pictures(self) -> dict[str, Pictures]:
        """Held-out pictures by style."""
        return {
            task: read_pictures(path, SIZE)
            for task, path in zip(self.tasks, self.data, strict=True)
        }

    @cached_property
    def encoder(self) -> EmojiEncoder:
        return load_encoder(self.assets.parent / "encoder" / "encoder.safetensors", "look")

    def scores(self, model: Model, task: str) -> dict[str, float]:
        held = self.pictures[task]
        count = 12 if self.quick else len(held.captions)
        some = Pictures(held.images[:count], held.captions[:count])
        losses = denoising_losses(model, some, seed=0, timesteps=3 if self.quick else TIMES)
        return {"denoising loss": float(losses.mean())}

    def main_of(self, record: dict[str, Any]) -> dict[str, float]:
        return {"denoising loss": record["heldout_adapted"]}

    def costly_scores(self, model: Model, task: str) -> dict[str, float]:
        held = self.pictures[task]
        captions = list(held.captions[: 3 if self.quick else PROMPTS])
        drawn = [
            sample(model.pipeline, captions, seed, steps=2 if self.quick else STEPS)
            for seed in SEEDS
        ]
        real = np.asarray(held.images)
        by_prompt = dict(zip(captions, np.stack(drawn, axis=1), strict=True))
        with torch.no_grad():
            return {
                "style similarity": style_similarity(np.concatenate(drawn), real, self.encoder),
                "diversity": diversity(by_prompt, self.encoder),
            }

    def states(self, base: str) -> dict[str, Tensor]:
        model = self.model(base)
        held = self.pictures[self.tasks[0]]
        some = Pictures(held.images[:INPUTS], held.captions[:INPUTS])
        noise = torch.randn(model.clean(some).shape, generator=torch.Generator().manual_seed(0))
        x, _ = model.noisy(model.clean(some), noise, 0.5)
        condition = model.condition(some.captions)
        return gather(model.modules["unet"], lambda _: model.predict(x, 0.5, condition))
