"""Cut-Mix-Unmix: two subjects in one training picture, and a loss that keeps them apart.

Paper: arXiv 2303.11305, section on multiple subjects. With probability 0.6 a training picture is
made of two, side by side, with the prompt "… on the left and … on the right". Optionally, a squared
loss takes the attention of one subject's words in the other's half to zero ("unmix"). Not given in
the paper's text as far as it is known here: how pictures are cut to halves. Here the middle half of
each is kept, undistorted, since that is where subjects are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from regraft.errors import BadOption


@dataclass(frozen=True)
class Mixed:
    """A picture of two subjects.

    Attributes
    ----------
    image : Tensor of shape (c, h, w)
        In the values of the two it is made of.
    prompt : str
    left, right : str
        The prompt of the subject on each side.
    mask : Tensor of shape (h, w)
        1 on the left half, 0 on the right.
    """

    image: Tensor
    prompt: str
    left: str
    right: str
    mask: Tensor


@dataclass(frozen=True)
class CutMix:
    """Makes pictures of two subjects of pictures of one.

    Parameters
    ----------
    probability : float
        How often a picture is mixed.
    template : str
        The prompt, with ``{left}`` and ``{right}``.

    Raises
    ------
    BadOption
    """

    probability: float = 0.6
    template: str = "{left} on the left and {right} on the right"

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise BadOption(
                f"{self.probability} is not a probability.", fix="Give a number from 0 to 1."
            )
        if "{left}" not in self.template or "{right}" not in self.template:
            raise BadOption(
                "The template of the prompt has no {left} or no {right}.", fix="Write both in it."
            )

    def __call__(
        self, first: Tensor, second: Tensor, prompts: Sequence[str], generator: torch.Generator
    ) -> Mixed | None:
        """Mix two pictures, or don't; which subject is on the left is drawn too.

        Parameters
        ----------
        first, second : Tensor of shape (c, h, w)
            Floats or whole numbers in any range; the same shape, w at least 2.
        prompts : two str
            What is on each: "photo of a V1 dog", "photo of a V2 cat".
        generator : torch.Generator
            Two numbers are always drawn from it, so that a resumed run goes on as it would have.

        Returns
        -------
        Mixed or None
            None: train on the single pictures this time.

        Raises
        ------
        BadOption
        """
        if first.shape != second.shape or first.ndim != 3 or first.shape[2] < 2:
            raise BadOption(
                f"Pictures {tuple(first.shape)} and {tuple(second.shape)} cannot be put side by "
                "side.",
                fix="Resize them to one size, (channels, height, width).",
            )
        if len(prompts) != 2:
            raise BadOption(f"{len(prompts)} prompts for two pictures.", fix="Give two.")
        drawn = torch.rand(2, generator=generator).tolist()
        if drawn[0] >= self.probability:
            return None
        sides = [(first, prompts[0]), (second, prompts[1])]
        if drawn[1] < 0.5:
            sides.reverse()
        (left_image, left), (right_image, right) = sides
        width = first.shape[2]
        half = width // 2
        image = torch.cat([_middle(left_image, half), _middle(right_image, width - half)], dim=2)
        mask = torch.zeros(first.shape[1:])
        mask[:, :half] = 1.0
        prompt = self.template.format(left=left, right=right)
        return Mixed(image, prompt, left, right, mask)


def _middle(image: Tensor, width: int) -> Tensor:
    start = (image.shape[2] - width) // 2
    return image[:, :, start : start + width]


def unmix_loss(
    attention: Tensor,
    mask: Tensor,
    left_tokens: Sequence[int],
    right_tokens: Sequence[int],
) -> Tensor:
    """The mean squared attention of each subject's words in the other subject's half.

    Parameters
    ----------
    attention : Tensor of shape (b, h, w, t)
        A cross-attention map: for every place, what it gives to each of t tokens. Mean of heads.
    mask : Tensor of shape (H, W)
        1 where the left subject is; brought to (h, w) here. Of all b pictures.
    left_tokens, right_tokens : sequence of int
        Where each subject's words are in the prompt.

    Returns
    -------
    Tensor of shape ()
        Add it to the training loss, times a weight; summed over the layers it is taken from.

    Raises
    ------
    BadOption
    """
    tokens = [*left_tokens, *right_tokens]
    if not left_tokens or not right_tokens or not all(0 <= t < attention.shape[-1] for t in tokens):
        raise BadOption(
            f"The tokens {tokens} are not both subjects' among {attention.shape[-1]}.",
            fix="Give the positions of each subject's words in the tokenised prompt.",
        )
    size = (attention.shape[1], attention.shape[2])
    left = functional.interpolate(mask[None, None].to(attention), size, mode="area")[
        0, 0, ..., None
    ]
    astray = torch.cat(
        [attention[..., list(left_tokens)] * (1 - left), attention[..., list(right_tokens)] * left],
        dim=-1,
    )
    return astray.square().mean()
