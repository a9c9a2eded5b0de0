"""One argument, three meanings: a file, a folder, or a hub id ``org/name[@revision]``.

What exists on disk is taken from disk. What can only be a path is never sent to the hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import InputNotFound
from regraft.files.pickle_gate import unpickled
from regraft.files.tensorfile import PICKLE_ENDINGS

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*(@[A-Za-z0-9_./-]+)?")


@dataclass(frozen=True)
class Located:
    """Where an input lies on this disk, and what it was called.

    ``revision`` is the hub commit, when the input came from the hub.
    """

    ref: str
    path: Path
    repo: str | None = None
    revision: str | None = None


def _local(ref: str) -> Path | None:
    if not ref:
        return None  # or Path would take it for the current folder
    try:
        path = Path(ref).expanduser()
        if not path.exists():
            return None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, no such user
        return None
    if path.is_file() and path.suffix.lower() in PICKLE_ENDINGS:
        return unpickled(path)
    return path


def locate(ref: str | Path, *, to_run: bool = False) -> Located:
    """Find an adapter or a base.

    Parameters
    ----------
    ref : str or Path
        A file, a folder, or a hub id ``org/name`` with an optional ``@revision``.
    to_run : bool
        From the hub, fetch also what running the base needs: VAE and tokenizer files.

    Raises
    ------
    InputNotFound
        Nothing on disk has this name and it cannot be a hub id.
    HubUnavailable
        It reads as a hub id, but the hub did not give it.
    PickleRefused
        It is a pickled checkpoint. Inside :func:`regraft.files.allow_pickles` the path is that of
        its safetensors copy.
    """
    text = str(ref)
    found = _local(text)
    if found is not None:
        return Located(text, found)
    is_file = text.lower().endswith((".safetensors", ".gguf", *PICKLE_ENDINGS))
    if isinstance(ref, Path) or is_file or not _HUB_ID.fullmatch(text):
        raise InputNotFound(
            "No such file or folder.",
            file=text,
            fix="Give a file, a folder, or a hub id such as org/name or org/name@revision.",
        )
    from regraft.files.hub import from_hub

    repo, _, revision = text.partition("@")
    folder = from_hub(repo, revision or None, to_run=to_run)
    return Located(text, folder, repo, folder.name)
