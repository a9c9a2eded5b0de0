"""The settings of SVDiff."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.tuners.config import TunerConfig
from regraft.tuners.registration import key


@dataclass
class SVDiffConfig(TunerConfig):
    """Shifts δ of all singular values, trained from zero: W = U diag(ReLU(σ + γδ)) Vᵀ.

    Without ``target_modules``, every linear, convolution, embedding and norm is changed, as in the
    paper. The strength γ is set on the model (``set_scale``); a file means γ = 1. U, σ and V are
    computed from the base, so ``base_hashes`` pins its weights; ``check_base=False`` loads the
    shifts on other weights.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = key("svdiff")
