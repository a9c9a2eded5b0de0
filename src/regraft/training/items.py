"""The data of a run, read as its base needs them."""

from __future__ import annotations

from regraft.errors import BadOption, CannotRun
from regraft.running import Language, Model, Pictures, Texts
from regraft.running.data import read_data
from regraft.running.emoji import Emoji
from regraft.running.stable_diffusion import StableDiffusion
from regraft.training.denoising import Denoising
from regraft.training.objectives import NextToken, Objective
from regraft.training.settings import Settings
from regraft.training.subjects import read_subjects


def objective_for(model: Model, settings: Settings) -> Objective:
    """Read the data of a run as its base needs them.

    Raises
    ------
    BadData, CannotRun, InputNotFound, MalformedFile
    BadOption
        Cut-Mix on a language model.
    """
    if settings.cut_mix and isinstance(model, Emoji | StableDiffusion):
        pictures, subjects = read_subjects(settings.data, model)
        return Denoising(
            model,
            pictures,
            settings.snr_gamma,
            subjects=subjects,
            cut_mix=settings.cut_mix,
            template=settings.cut_mix_prompt,
            unmix=settings.unmix_weight or 0.0,
        )
    items = read_data(settings.data, model)
    if isinstance(model, Emoji | StableDiffusion) and isinstance(items, Pictures):
        return Denoising(model, items, settings.snr_gamma)
    if isinstance(model, Language) and isinstance(items, Texts):
        if settings.cut_mix:
            raise BadOption(
                "Cut-Mix is for pictures, and this base is a language model.", fix="Leave it out."
            )
        goal = NextToken(model, items, settings.length)
        if settings.snr_gamma is not None:
            goal.notes.append("snr_gamma means nothing to a language model")
        return goal
    raise CannotRun(f"Bases such as {model.ref} cannot be trained on yet.")
