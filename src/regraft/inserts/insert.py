"""Inserts as data: prompt vectors, a prefix's keys and values, bottlenecks. None has a ΔW.

Each stands at a :class:`~regraft.adapters.Site`, whose ``parameter`` says which kind it is: the
prompt at the token embedding, a prefix at every attention, a bottleneck at the module it sits on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regraft.adapters import Site
from regraft.tuners.bottleneck.parts import Bottleneck

#: Family → the ``parameter`` of its sites.
FAMILIES = ("prompt", "prefix", "bottleneck")


@dataclass(frozen=True)
class Prompt:
    """Vectors in front of the embedded tokens (Lester et al. 2021, arXiv:2104.08691).

    Parameters
    ----------
    vectors : Tensor of shape (l, d)
        l virtual tokens in the base's embedding space.
    """

    vectors: Float[Tensor, "l d"]


@dataclass(frozen=True)
class KeysValues:
    """What one attention sees in front of its own keys and values (Li & Liang 2021,
    arXiv:2101.00190).

    Parameters
    ----------
    keys, values : Tensor of shape (h, l, e)
        For each of h key heads, l virtual tokens of width e, as they are in the attention's cache:
        keys after their rotation.
    """

    keys: Float[Tensor, "h l e"]
    values: Float[Tensor, "h l e"]


Insert = Prompt | KeysValues | Bottleneck


@dataclass
class InsertAdapter:
    """What a file inserts into a base.

    Attributes
    ----------
    family : "prompt", "prefix" or "bottleneck"
    parts : dict of Site to Insert
        In the base's own order of modules.
    config : dict
        The folder's ``adapter_config.json``.
    refused : dict of str to str
        Tensors that are not carried, and why.
    notes : list of str
    sha256 : str
        Of the weights file.
    dtype : torch.dtype
        Of most of the file's numbers; those in ``parts`` are fp32.
    """

    family: str
    parts: dict[Site, Insert]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sha256: str = ""
    name: str = ""
    dtype: torch.dtype = torch.float32
