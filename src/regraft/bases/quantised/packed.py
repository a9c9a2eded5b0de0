"""What every format gives: one weight's codes, scales and the way back to numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from regraft.errors import MalformedFile, MissingDependency, RegraftError
from regraft.files import TensorFile

#: Tensor name → the file that holds it: all a format may look at when a base is opened.
Names = Mapping[str, TensorFile]
#: A part's own word ("codes", "scale") → the tensor as read.
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Packed:
    """One quantised weight. See :class:`regraft.bases.base.Quantised`.

    ``parts`` names the stored tensors; the first is the codes, whose place in the file is the
    weight's. ``decode`` makes numbers of them, in ``shape`` and any floating dtype. ``mates`` are
    tensors that belong to it but hold no part of its numbers, such as an input's scale. ``plain``
    ones are ordinary floats, with no more than another name.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    parts: Mapping[str, tuple[TensorFile, str]]
    decode: Callable[[Parts], Tensor]
    mates: tuple[str, ...] = ()
    plain: bool = False

    @property
    def rule(self) -> str:
        """Form, shape and everything else that decides the numbers beside the stored bytes."""
        return f"{self.form}|{self.shape}|{_spelled(self.decode)}"

    @property
    def file(self) -> TensorFile:
        return self.stored[0][0]

    @property
    def tensor(self) -> str:
        """The codes' name in the file."""
        return self.stored[0][1]

    @property
    def dtype(self) -> torch.dtype:
        """The codes' dtype."""
        return self.file[self.tensor].dtype

    @property
    def stored(self) -> tuple[tuple[TensorFile, str], ...]:
        return tuple(self.parts.values())

    def read(self) -> Tensor:
        """The whole weight in fp32.

        Raises
        ------
        MalformedFile
            The parts do not fit each other.
        MissingDependency
            The library that reads this format is not installed.
        """
        parts = {word: file.read(tensor) for word, (file, tensor) in self.parts.items()}
        try:
            whole = self.decode(parts)
        except (RegraftError, MemoryError):
            raise
        except Exception as error:  # whatever a library makes of damaged parts
            reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            raise self.malformed(f"it cannot be decoded ({reason})") from error
        if tuple(whole.shape) != self.shape:
            raise self.malformed(f"it decodes to {tuple(whole.shape)} instead of {self.shape}")
        return whole.float()

    def malformed(self, why: str) -> MalformedFile:
        return malformed(self.form, self.file, self.tensor, why)


def _spelled(value: object) -> str:
    """A function with its bound arguments, the same in every process."""
    if isinstance(value, partial):
        return f"{_spelled(value.func)}({', '.join(map(_spelled, value.args))})"
    return value.__name__ if isinstance(value, FunctionType) else repr(value)


def malformed(form: str, file: TensorFile, tensor: str, why: str) -> MalformedFile:
    """The error for a weight whose parts contradict its format."""
    return MalformedFile(
        f"Not a valid {form} weight: {why}.",
        file=file.path,
        tensor=tensor,
        fix="Download it again, or give the 16-bit checkpoint it was made from.",
    )


def need(form: str, tensors: Names, codes: str, *others: str) -> None:
    """Check that the parts a weight cannot do without are there.

    Raises
    ------
    MalformedFile
    """
    for other in others:
        if other not in tensors:
            raise malformed(form, tensors[codes], codes, f"the checkpoint lacks {other}")


def missing(form: str, package: str) -> MissingDependency:
    """The error for a format whose library is not installed."""
    return MissingDependency(
        f"Reading {form} weights needs {package}.", fix="pip install 'regraft[quantised]'"
    )


def transposed(packed: Packed) -> Packed:
    """The same weight with its two dimensions exchanged."""

    def flipped(decode: Callable[[Parts], Tensor], parts: Parts) -> Tensor:
        return decode(parts).T.contiguous()

    rows, columns = packed.shape
    return Packed(
        packed.name,
        packed.form,
        (columns, rows),
        packed.parts,
        partial(flipped, packed.decode),
        packed.mates,
    )


def ending(tensors: Names, end: str) -> Iterator[tuple[str, str, TensorFile]]:
    """(tensor name, the same without ``end``, file) of every tensor whose name ends so."""
    for tensor, file in tensors.items():
        if tensor.endswith(end):
            yield tensor, tensor.removesuffix(end), file


def files(tensors: Names) -> list[TensorFile]:
    """Every file that holds one of the tensors, once."""
    return list({id(file): file for file in tensors.values()}.values())


def settings(file: TensorFile) -> dict[str, Any]:
    """The ``config.json`` beside a weight file; empty without a readable one."""
    return _config(file.path.parent)


@lru_cache(maxsize=64)
def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def method(file: TensorFile) -> dict[str, Any]:
    """``quantization_config`` of the ``config.json`` beside a weight file."""
    found = settings(file).get("quantization_config")
    return found if isinstance(found, dict) else {}
