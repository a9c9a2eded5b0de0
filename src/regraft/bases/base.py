"""A base: the sites of a checkpoint and lazy access to their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from regraft.adapters import Site
from regraft.errors import NonFiniteTensor
from regraft.files import TensorFile
from regraft.files.finite import is_finite

#: Ranges of a stored tensor's rows, in order; empty means all of them.
Rows = tuple[tuple[int, int], ...]


class Quantised(Protocol):
    """Numbers stored in fewer bits, and how to get them back."""

    @property
    def form(self) -> str:
        """What users call the format, such as "bitsandbytes NF4"."""
        ...

    @property
    def rule(self) -> str:
        """How numbers are made of what is stored; with its bytes, it decides them."""
        ...

    @property
    def stored(self) -> tuple[tuple[TensorFile, str], ...]:
        """Every tensor the numbers come from: the codes first, then scales and whatever else."""
        ...

    def read(self) -> Tensor:
        """The whole weight in fp32, in the shape the model has it."""
        ...


@dataclass(frozen=True)
class Weight:
    """One site's weight: its shape, dtype and where it lies.

    ``native`` is the module name the file itself uses, where it differs from the site's. ``rows``
    says which rows of the stored tensor are this site's, where the file fuses several.
    """

    site: Site
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: TensorFile
    tensor: str
    native: str
    rows: Rows = ()
    quantised: Quantised | None = None

    def read(self) -> Tensor:
        """The weight in fp32."""
        if self.quantised is not None:
            whole = self.quantised.read()
            if not self.rows:
                return whole
            return torch.cat([whole[first:last] for first, last in self.rows])
        return torch.cat([f.read(t).float() for f, t in self.stored()])

    def stored(self) -> list[tuple[TensorFile, str]]:
        """Every stored tensor, or range of rows of one, that the numbers come from."""
        if self.quantised is not None:
            return list(self.quantised.stored)
        if not self.rows:
            return [(self.file, self.tensor)]
        return [(self.file, self.file.rows_of(self.tensor, *pair)) for pair in self.rows]


@dataclass
class Base:
    """A checkpoint an adapter sits on.

    Attributes
    ----------
    ref : str
        What the user called it.
    weights : mapping of Site to Weight
        Every weight of two or more dimensions, in file order of its component.
    others : mapping of Site to Weight
        Everything else an adapter may change: weights of one dimension, biases, bare parameters.
    configs : mapping of component to its ``config.json``
    repo, revision : str or None
        Hub id and commit, when it came from the hub.
    """

    ref: str
    path: Path
    weights: Mapping[Site, Weight]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    others: Mapping[Site, Weight] = field(default_factory=dict)
    repo: str | None = None
    revision: str | None = None

    def __contains__(self, site: object) -> bool:
        return site in self.weights or site in self.others

    def at(self, site: Site) -> Weight:
        """The weight at a site.

        Raises
        ------
        KeyError
        """
        found = self.weights.get(site)
        return self.others[site] if found is None else found

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.component for site in self.weights))

    @property
    def quantised(self) -> dict[str, int]:
        """Form of quantised storage → how many weights have it; empty for an ordinary base."""
        # GGUF's 16-bit weights are a Quantised too where llama.cpp reordered their rows.
        forms = [
            w.quantised.form
            for w in (*self.weights.values(), *self.others.values())
            if w.quantised is not None
            and not (w.dtype.is_floating_point and w.quantised.form.startswith("GGUF"))
        ]
        return dict(Counter(forms).most_common())

    @property
    def name(self) -> str:
        """What to call it in metadata and model cards: the hub id, or the file's own name."""
        if self.repo:
            return self.repo
        path = self.path.resolve()
        return path.stem if path.suffix in (".safetensors", ".gguf") else path.name

    def read(self, site: Site) -> Tensor:
        """The weight as an fp32 tensor in its stored shape.

        Raises
        ------
        NonFiniteTensor
        """
        weight = self.at(site)
        tensor = weight.read()
        if not is_finite(tensor):
            raise NonFiniteTensor(
                "A weight of the base holds NaN or infinity.",
                file=weight.file.path,
                tensor=weight.tensor,
                fix="The checkpoint is damaged; download it again.",
            )
        return tensor

    def matrix(self, site: Site) -> Tensor:
        """The weight as an fp32 matrix with one row per output (convolutions flattened)."""
        tensor = self.read(site)
        return tensor[:, None] if tensor.ndim == 1 else tensor.flatten(1)
