"""What a FouRA adapter is told, and what its ``adapter_config.json`` says."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.errors import BadOption
from regraft.tuners.config import TunerConfig
from regraft.tuners.foura.gate import GATES
from regraft.tuners.foura.transforms import TRANSFORMS
from regraft.tuners.registration import key


@dataclass
class FouRAConfig(TunerConfig):
    """FouRA (arXiv 2406.08798): a LoRA between frequencies, with a gate per rank direction.

    Parameters
    ----------
    r : int
        Rank. With the DFT the change of the weight has rank 2r.
    alpha : float
        The change is scaled by alpha / r.
    transform : str
        "dft" (the paper's choice for pictures) or "dct" (its choice for editing), orthonormal,
        along the embedding of each token; along the channels of a convolution.
    gate : str
        "none"; "soft" or "hard", which depend on the input; "frozen", a fixed mask. Only "none"
        and "frozen" have a ΔW; :func:`regraft.tuners.foura.freeze` makes the others frozen.
    gate_hidden : int or None
        Width of the gate's hidden layer; None for r.
    gate_threshold : float
        A hard gate is open above it, in (0, 1).
    init_weights : bool
        B = 0, so that a new adapter changes nothing; False draws B, for tests.

    Raises
    ------
    BadOption
    """

    r: int = 8
    alpha: float = 8.0
    transform: str = "dft"
    gate: str = "hard"
    gate_hidden: int | None = None
    gate_threshold: float = 0.5
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = key("foura")
        for name, known in (("transform", TRANSFORMS), ("gate", GATES)):
            if getattr(self, name) not in known:
                raise BadOption(
                    f"FouRA has no {name} {getattr(self, name)!r}.",
                    fix=f"Known: {', '.join(known)}.",
                )
        if self.r < 1:
            raise BadOption("The rank of FouRA is below 1.", fix="Give r of at least 1.")
        if self.gate_hidden is not None and self.gate_hidden < 1:
            raise BadOption("gate_hidden is below 1.", fix="Leave it out for a width of r.")
        if not 0 < self.gate_threshold < 1:
            raise BadOption("gate_threshold is not between 0 and 1.", fix="0.5 is the default.")
