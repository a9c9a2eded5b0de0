"""Pickled checkpoints: refused, unless they are asked for; then read in a process of their own.

A pickle is a program for the unpickler. torch's ``weights_only`` reader runs only instructions that
make tensors, but it has had holes: CVE-2025-32434 ran code in spite of it (fixed in torch 2.6). So
inside :func:`allow_pickles` a file is unpickled by :mod:`regraft.files.pickle_child` in another
process, with limits, and what is read here is only the safetensors copy it leaves. Without
``weights_only`` nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch

from regraft.errors import (
    InputNotFound,
    MalformedFile,
    MissingDependency,
    OutputFailed,
    PickleRefused,
    RegraftError,
)
from regraft.files import pickle_child
from regraft.files.tensorfile import refuse_pickle

#: What a user who allows pickles is told.
WARNING = (
    "A pickled file is a program: opening one from a stranger can run what they wrote. It is read "
    "in a separate process that takes tensors only (weights_only), but such readers have had holes "
    "(CVE-2025-32434). Allow it only for files you trust; .safetensors needs no trust."
)
#: Small files that say what the weights beside them are.
_BESIDE = ("adapter_config.json", "config.json")
#: Pickled names → the name that safetensors files of the same kind have.
_STEMS = {"pytorch_model": "model"}
_MEMORY, _WRITTEN, _SECONDS = 512 << 20, 64 << 20, 60


@dataclass
class PickleGate:
    """The copies made inside one :func:`allow_pickles`, and what a reader should know of them."""

    folder: Path
    copies: dict[Path, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


_OPEN: ContextVar[PickleGate | None] = ContextVar("regraft_pickles", default=None)
#: Copy → the pickle it was made of; for all threads, which a context is not.
_ORIGINALS: dict[Path, Path] = {}


@contextmanager
def allow_pickles() -> Iterator[PickleGate]:
    """Inside it, pickled checkpoints are read; see the module's text for how.

    The safetensors copies live in a private temporary folder until the block ends, so a base or an
    adapter opened inside it cannot be read afterwards.

    Raises
    ------
    MissingDependency
        torch is older than 2.6, whose ``weights_only`` reader can be made to run code.
    """
    numbers = [int(n) for n in re.findall(r"\d+", torch.__version__)[:2]]
    if numbers < [2, 6]:
        raise MissingDependency(
            f"Reading pickles needs torch 2.6 or later; this is {torch.__version__} "
            "(CVE-2025-32434).",
            fix="pip install --upgrade torch, or use .safetensors files.",
        )
    gate = PickleGate(Path(tempfile.mkdtemp(prefix="regraft-")))
    token = _OPEN.set(gate)
    try:
        yield gate
    except RegraftError as error:
        # The user knows the file they gave, not our copy.
        if error.file:
            error.file = str(original(Path(error.file)))
        raise
    finally:
        _OPEN.reset(token)
        for copy in gate.copies.values():
            _ORIGINALS.pop(copy, None)
        shutil.rmtree(gate.folder, ignore_errors=True)


def pickles_allowed() -> bool:
    """Whether this is inside :func:`allow_pickles`."""
    return _OPEN.get() is not None


def original(path: Path) -> Path:
    """The pickled file that ``path`` is the copy of; else ``path`` itself."""
    return _ORIGINALS.get(path, path)


def unpickled(path: Path) -> Path:
    """The safetensors copy of a pickled checkpoint.

    Raises
    ------
    PickleRefused
        Pickles are not allowed here, or this one asks for more than tensors.
    MalformedFile
        It is no checkpoint, or needs more memory or time than its size explains.
    """
    gate = _OPEN.get()
    if gate is None:
        refuse_pickle(path)
    assert gate is not None
    path = path.absolute()
    if path not in gate.copies:
        # The folder keeps its name: adapters and bases are called by it.
        folder = gate.folder / str(len(gate.copies)) / (path.parent.name or "root")
        folder.mkdir(parents=True)
        copy = folder / f"{_STEMS.get(path.stem, path.stem)}.safetensors"
        for name in _BESIDE:
            with suppress(OSError):
                shutil.copyfile(path.parent / name, folder / name)
        left = _convert(path, copy, gate.folder)
        if left:
            listed = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
            gate.notes.append(f"{path.name}: what is not a named tensor was left out ({listed}).")
        gate.copies[path] = copy
        _ORIGINALS[copy] = path
    return gate.copies[path]


def _convert(path: Path, copy: Path, folder: Path) -> list[str]:
    """Run the child; the names of what it left out."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputNotFound(
            f"The file cannot be read: {error.strerror or error}.", file=path
        ) from error
    seconds = _SECONDS + size // (20 << 20)
    written = 2 * size + _WRITTEN
    if shutil.disk_usage(folder).free < min(written, size + _WRITTEN):
        raise OutputFailed(
            "There is no room for a safetensors copy of the pickle.",
            file=folder,
            fix="Free some space, or set TMPDIR to another disk.",
        )
    order = {
        "path": str(path),
        "out": str(copy),
        "sys_path": [p for p in sys.path if p and Path(p).is_absolute()],
        "memory": 2 * size + _MEMORY,
        "seconds": seconds,
        "written": written,
    }
    kept = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    own = {"OMP_NUM_THREADS": "1", "HOME": str(folder), "TMPDIR": str(folder)}
    answer = folder / "answer.json"
    try:
        with open(answer, "wb") as out:
            done = subprocess.run(
                [sys.executable, "-I", "-B", pickle_child.__file__],
                input=json.dumps(order).encode(),
                stdout=out,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={k: os.environ[k] for k in kept if k in os.environ} | own,
                timeout=3 * seconds,
                check=False,
            )
        text = answer.read_bytes()[: 1 << 16]
    except subprocess.TimeoutExpired:
        raise _malformed(path, "reading it took too long") from None
    except OSError as error:
        raise OutputFailed(
            f"The pickle could not be copied: {error.strerror or error}.", file=path
        ) from error
    if done.returncode == pickle_child.CAUGHT:
        raise PickleRefused(
            "This pickle tried to do something while it was read; it was stopped.",
            file=path,
            fix="Do not use this file, with any tool.",
        )
    try:
        said = json.loads(text)
        if done.returncode or not isinstance(said, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise _malformed(path, "it took more memory or time than its size explains") from None
    if "refused" in said:
        raise PickleRefused(
            f"This pickle asks for more than tensors: {said['refused']}.",
            file=path,
            fix="Ask its author for a .safetensors file. It is not read in any other way.",
        )
    if "malformed" in said:
        raise _malformed(path, str(said["malformed"]))
    return [str(name)[:80] for name in said.get("left", [])]


def _malformed(path: Path, why: str) -> MalformedFile:
    return MalformedFile(
        f"Not a pickled checkpoint that can be read: {why}.",
        file=path,
        fix="Download it again, or ask its author for a .safetensors file.",
    )
