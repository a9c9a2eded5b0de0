"""Reading the held-out loss of a running base, item by item, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from regraft.crossing import Progress
from regraft.errors import BadData, BadOption
from regraft.retention.figure import spread
from regraft.retention.hosted import hosted
from regraft.retention.text import exact_score, held_out_loss
from regraft.running import (
    Diffusion,
    Language,
    Model,
    Pictures,
    Text,
    Texts,
    denoising_losses,
)

if TYPE_CHECKING:
    from regraft.retention.hosted import AnyAdapter


@dataclass(frozen=True)
class Reading:
    """The loss of every item, and for texts with prompts whether each answer was right."""

    losses: tuple[float, ...]
    answers: tuple[bool, ...] = ()

    @property
    def loss(self) -> float:
        """The mean over items."""
        return spread(self.losses).mean

    @property
    def score(self) -> float | None:
        """The share of right answers."""
        return sum(self.answers) / len(self.answers) if self.answers else None

    def below(self, other: Reading) -> list[float]:
        """By how much each item's loss is lower than in ``other``: the gain over it."""
        return [b - a for a, b in zip(self.losses, other.losses, strict=True)]


@dataclass
class Steps:
    """Counts the readings for the progress bar."""

    progress: Progress
    total: int
    done: int = 0

    def step(self) -> None:
        self.done += 1
        self.progress("measuring", self.done, self.total)


class Meter:
    """Reads a base on fixed data: the same items, noise and times at every reading.

    Diffusion: the denoising loss of each picture. Language: nats per byte of each text; a text with
    nothing to score within the model's context is left out, and counted in ``skipped``.
    """

    metrics: ClassVar[dict[str, tuple[str, str]]] = {
        "diffusion": ("denoising loss", "mean squared error of the prediction, per picture"),
        "language": ("held-out loss", "nats per byte, mean over texts"),
    }

    def __init__(
        self, model: Model, data: Pictures | Texts, steps: Steps, *, seed: int, timesteps: int
    ) -> None:
        self.model = model
        self.data = data
        self.steps = steps
        self.seed = seed
        self.timesteps = timesteps
        self.metric, self.unit = self.metrics[model.kind]
        self.skipped = 0
        self._texts = self._scorable()

    def read(
        self, adapter: AnyAdapter | None = None, strength: float = 1.0, *, answers: bool = True
    ) -> Reading:
        """The base as it is, or with ``strength`` times the adapter."""
        with hosted(self.model, adapter, strength):
            reading = Reading(tuple(self._losses()), tuple(self._answers()) if answers else ())
        self.steps.step()
        return reading

    def _losses(self) -> list[float]:
        model, data = self.model, self.data
        if isinstance(model, Diffusion) and isinstance(data, Pictures):
            losses = denoising_losses(model, data, seed=self.seed, timesteps=self.timesteps)
            return [float(value) for value in losses]
        return [self._loss(text) for text in self._texts]

    def _loss(self, text: Text) -> float:
        assert isinstance(self.model, Language)
        return held_out_loss(self.model.model, self.model.tokenizer, [text])

    def _answers(self) -> list[bool]:
        model, data = self.model, self.data
        if not isinstance(model, Language) or not isinstance(data, Texts) or not data.prompted:
            return []
        return exact_score(model.model, model.tokenizer, data.items)

    def _scorable(self) -> list[Text]:
        """The texts that this base's tokenizer and context leave something to score of."""
        if not isinstance(self.data, Texts):
            return []
        found = []
        for text in self.data.items:
            try:
                self._loss(text)
            except BadOption:
                self.skipped += 1
            else:
                found.append(text)
        if not found:
            raise BadData(
                f"None of the {len(self.data)} text(s) has anything to score within the context of "
                f"{self.model.ref}.",
                fix="Give texts of two tokens or more, and prompts shorter than the context.",
            )
        return found
