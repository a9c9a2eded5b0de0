"""What a writer is, and the list of all of them.

A dialect that is written is one file here. It says what reads its files, whether it is one file or
a folder, which sites it cannot hold and why (known before any weight is read), and makes the
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from regraft.adapters import Adapter, Site
from regraft.bases import Base
from regraft.errors import BadOption

Tensors = dict[str, Tensor]
#: How changes of weights are stored: in two factors, or whole.
Form = Literal["lora", "diff"]


@dataclass(frozen=True)
class Task:
    """One adapter to be written, already on the target's sites.

    ``dtype`` is that of the stored factors; ``same_base`` says that the target is the base that
    the input was made for.
    """

    adapter: Adapter
    target: Base
    dtype: torch.dtype = torch.float32
    form: Form = "lora"
    same_base: bool = False

    @property
    def components(self) -> tuple[str, ...]:
        """The components that the adapter changes, sorted."""
        return tuple(sorted({site.component for site in self.adapter.updates}))


Refused = dict[Site, str]


@dataclass(frozen=True)
class Writer:
    """A registered writer.

    Attributes
    ----------
    name, read_by : str
        The dialect, and what reads it, in one line.
    refused : function
        The sites that the dialect cannot hold, and why. Raises BadOption where the dialect is
        wrong for the whole adapter.
    tensors : function
        Every tensor of the file, of a task without refused sites.
    folder : bool
        Whether it is a folder of several files.
    forms : tuple of str
    config : function or None
        For folders: the settings that stand beside the tensors.
    holds : str
        What it holds, for the docs.
    instead : str
        The dialect to name in an error's fix where this one can hold nothing.
    """

    name: str
    read_by: str
    refused: Callable[[Task], Refused]
    tensors: Callable[[Task], Tensors]
    folder: bool = False
    forms: tuple[Form, ...] = ("lora",)
    config: Callable[[Task, Mapping[str, Tensor]], dict[str, Any]] | None = None
    holds: str = ""
    instead: str = "peft"


_WRITERS: dict[str, Writer] = {}


def register(writer: Writer) -> Writer:
    """Add a writer; each dialect's file calls this once."""
    if writer.name in _WRITERS:
        raise ValueError(f"two writers called {writer.name}")
    _WRITERS[writer.name] = writer
    return writer


def writers() -> tuple[Writer, ...]:
    """All of them, by name."""
    return tuple(writer for _, writer in sorted(_WRITERS.items()))


def get_writer(name: str) -> Writer:
    """The writer of a dialect.

    Raises
    ------
    BadOption
    """
    if name not in _WRITERS:
        raise BadOption(
            f"No dialect {name!r}.", fix=f"Choose one of {', '.join(sorted(_WRITERS))}."
        )
    return _WRITERS[name]


def listed(names: Iterable[str]) -> str:
    """A few names for a message: the first three, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
