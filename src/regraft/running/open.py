"""Opening a base to run it: what kind it is, from its folder, and the library that loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from regraft.bases import Base
from regraft.errors import CannotRun, MalformedFile
from regraft.files import Located, locate
from regraft.running import emoji
from regraft.running.language import open_language
from regraft.running.model import Model, not_whole
from regraft.running.stable_diffusion import PIPELINES, open_stable_diffusion

_FIX = (
    "Regraft runs Stable Diffusion 1.x, 2.x and XL folders in diffusers' layout, causal language "
    "models in transformers' layout, and its own small bases."
)


def open_model(
    ref: str | Path | Base, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Model:
    """Open a base so that it runs.

    Parameters
    ----------
    ref : str, Path or Base
        Hub id ``org/name[@revision]`` or folder: a diffusers pipeline of Stable Diffusion 1.x, 2.x
        or XL, a causal language model of transformers, or one of Regraft's own small bases. From
        the hub, what running needs beside the weights (VAE, tokenizer) is fetched too.
    device : str
        "cpu", "cuda", "cuda:1", …, or "auto": a GPU if there is one.
    dtype : torch.dtype
        Weights are converted to it.

    Returns
    -------
    Model
        A :class:`Diffusion` or a :class:`Language`.

    Raises
    ------
    CannotRun
        Regraft can read it, perhaps, but not run it, or its folder is not whole.
    MissingDependency
        diffusers or transformers is not installed.
    InputNotFound, HubUnavailable, PickleRefused, MalformedFile
    """
    located = locate(ref.ref if isinstance(ref, Base) else ref, to_run=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    folder = located.path
    if folder.is_file():
        raise CannotRun("A single checkpoint file cannot be run yet.", file=folder, fix=_FIX)
    index, config = _json(folder / "model_index.json"), _json(folder / "config.json")
    if index is not None:
        return _pipeline(located, str(index.get("_class_name")), place, dtype)
    if config is not None and "_diffusers_version" in config:
        raise CannotRun(
            f"This is one part of a pipeline ({config.get('_class_name')}), which does not run "
            "alone.",
            file=folder,
            fix="Give the folder of the whole pipeline.",
        )
    if config is None:
        raise CannotRun(
            "The folder has neither model_index.json nor config.json, so nothing says what it is.",
            file=folder,
            fix=_FIX,
        )
    return open_language(located, config, place, dtype)


def _pipeline(located: Located, name: str, device: torch.device, dtype: torch.dtype) -> Model:
    if name == emoji.CLASS_NAME:
        try:
            pipeline = emoji.load_pipeline(located.path, dtype)
        except (OSError, ValueError) as error:
            raise not_whole(error, located.path) from error
        return emoji.Emoji(located.ref, pipeline, device)
    if name in PIPELINES:
        return open_stable_diffusion(located, name, device, dtype)
    raise CannotRun(f"Pipelines of the class {name} cannot be run.", file=located.path, fix=_FIX)


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise MalformedFile(f"Not valid JSON ({error}).", file=path) from error
    if not isinstance(found, dict):
        raise MalformedFile("Not a JSON object.", file=path)
    return found
