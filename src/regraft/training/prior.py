"""Prior preservation: pictures of the class, so that the base keeps what it knows of it.

DreamBooth (arXiv 2208.12242), and SVDiff with it: the loss is L + λ L_prior, where L_prior is the
same loss on pictures of the class ("a dog"), best drawn from the bare base itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from regraft.errors import BadData, BadOption
from regraft.files import atomic_file
from regraft.running import Diffusion, Model, Pictures, optional
from regraft.training.denoising import Denoising
from regraft.training.facts import seed_of
from regraft.training.settings import Settings
from regraft.training.subjects import read_subjects

Progress = Callable[[str, int, int], None]
#: Pictures that are drawn at a time. A model's bits may depend on it, so it is always the same.
_CHUNK = 8


def prior_for(
    model: Model,
    settings: Settings,
    *,
    base: str,
    folder: Path,
    running: AbstractContextManager[Any],
    progress: Progress,
) -> Denoising | None:
    """The objective of the class pictures of a run; None if it has none.

    Parameters
    ----------
    base : str
        Says which base it is; the model must be bare.
    folder : Path
        Where pictures that were drawn are kept; those that are there are not drawn again.
    running : context
        What the base must run in.

    Raises
    ------
    BadOption
        The base is a language model.
    BadData, InputNotFound, MalformedFile, OutputFailed, MissingDependency
    """
    if settings.prior is None and not settings.prior_prompt:
        return None
    if not isinstance(model, Diffusion):
        raise BadOption(
            "Prior preservation is for pictures, and this base is a language model.",
            fix="Leave out the prior, or add such texts to the data.",
        )
    found: list[tuple[Pictures, list[str]]] = []
    if settings.prior is not None:
        found.append(read_subjects(settings.prior, model))
    count, prompts = settings.prior_count, settings.prior_prompt
    with running:
        for i, prompt in enumerate(prompts):
            words = hashlib.sha256(f"{base} {settings.precision} {settings.seed} {prompt}".encode())
            seeds = [seed_of(settings.seed, "prior", prompt, j) for j in range(count)]

            def drawn(done: int, before: int = i * count) -> None:
                progress("drawing class pictures", before + done, len(prompts) * count)

            images = _drawn(model, prompt, seeds, folder, words.hexdigest()[:12], drawn)
            found.append((Pictures(images, [prompt] * count), [prompt] * count))
    images = np.concatenate([pictures.images for pictures, _ in found])
    captions = [caption for pictures, _ in found for caption in pictures.captions]
    classes = [name for _, names in found for name in names]
    made = Denoising(
        model,
        Pictures(images, captions),
        settings.snr_gamma,
        subjects=classes,
        cut_mix=settings.cut_mix,
        template=settings.cut_mix_prompt,
    )
    made.begin(range(made.count), optional=True)
    if settings.cut_mix and made.mixer is None:
        made.notes.append("the class pictures are of one class, so they were not mixed")
    return made


def _drawn(
    model: Diffusion,
    prompt: str,
    seeds: list[int],
    folder: Path,
    key: str,
    progress: Callable[[int], None],
) -> np.ndarray:
    """One picture for each seed: uint8 (n, height, width, 3); kept as ``KEY-NUMBER.png``."""
    with optional("Keeping pictures"):
        from PIL import Image

    done: list[np.ndarray] = []
    for low in range(0, len(seeds), _CHUNK):
        progress(low)
        chunk = seeds[low : low + _CHUNK]
        paths = [folder / f"{key}-{low + i:05d}.png" for i in range(len(chunk))]
        if not all(path.is_file() for path in paths):
            drawn = model.sample([prompt] * len(chunk), chunk)
            for path, picture in zip(paths, drawn, strict=True):
                with atomic_file(path, overwrite=True) as temporary:
                    Image.fromarray(picture).save(temporary, format="PNG")
        for path in paths:
            try:
                with Image.open(path) as opened:
                    done.append(np.asarray(opened.convert("RGB")))
            except (OSError, SyntaxError) as error:
                raise BadData(
                    f"A class picture that was drawn cannot be read: {error}.",
                    file=path,
                    fix="Delete it: it is drawn again.",
                ) from error
    progress(len(seeds))
    return np.stack(done)
