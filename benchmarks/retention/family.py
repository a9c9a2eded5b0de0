"""What the battery asks of a family of bases."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from regraft.running import Model, open_model


class Family(ABC):
    """One kind of base of the lab, its tasks, and how a model is scored.

    Parameters
    ----------
    assets : Path
        The lab's assets of this kind.
    quick : bool
        Fewer pictures and texts.
    """

    kind: str
    upgrades: Sequence[str]
    tasks: Sequence[str]

    def __init__(self, assets: Path, *, quick: bool = False) -> None:
        self.assets = assets
        self.quick = quick
        self._open: tuple[str, Model] | None = None

    def base(self, name: str) -> Path:
        """The folder of a base."""
        return self.assets / "bases" / name

    def model(self, name: str) -> Model:
        """The base, running; the last one is kept."""
        if self._open is None or self._open[0] != name:
            self._open = (name, open_model(self.base(name)))
        return self._open[1]

    @abstractmethod
    def adapter(self, base: str, task: str, rank: int, seed: int) -> Path:
        """The adapter trained on ``base``."""

    @abstractmethod
    def scores(self, model: Model, task: str) -> dict[str, float]:
        """Cheap metrics by name; the first is the main one."""

    #: where retraining moved a metric by this or less, a share of that means nothing
    margins: Mapping[str, float] = {}
    #: metrics that are scores; the others are losses
    higher_is_better: Sequence[str] = ()
    #: metrics that have no figure for the retrained adapter to be a share of
    without_reference: Sequence[str] = ()

    def hits(self, model: Model, task: str) -> Sequence[bool]:
        """Which single items the model gets right; empty when the family has none."""
        return ()

    def against_bare(self, bare: Sequence[bool], adapted: Sequence[bool]) -> dict[str, float]:
        """Metrics that compare with the bare target item by item."""
        return {}

    @cached_property
    def records(self) -> dict[str, Any]:
        """What the lab measured of every step, from the manifest."""
        manifest = self.assets.parent / "manifest.json"
        if not manifest.exists():
            return {}
        found: dict[str, Any] = json.loads(manifest.read_text())["steps"].get(self.kind, {})
        return found

    def recorded(self, base: str, task: str, rank: int) -> dict[int, dict[str, float]]:
        """Main metric by seed of adapters that were trained and measured, their files not kept."""
        found = {}
        start = f"{base}/{task}-r{rank}-s"
        for name, record in self.records.items():
            if name.startswith(start) and not self.quick:
                found[int(name.removeprefix(start))] = self.main_of(record)
        return found

    @abstractmethod
    def main_of(self, record: dict[str, Any]) -> dict[str, float]:
        """The main metric in an adapter's record."""

    @abstractmethod
    def costly_scores(self, model: Model, task: str) -> dict[str, float]:
        """Metrics on what the model makes; for one seed only."""

    @abstractmethod
    def states(self, base: str) -> dict[str, Tensor]:
        """Hidden states after each block of a bare base, on a few inputs; one row per input."""

    @property
    @abstractmethod
    def data(self) -> list[Path]:
        """The held-out files the scores come from."""

    def seeds(self, base: str, task: str, rank: int) -> list[int]:
        """Training seeds of which there is a file."""
        return [s for s in range(10) if self.adapter(base, task, rank, s).exists()]

    def present(self) -> list[str]:
        """Upgrades whose target is there."""
        return [name for name in self.upgrades if self.base(name).exists()]
