"""The state of an unfinished run, in ``OUT.training/`` beside the output.

One file, replaced in one step, holds all that a step changes. A step's draws and learning rate
depend on its number, so nothing else is needed to go on exactly as the run would have.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from regraft.errors import BadOption, MalformedFile, OutputExists, OutputFailed
from regraft.files import atomic_file

LOG, SAMPLES, PICTURES = "log.csv", "samples.jsonl", "pictures"
_PNG = re.compile(r"step-\d+\.png")
_DRAWN = re.compile(r"[0-9a-f]{12}-\d{5,}\.png")


class Unfinished:
    """The folder of an unfinished run."""

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(output.name + ".training")
        self.state = self.folder / "state.pt"
        self.log = self.folder / LOG
        self.samples = self.folder / SAMPLES
        self.pictures = self.folder / PICTURES
        self.prior = self.folder / "prior"

    def begin(self, *, resume: bool, overwrite: bool) -> None:
        """Say whether a run may begin, and forget the one before where that was asked for.

        Raises
        ------
        OutputExists
            An unfinished run is there, and nothing says what to do with it.
        """
        if resume or not self.state.exists():
            return
        if not overwrite:
            raise OutputExists(
                "An unfinished run of this output is there.",
                file=self.folder,
                fix="Pass --resume to go on, or --overwrite to begin again.",
            )
        self.remove()

    @contextmanager
    def logging(self, before: str) -> Iterator[TextIO]:
        """The log, open at its end, with the lines of the steps before in it.

        Raises
        ------
        OutputFailed
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = self.log.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise OutputFailed(
                f"The log cannot be written: {error.strerror or error}.",
                file=self.log,
                fix="Check the path, free space and permissions.",
            ) from error
        with log:
            log.write(before)
            yield log

    def load(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """The last state, or None; ``facts`` must be those it was saved with.

        Raises
        ------
        BadOption
            The run had other settings, another base or other data.
        MalformedFile
        """
        path = self.state
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            before: dict[str, Any] = json.loads(state["facts"])
        except (
            *(OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError),
            pickle.UnpicklingError,
        ) as error:
            raise MalformedFile(
                "The state of the unfinished run cannot be read.",
                file=path,
                fix="Pass --overwrite without --resume to begin again.",
            ) from error
        other = _differences(before, facts)
        if other:
            raise BadOption(
                f"The unfinished run had another {', '.join(other)}.",
                file=path,
                fix="Resume it with the settings it began with, or begin again with --overwrite.",
            )
        return state

    def keep_picture(self, step: int, png: bytes) -> None:
        """Keep the pictures of a checkpoint until the output takes them.

        Raises
        ------
        OutputFailed
        """
        with atomic_file(self.pictures / f"step-{step}.png", overwrite=True) as path:
            path.write_bytes(png)

    def keep_samples(self, lines: str) -> None:
        """Show the completions so far; the state holds them too.

        Raises
        ------
        OutputFailed
        """
        with atomic_file(self.samples, overwrite=True) as path:
            path.write_text(lines, encoding="utf-8")

    def save(self, state: dict[str, Any], facts: Mapping[str, Any]) -> None:
        """Replace the state; a kill leaves the one before or this one.

        Raises
        ------
        OutputFailed
        """
        with atomic_file(self.state, overwrite=True) as path:
            torch.save({**state, "facts": json.dumps(facts, sort_keys=True)}, path)

    def remove(self) -> None:
        """Once the output is there; nothing but what this class wrote."""
        for path in (self.state, self.log, self.samples):
            path.unlink(missing_ok=True)
        for folder, names in ((self.pictures, _PNG), (self.prior, _DRAWN)):
            for path in folder.glob("*.png"):
                if names.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        for folder in (self.pictures, self.prior, self.folder):
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs: a setting by its name, the rest by what it is of."""
    found: list[str] = []
    for key in sorted({*before, *now}):
        was, is_ = before.get(key), now.get(key)
        if was == is_:
            continue
        if key == "settings" and isinstance(was, Mapping) and isinstance(is_, Mapping):
            found += [k for k in sorted({*was, *is_}) if was.get(k) != is_.get(k)]
        else:
            found.append(key)
    return found
