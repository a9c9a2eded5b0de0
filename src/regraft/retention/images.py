"""Picture metrics over a chosen encoder: style similarity, likeness of pairs, diversity over seeds.

An encoder turns pictures into features; the arithmetic here is the same for all of them. Encoders
of the user's own weights are in ``encoders.py``; the lab brings its own. What LoRA-X
(arXiv:2501.16559) and ProLoRA (arXiv:2506.04244) report maps to :func:`paired_similarity` with
DINOv2 ("similarity between images of the trained and of the transferred adapter") and to LPIPS
diversity (``scorers.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from regraft.errors import BadOption

#: Pictures of one size: uint8, RGB, [pictures, height, width, 3]. Two sets may differ in both.
Pictures = UInt8[np.ndarray, "_n _h _w 3"]
#: Prompt -> its pictures, one per seed. Sizes may differ between prompts.
PicturesByPrompt = Mapping[str, UInt8[np.ndarray, "_seeds _h _w 3"]]


@runtime_checkable
class Encoder(Protocol):
    """Turns pictures into feature vectors."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def encode(self, images: Pictures) -> Float[Tensor, "n d"]:
        """Features in float32 on the CPU, one row per picture; length 1 is not promised."""


@runtime_checkable
class Scorer(Protocol):
    """One figure for a set of generated pictures."""

    @property
    def name(self) -> str:
        """What reports call the figure."""

    @property
    def higher_is_better(self) -> bool:
        """The direction of improvement."""

    def score(self, generated: PicturesByPrompt, real: Pictures) -> float:
        """The figure. ``real`` are the style's own pictures; some scorers do not look at them."""


def style_similarity(generated: Pictures, real: Pictures, encoder: Encoder) -> float:
    """Mean cosine between each generated picture and the centre of the real ones; in [-1, 1].

    With unit features ``g_i`` and ``r_j`` and ``c = mean_j r_j``:

        s = mean_i cos(g_i, c) = (mean over all pairs of cos(g_i, r_j)) / |c|

    The centre and not all pairs, because ``|c|`` (how alike the real pictures are among themselves)
    then drops out: pictures all at the centre score 1 whatever the spread of the real ones. For the
    same real pictures the two differ by a constant factor, so a retention computed from either is
    the same. The real set itself scores ``|c|``, below 1: that, and not 1, is what to expect of a
    perfect adapter.

    Raises
    ------
    BadOption
        One of the two sets is empty.
    """
    _need(generated, "generated")
    _need(real, "real")
    centre = functional.normalize(_unit(encoder, real).mean(0), dim=0)
    return float((_unit(encoder, generated) @ centre).mean())


def paired_similarity(first: Pictures, second: Pictures, encoder: Encoder) -> float:
    """Mean cosine of picture i of one set and picture i of the other; in [-1, 1].

    For two adapters on one prompt and seed each. Papers call it DINO or CLIP-I similarity.

    Raises
    ------
    BadOption
        The sets are empty or of different lengths.
    """
    _need(first, "compared")
    if len(first) != len(second):
        raise BadOption(
            f"{len(first)} pictures cannot be paired with {len(second)}.",
            fix="Generate both sets from the same prompts and seeds.",
        )
    return float((_unit(encoder, first) * _unit(encoder, second)).sum(1).mean())


def diversity(images_by_prompt: PicturesByPrompt, encoder: Encoder) -> float:
    """Mean of ``1 - cos`` over the pairs of seeds of one prompt, averaged over prompts; in [0, 2].

    Prompts weigh the same whatever their number of seeds. Pairs of different prompts never count:
    they differ by subject.

    Raises
    ------
    BadOption
        No prompt, or one with fewer than two pictures.
    """
    check_seeds(images_by_prompt)
    means = []
    for images in images_by_prompt.values():
        features = _unit(encoder, images)
        pairs = torch.triu_indices(len(images), len(images), offset=1)
        means.append(float((1 - features @ features.T)[pairs[0], pairs[1]].mean()))
    return float(np.mean(means))


def check_seeds(images_by_prompt: PicturesByPrompt) -> None:
    """Raise BadOption unless there is a prompt and every prompt has two pictures or more."""
    if not images_by_prompt:
        raise BadOption(
            "Diversity needs at least one prompt.", fix="Give prompts to generate from."
        )
    for prompt, images in images_by_prompt.items():
        if len(images) < 2:
            raise BadOption(
                f"Diversity needs two pictures or more per prompt; {prompt!r} has {len(images)}.",
                fix="Generate from at least two seeds.",
            )


@dataclass(frozen=True)
class StyleSimilarity:
    """:func:`style_similarity` over all prompts' pictures as a scorer."""

    encoder: Encoder
    higher_is_better: bool = True

    @property
    def name(self) -> str:
        """Named by its encoder."""
        return f"style similarity ({self.encoder.name})"

    def score(self, generated: PicturesByPrompt, real: Pictures) -> float:
        """See :func:`style_similarity`; every picture weighs the same."""
        sums = [style_similarity(g, real, self.encoder) * len(g) for g in generated.values()]
        return sum(sums) / sum(len(g) for g in generated.values())


@dataclass(frozen=True)
class Diversity:
    """:func:`diversity` as a scorer. More is better only as long as the style is kept."""

    encoder: Encoder
    higher_is_better: bool = True

    @property
    def name(self) -> str:
        """Named by its encoder."""
        return f"diversity ({self.encoder.name})"

    def score(self, generated: PicturesByPrompt, real: Pictures) -> float:
        """See :func:`diversity`; ``real`` is not used."""
        return diversity(generated, self.encoder)


def _unit(encoder: Encoder, images: Pictures) -> Float[Tensor, "n d"]:
    return functional.normalize(encoder.encode(images).double(), dim=1)


def _need(images: Pictures, which: str) -> None:
    if len(images) == 0:
        raise BadOption(f"There are no {which} pictures.", fix="Give at least one.")
