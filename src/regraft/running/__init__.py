"""Running: a base as a model that runs, with or without an adapter."""

from regraft.running.applied import applied, random_like
from regraft.running.model import (
    Diffusion,
    Language,
    Model,
    Pictures,
    Text,
    Texts,
    default_timesteps,
    denoising_losses,
    optional,
)
from regraft.running.open import open_model

__all__ = [
    "Diffusion",
    "Language",
    "Model",
    "Pictures",
    "Text",
    "Texts",
    "applied",
    "default_timesteps",
    "denoising_losses",
    "open_model",
    "optional",
    "random_like",
]
