"""The adapter: the updates of all its sites, what was refused, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from regraft.adapters.update import Update


@dataclass(frozen=True, order=True)
class Site:
    """One weight of a base that an adapter may change.

    ``component`` is the part of a pipeline ("unet", "text_encoder", …; empty for a bare model),
    ``module`` the dotted module name inside it, ``parameter`` the parameter of that module: nearly
    always its ``weight``, which the text form leaves out.
    """

    component: str
    module: str
    parameter: str = "weight"

    def __str__(self) -> str:
        name = f"{self.component}.{self.module}" if self.component else self.module
        return name if self.parameter == "weight" else f"{name}.{self.parameter}".lstrip(".")

    def with_parameter(self, parameter: str) -> Site:
        """Another parameter of the same module."""
        return replace(self, parameter=parameter)


@dataclass
class Adapter:
    """What a file changes on a base.

    Attributes
    ----------
    updates : dict of Site to Update
    family : str
        The families of its modules, the most frequent first ("lora", "loha + lora").
    families : dict of Site to str
        The family of each update.
    dialect : str
        How the file it came from names its tensors.
    prefixed : bool
        Whether a dotted file named the component in front of each module.
    metadata : dict of str to str
        The file's own metadata, kept for the output (trigger words, tags, training settings).
    config : dict
        A PEFT folder's ``adapter_config.json``.
    refused : dict of str to str
        What is not carried, by name, and why.
    notes : list of str
        What a careful reader of the file should know.
    sha256 : str
        Of the weights file.
    """

    updates: dict[Site, Update]
    family: str = "lora"
    families: dict[Site, str] = field(default_factory=dict)
    dialect: str = "peft"
    prefixed: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sha256: str = ""
    name: str = ""

    @property
    def rank(self) -> int:
        """The largest rank of any site."""
        return max((u.rank for u in self.updates.values()), default=0)
