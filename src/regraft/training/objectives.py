"""What is learned from: items as tensors, and the loss of a batch of them.

Every draw comes from the generator it is given, so that a step depends on its number only.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from regraft.errors import BadData, CannotRun
from regraft.retention.data import read_data
from regraft.running import Diffusion, Language, Model, Pictures, Texts, denoising_losses
from regraft.running.emoji import TIME_SCALE, Emoji
from regraft.running.stable_diffusion import StableDiffusion
from regraft.training.settings import Settings


class Objective(ABC):
    """The items of one run.

    Attributes
    ----------
    component : str
        The part of the base that is trained.
    count : int
        Items.
    digest : str
        SHA-256 of the items.
    notes : list of str
    """

    component: str
    count: int
    digest: str
    notes: list[str]

    @abstractmethod
    def inputs(self, rows: Sequence[int], draw: torch.Generator) -> tuple[dict[str, Any], Any]:
        """What the component is called with for these items, and what its output is judged by."""

    @abstractmethod
    def loss(self, output: Any, wanted: Any) -> Tensor:
        """The loss that is minimised, a scalar."""

    @abstractmethod
    def held_out(self, module: Any, rows: Sequence[int]) -> float:
        """Loss over items, without gradients and with nothing left to chance."""


class Denoising(Objective):
    """Mean squared error of the denoiser's prediction at random times, a time for each picture."""

    component = "unet"

    def __init__(self, model: Diffusion, pictures: Pictures, snr_gamma: float | None) -> None:
        self.model, self.pictures, self.gamma = model, pictures, snr_gamma
        self.count, self.notes = len(pictures), []
        digest = hashlib.sha256(repr((pictures.images.shape, list(pictures.captions))).encode())
        digest.update(pictures.images.tobytes())
        self.digest = digest.hexdigest()
        with torch.no_grad():
            self.clean = model.clean(pictures)
            # Encoders are not trained, so each caption is encoded once.
            parts = [
                model.condition(list(pictures.captions[i : i + model.batch]))
                for i in range(0, self.count, model.batch)
            ]
        self.told = {k: torch.cat([part[k].cpu() for part in parts]) for k in parts[0]}

    def inputs(self, rows: Sequence[int], draw: torch.Generator) -> tuple[dict[str, Any], Any]:
        model = self.model
        x0 = self.clean[list(rows)]
        noise = torch.randn(x0.shape, generator=draw)
        t = torch.rand(len(rows), generator=draw)
        told = {k: v[list(rows)].to(model.device) for k, v in self.told.items()}
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
        return call, (wanted, weight)

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

    def loss(self, output: Any, wanted: Any) -> Tensor:
        goal, weight = wanted
        wrong = (output[0].float() - goal).pow(2).flatten(1).mean(dim=1)
        total: Tensor = (wrong * weight).mean()
        return total

    def held_out(self, module: Any, rows: Sequence[int]) -> float:
        chosen = list(rows)
        part = Pictures(self.pictures.images[chosen], [self.pictures.captions[i] for i in chosen])
        return float(denoising_losses(self.model, part, timesteps=4).mean())


class NextToken(Objective):
    """Cross-entropy of the next token; of a completion only, where there is a prompt.

    A text without a prompt that is too long is cut into several items; a prompt with its completion
    is cut off at its end. The end of a text is not learned.
    """

    component = ""

    def __init__(self, model: Language, texts: Texts, length: int) -> None:
        self.model = model
        self.notes = []
        context = getattr(model.model.config, "max_position_embeddings", None)
        self.length = min(length, context or length)
        self.items = self._items(texts)
        self.count = len(self.items)
        self.digest = hashlib.sha256(repr(self.items).encode()).hexdigest()

    def _items(self, texts: Texts) -> list[tuple[list[int], int]]:
        """(tokens, place of the first that is learned) of each item."""
        tokenizer = self.model.tokenizer
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        found: list[tuple[list[int], int]] = []
        cut = 0
        for text in texts.items:
            if text.prompt:
                before = start + encode(text.prompt)
                ids = before + encode(text.completion)
                cut += len(ids) > self.length
                found.append((ids[: self.length], max(1, len(before))))
            else:
                ids = encode(text.completion)
                room = self.length - len(start)
                found += [(start + ids[i : i + room], 1) for i in range(0, max(1, len(ids)), room)]
        kept = [item for item in found if len(item[0]) > item[1]]
        if cut:
            self.notes.append(f"{cut} items were cut off at {self.length} tokens")
        if len(kept) < len(found):
            self.notes.append(f"{len(found) - len(kept)} items have nothing to learn in them")
        if not kept:
            raise BadData("No text has a token to learn.", fix="Give longer texts, or a length.")
        return kept

    def inputs(self, rows: Sequence[int], draw: torch.Generator) -> tuple[dict[str, Any], Any]:
        items = [self.items[i] for i in rows]
        width = max(len(ids) for ids, _ in items)
        tokens = torch.zeros(len(items), width, dtype=torch.long)
        mask, labels = tokens.clone(), torch.full_like(tokens, -100)
        for row, (ids, first) in enumerate(items):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            labels[row, first : len(ids)] = torch.tensor(ids[first:])
        device = self.model.device
        call = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
        return call, labels.to(device)

    def loss(self, output: Any, wanted: Any) -> Tensor:
        mean: Tensor = self._summed(output, wanted) / (wanted != -100).sum()
        return mean

    @staticmethod
    def _summed(output: Any, labels: Tensor) -> Tensor:
        # Prompt tuning puts outputs of its own in front.
        logits = output.logits[:, -labels.shape[1] :][:, :-1].float()
        return functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="sum"
        )

    @torch.no_grad()
    def held_out(self, module: Any, rows: Sequence[int]) -> float:
        total, count = 0.0, 0
        for i in range(0, len(rows), 16):
            call, labels = self.inputs(rows[i : i + 16], torch.Generator())
            total += float(self._summed(module(**call), labels).double())
            count += int((labels != -100).sum())
        return total / count


def objective_for(model: Model, settings: Settings) -> Objective:
    """Read the data of a run as its base needs them.

    Raises
    ------
    BadData, CannotRun, InputNotFound, MalformedFile
    """
    items = read_data(settings.data, model)
    if isinstance(model, Emoji | StableDiffusion) and isinstance(items, Pictures):
        return Denoising(model, items, settings.snr_gamma)
    if isinstance(model, Language) and isinstance(items, Texts):
        goal = NextToken(model, items, settings.length)
        if settings.snr_gamma is not None:
            goal.notes.append("snr_gamma means nothing to a language model")
        return goal
    raise CannotRun(f"Bases such as {model.ref} cannot be trained on yet.")
