"""The settings of LoRA-X."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from regraft.errors import BadOption
from regraft.subspaces.engine import Dimension
from regraft.tuners.config import TunerConfig
from regraft.tuners.registration import key


@dataclass
class LoraXConfig(TunerConfig):
    """ΔW = Ũ ΔΣ Ṽᵀ, with Ũ and Ṽ the base's top singular vectors and ΔΣ trained from zero.

    Parameters
    ----------
    r : int or float
        Number of singular directions, at most the smaller side of a weight; or, between 0 and 1,
        the share of ‖W0‖² that they hold. The paper's is 320.
    core : "diagonal" or "full"
        ΔΣ as r numbers (all of the paper's experiments) or as an r × r matrix (its definition).
    store_bases : bool
        Keep Ũ and Ṽ in the file. Without them the file is r or r² numbers per module, but loads on
        the very same weights only. With a full core it is refused where singular vectors of close
        singular values come out turned among themselves, as they may on another kind of machine.
    signs : dict
        Module → for each column of Ũ the row of its largest entry, which is positive: of a full
        core without its bases. Filled in as ``base_hashes`` is.

    Raises
    ------
    BadOption
    """

    r: float = 320
    core: Literal["diagonal", "full"] = "diagonal"
    store_bases: bool = True
    signs: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = key("lora_x")
        if self.core not in ("diagonal", "full"):
            raise BadOption(
                f"{self.core!r} is not a form of ΔΣ.", fix="Give core='diagonal' or core='full'."
            )
        self.dimension()

    def dimension(self) -> Dimension:
        """How many directions ``r`` means."""
        return Dimension.parse(self.r)
