"""One cell of the catalogue: a family in a dialect on one kind of layer, and who writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

#: The kinds of layer, in the order of the table's columns.
LAYERS = (
    "linear",
    "1×1 conv",
    "3×3 conv",
    "embedding",
    "Conv1D",
    "fused",
    "norm",
    "bias",
)


@dataclass(frozen=True)
class Made:
    """A file as its writer makes it, its base, and ΔW at every site by an oracle of its own."""

    adapter: Path
    base: Path
    wanted: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A family in a dialect on a kind of layer.

    ``outcome`` is "exact", or what the reading's note or refusal must say: "note: …" for exact
    results that need a remark, "refused: …" for what is not carried.
    """

    family: str
    dialect: str
    layer: str
    writer: str
    make: Callable[[Path], Made]
    outcome: str = "exact"
    what: str = ""
    written: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.layer in LAYERS, self.layer

    @property
    def name(self) -> str:
        text = f"{self.family}, {self.dialect}, {self.layer}"
        return f"{text}, {self.what}" if self.what else text
