"""A base: the sites of a checkpoint and lazy access to their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.adapters import Site
from regraft.errors import NonFiniteTensor
from regraft.files import TensorFile
from regraft.files.finite import is_finite


@dataclass(frozen=True)
class Weight:
    """One site's weight: its shape, dtype and where it lies.

    ``native`` is the module name the file itself uses, where it differs from the site's.
    """

    site: Site
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: TensorFile
    tensor: str
    native: str


@dataclass
class Base:
    """A checkpoint an adapter sits on.

    Attributes
    ----------
    ref : str
        What the user called it.
    weights : mapping of Site to Weight
        Every weight of two or more dimensions, in file order of its component.
    configs : mapping of component to its ``config.json``
    repo, revision : str or None
        Hub id and commit, when it came from the hub.
    """

    ref: str
    path: Path
    weights: Mapping[Site, Weight]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    repo: str | None = None
    revision: str | None = None

    def __contains__(self, site: object) -> bool:
        return site in self.weights

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.component for site in self.weights))

    @property
    def name(self) -> str:
        """What to call it in metadata and model cards: the hub id, or the file's own name."""
        if self.repo:
            return self.repo
        path = self.path.resolve()
        return path.stem if path.suffix == ".safetensors" else path.name

    def read(self, site: Site) -> Tensor:
        """The weight as an fp32 tensor in its stored shape.

        Raises
        ------
        NonFiniteTensor
        """
        weight = self.weights[site]
        tensor = weight.file.read(weight.tensor).float()
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
        return self.read(site).flatten(1)
