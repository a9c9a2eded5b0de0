"""Pictures: the error of a denoiser's prediction, alone or with Cut-Mix-Unmix."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from regraft.running import Diffusion, Pictures, denoising_losses
from regraft.running.data import digest
from regraft.running.emoji import TIME_SCALE, Emoji
from regraft.running.stable_diffusion import StableDiffusion
from regraft.training.attention import CrossAttention
from regraft.training.objectives import Objective, Part
from regraft.training.subjects import Mixer, TwoSubjects, several


class Denoising(Objective):
    """Mean squared error of the denoiser's prediction at random times, a time for each picture.

    Parameters
    ----------
    model : Diffusion
    pictures : Pictures
    snr_gamma : float, optional
        γ of Min-SNR weights.
    subjects : sequence of str
        The subject of each picture, for Cut-Mix.
    cut_mix : float
        How often a picture is mixed with one of another subject.
    template : str
        The prompt of such a picture.
    unmix : float
        Weight of the attention of each subject's words in the other's half, squared, its mean over
        places and words summed over the layers.
    """

    component = "unet"

    def __init__(
        self,
        model: Diffusion,
        pictures: Pictures,
        snr_gamma: float | None,
        *,
        subjects: Sequence[str] = (),
        cut_mix: float = 0.0,
        template: str = "",
        unmix: float = 0.0,
    ) -> None:
        self.model, self.pictures, self.gamma = model, pictures, snr_gamma
        self.subjects, self.cut_mix, self.template = list(subjects), cut_mix, template
        self.mixer: Mixer | None = None
        self.unmix, self.maps = unmix, CrossAttention()
        self.terms = ("unmix",) if unmix else ()
        self.count, self.notes = len(pictures), []
        self.digest = digest(pictures)
        if self.subjects:
            told = repr((self.digest, self.subjects))
            self.digest = hashlib.sha256(told.encode()).hexdigest()
        with torch.no_grad():
            self.clean = model.clean(pictures)
            # Encoders are not trained, so each caption is encoded once.
            parts = [
                model.condition(list(pictures.captions[i : i + model.batch]))
                for i in range(0, self.count, model.batch)
            ]
        # What no text encoder reads is not learned, and nothing else would say so.
        read: Any = getattr(model, "pipeline").tokenizer  # noqa: B009
        limit = read.model_max_length
        lengths = [len(read(t, verbose=False)["input_ids"]) for t in set(pictures.captions)]
        if cut := sum(length > limit for length in lengths):
            self.notes.append(f"captions cut off at {limit} tokens by the text encoder: {cut}")
        self.told = {k: torch.cat([part[k].cpu() for part in parts]) for k in parts[0]}

    def begin(self, rows: Sequence[int], *, optional: bool = False) -> None:
        """Mix among these items only, those held out not; not at all where that is optional."""
        if not self.cut_mix or (optional and not several(self.subjects, rows)):
            return
        self.mixer = Mixer(
            self.model, self.pictures, self.subjects, rows, self.cut_mix, self.template
        )
        if self.mixer.too_long:
            self.notes.append("some prompts of two subjects were cut off by the text encoder")

    def watching(self, module: Any) -> AbstractContextManager[None]:
        return self.maps.watching(module) if self.unmix else nullcontext()

    def parts(self, rows: Sequence[int], draw: torch.Generator, size: int) -> Iterator[Part]:
        rows = list(rows)
        x0 = self.clean[rows]
        noise = torch.randn(x0.shape, generator=draw)
        t = torch.rand(len(rows), generator=draw)
        told = {k: v[rows] for k, v in self.told.items()}
        mixed: dict[int, TwoSubjects] = {}
        if self.mixer is not None:
            found = [self.mixer(row, draw) for row in rows]
            mixed = {place: two for place, two in enumerate(found) if two is not None}
            x0 = self._put(mixed, x0, told)
        for low in range(0, len(rows), size):
            chosen = slice(low, low + size)
            regions = {i - low: two for i, two in mixed.items() if low <= i < low + size}
            cut = (x0[chosen], noise[chosen], t[chosen])
            yield self._part(*cut, {k: v[chosen] for k, v in told.items()}, regions, len(rows))

    @torch.no_grad()
    def _put(self, mixed: dict[int, TwoSubjects], x0: Tensor, told: dict[str, Tensor]) -> Tensor:
        """``x0`` with the mixed pictures in their places, and their prompts in ``told``."""
        if not mixed:
            return x0
        places, two = list(mixed), list(mixed.values())
        images = torch.stack([torch.from_numpy(one.picture) for one in two]).numpy()
        x0 = x0.clone()
        x0[places] = self.model.clean(Pictures(images, [one.prompt for one in two]))
        for name, value in self.model.condition([one.prompt for one in two]).items():
            told[name][places] = value.cpu()
        return x0

    def _part(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        told: dict[str, Tensor],
        regions: dict[int, TwoSubjects],
        whole: int,
    ) -> Part:
        model = self.model
        told = {k: v.to(model.device) for k, v in told.items()}
        x0, noise, t = (part.to(model.device) for part in (x0, noise, t))
        x, wanted, time, weight = self._noisy(x0, noise, t)
        unet: Any = model.modules["unet"]
        call = {
            "sample": x.to(unet.dtype),
            "timestep": time,
            "encoder_hidden_states": told.pop("hidden"),
            "return_dict": False,
        }
        if told:
            call["added_cond_kwargs"] = told
        return Part(call, (wanted, weight, regions), len(x0) / whole)

    def _noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t, what is to be predicted, the time as the U-Net counts it, and the loss's weight.

        Min-SNR weighs the error of x0 by min(SNR, γ); the weights here are what that is for the
        error of ε, of v and of a velocity.
        """
        shape = (-1, *[1] * (x0.ndim - 1))
        if isinstance(self.model, Emoji):
            at = t.view(shape)
            weight = torch.ones_like(t)
            if self.gamma is not None:
                weight = t**2 * (((1 - t) / t.clamp(min=1e-6)) ** 2).clamp(max=self.gamma)
            return (1 - at) * x0 + at * noise, noise - x0, t * TIME_SCALE, weight
        assert isinstance(self.model, StableDiffusion)
        alphas = self.model.alphas
        step = (t * len(alphas)).long().clamp(max=len(alphas) - 1)
        alpha = alphas[step]
        signal, amount = alpha.sqrt().view(shape), (1 - alpha).sqrt().view(shape)
        velocity = self.model.velocity
        wanted = signal * noise - amount * x0 if velocity else noise
        weight = torch.ones_like(alpha)
        if self.gamma is not None:
            snr = alpha / (1 - alpha)
            kept = snr.clamp(max=self.gamma)
            weight = kept / (snr + 1) if velocity else kept / snr.clamp(min=1e-12)
        return signal * x0 + amount * noise, wanted, step, weight

    def loss(self, module: Any, part: Part) -> tuple[Tensor, dict[str, float]]:
        goal, weight, regions = part.wanted
        if self.unmix:
            self.maps.begin(list(regions))
        output = module(**part.call)
        wrong = (output[0].float() - goal).pow(2).flatten(1).mean(dim=1)
        total: Tensor = (wrong * weight).mean()
        if not self.unmix:
            return total, {}
        astray = self._astray(list(regions.values())) / len(goal)
        return total + self.unmix * astray, {"unmix": float(astray.detach())}

    def _astray(self, regions: Sequence[TwoSubjects]) -> Tensor:
        """The unmix loss, summed over the mixed pictures and the layers."""
        from regraft.tuners.svdiff.cut_mix import unmix_loss

        total = torch.zeros((), device=self.model.device)
        for attention in self.maps.take():
            for row, two in enumerate(regions):
                if two.left and two.right:  # a long caption's own words may be cut off
                    only = attention[row : row + 1]
                    total = total + unmix_loss(only, two.mask, two.left, two.right)
        return total

    def held_out(self, module: Any, rows: Sequence[int]) -> float:
        chosen = list(rows)
        part = Pictures(self.pictures.images[chosen], [self.pictures.captions[i] for i in chosen])
        return float(denoising_losses(self.model, part, timesteps=4).mean())

    def prompts(self, rows: Sequence[int]) -> list[str]:
        return list(dict.fromkeys(self.pictures.captions[row] for row in rows))
