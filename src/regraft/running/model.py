"""What a running base is, what it is run on, and the loss of a diffusion model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from regraft.errors import CannotRun, MissingDependency
from regraft.parallel import single_threaded

Kind = Literal["diffusion", "language"]
#: What a denoiser is told beside the picture and the time: tensors with one row per caption.
Condition = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures and their captions.

    Parameters
    ----------
    images : ndarray of shape (n, height, width, 3), uint8 RGB
    captions : sequence of str, n of them
    """

    images: UInt8[np.ndarray, "n h w 3"]
    captions: Sequence[str]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[-1] != 3 or self.images.dtype != np.uint8:
            raise ValueError(
                f"images are {self.images.dtype} {self.images.shape}, not uint8 [n, h, w, 3]"
            )
        if len(self.images) != len(self.captions):
            raise ValueError(f"{len(self.images)} images but {len(self.captions)} captions")

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Text:
    """One text. The loss is taken on ``completion``; ``prompt`` is only read (empty: no prompt)."""

    completion: str
    prompt: str = ""


@dataclass(frozen=True)
class Texts:
    """Texts to measure a language model on."""

    items: tuple[Text, ...]

    @property
    def prompted(self) -> bool:
        """Whether every text has a prompt, so that answers can be compared with completions."""
        return all(item.prompt for item in self.items)

    def __len__(self) -> int:
        return len(self.items)


class Model(ABC):
    """A base that runs.

    Attributes
    ----------
    ref : str
        What the user called it.
    modules : mapping of str to Module
        By component, as in :class:`regraft.adapters.Site`: "unet", "text_encoder", …; "" for a
        bare language model. In evaluation mode.
    device : torch.device
    """

    kind: ClassVar[Kind]

    def __init__(self, ref: str, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        self.ref = ref
        self.modules = dict(modules)
        self.device = device
        for module in self.modules.values():
            module.eval().requires_grad_(False)


class Language(Model):
    """A causal language model and its tokenizer, both of transformers."""

    kind = "language"

    def __init__(self, ref: str, model: Any, tokenizer: Any, device: torch.device) -> None:
        super().__init__(ref, {"": model}, device)
        self.model = model
        self.tokenizer = tokenizer


class Diffusion(Model):
    """A text-to-image base.

    Time t is in [0, 1], from picture to noise, whatever the scheduler counts in.

    Attributes
    ----------
    size : int
        Side of its square pictures, in pixels.
    batch : int
        Pictures to denoise at a time.
    small : bool
        Run on one thread: faster for a small model, and the same bits on every machine.
    """

    kind = "diffusion"
    size: int
    batch: int = 4
    small: bool = False

    @abstractmethod
    def clean(self, pictures: Pictures) -> Float[Tensor, "n c h w"]:
        """The pictures as the denoiser sees them, without noise (fp32, on the CPU)."""

    @abstractmethod
    def condition(self, captions: Sequence[str]) -> Condition:
        """What the text encoders make of the captions."""

    @abstractmethod
    def noisy(
        self, x0: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], t: float
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """The noisy picture at time t, and what the denoiser should predict for it."""

    @abstractmethod
    def predict(
        self, x: Float[Tensor, "n c h w"], t: float, condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        """The denoiser's prediction: noise, v or velocity, as the base was trained."""

    @abstractmethod
    def sample(
        self, captions: Sequence[str], seeds: Sequence[int] | int = 0
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Draw one picture per caption with the base's usual settings; the same seeds, the same
        pictures. ``seeds``: one per caption, or one for all."""


def default_timesteps(count: int = 8) -> list[float]:
    """Midpoints of ``count`` equal parts of [0, 1]."""
    return [(i + 0.5) / count for i in range(count)]


def fixed_noise(seeds: Sequence[int], shape: Sequence[int]) -> Float[Tensor, "n ..."]:
    """Standard normal noise of ``shape`` per seed; row i depends on ``seeds[i]`` only."""
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows)


@torch.no_grad()
def denoising_losses(
    model: Diffusion,
    pictures: Pictures,
    *,
    seed: int = 0,
    timesteps: Sequence[float] | int = 8,
    batch: int | None = None,
) -> Float[Tensor, " n"]:
    """Mean squared error of the denoiser's prediction, per picture.

    Noise is fixed per picture and times are a fixed grid, so two adapters are compared on the very
    same terms: their difference has far less variance than with random draws.

    Parameters
    ----------
    model : Diffusion
    pictures : Pictures
        Of the model's size.
    seed : int
        Of the noise.
    timesteps : int or sequence of float
        How many, or the times themselves, in [0, 1].
    batch : int, optional
        Pictures at a time; default the model's own.

    Returns
    -------
    Tensor of shape (n,), float64
        In the units of the model's latents, squared; unweighted mean over the times.
    """
    times = default_timesteps(timesteps) if isinstance(timesteps, int) else list(timesteps)
    step = batch or model.batch
    for module in model.modules.values():
        module.eval()  # a loader may have added modules in training mode, with dropout
    with single_threaded() if model.small else nullcontext():
        clean = model.clean(pictures)
        noise = fixed_noise([seed * 100_003 + i for i in range(len(clean))], clean.shape[1:])
        total = torch.zeros(len(clean), dtype=torch.float64)
        for low in range(0, len(clean), step):
            rows = slice(low, low + step)
            x0, e = clean[rows].to(model.device), noise[rows].to(model.device)
            condition = model.condition(pictures.captions[rows])
            for t in times:
                x, wanted = model.noisy(x0, e, t)
                wrong = model.predict(x, t, condition).float() - wanted
                total[rows] += wrong.pow(2).flatten(1).mean(dim=1).double().cpu()
    return total / len(times)


@contextmanager
def optional(purpose: str) -> Iterator[None]:
    """Import optional packages inside; a missing one becomes an error a user can act on.

    Raises
    ------
    MissingDependency
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependency(
            f"{purpose} needs the package {error.name!r}.", fix="pip install 'regraft[demo]'"
        ) from error


def not_whole(error: Exception, folder: Path) -> CannotRun:
    """What a library said when it could not load ``folder``, as an error a user can act on."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CannotRun(
        f"The base could not be loaded: {first}",
        file=folder,
        fix="Check that the folder is whole; download it again.",
    )
