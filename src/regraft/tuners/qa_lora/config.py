"""The settings of QA-LoRA."""

from __future__ import annotations

from dataclasses import dataclass

from regraft.errors import BadOption
from regraft.tuners.config import TunerConfig
from regraft.tuners.registration import key

#: What each pooling multiplies B A E by, beside alpha / r: from n inputs in groups of L.
POOLS = ("sum", "mean", "peft")


def constant(pool: str, inputs: int, length: int) -> float:
    """c in ΔW = c · alpha / r · B A E."""
    return {"sum": 1.0, "mean": 1 / length, "peft": inputs / length**2}[pool]


@dataclass
class QALoraConfig(TunerConfig):
    """ΔW = c · alpha / r · B A E, where E repeats each column of A over a group of L inputs.

    Parameters
    ----------
    r : int
        Rank.
    lora_alpha : float
        The change is scaled by alpha / r.
    qalora_group_size : int or None
        L; it divides a layer's inputs and is a multiple of the group of a quantised weight. None:
        that group, and 32 where the weight has none.
    qalora_pool : str
        How the inputs of a group become one: "sum" (the paper's text, c = 1), "mean" (the
        authors' repository, c = 1 / L), "peft" (PEFT's ``use_qalora``, c = n / L²).
    use_qalora : bool
        Always true; PEFT's name for it.

    Raises
    ------
    BadOption
    """

    r: int = 8
    lora_alpha: float = 8.0
    qalora_group_size: int | None = None
    qalora_pool: str = "sum"
    use_qalora: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = key("qa_lora")
        if self.qalora_pool not in POOLS:
            raise BadOption(
                f"QA-LoRA has no pooling {self.qalora_pool!r}.", fix=f"Known: {', '.join(POOLS)}."
            )
        if self.r < 1:
            raise BadOption("The rank of QA-LoRA is below 1.", fix="Give r of at least 1.")
        if self.qalora_group_size is not None and self.qalora_group_size < 1:
            raise BadOption("The group size is below 1.", fix="32 is usual.")
        if not self.use_qalora:
            raise BadOption("use_qalora is false.", fix="That is a LoRA: use LoraConfig.")
