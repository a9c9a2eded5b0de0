"""QA-LoRA: A reads pooled inputs, one number for each quantisation group.

Paper: arXiv 2309.14717 (ICLR 2024). Groups of L inputs; A is (r, n/L), E repeats its columns:

    ΔW = c · B A E

The constant depends on who wrote the file, and the file does not say:

* the authors' repository averages each group: c = s / L ("mean");
* PEFT (``use_qalora``, on GPTQ layers) averages and multiplies by the number of groups:
  c = s (n/L) / L ("peft");
* the paper's text sums: c = s ("sum").

s = alpha / r. The setting ``qalora_pool`` names one of the three; PEFT's own config implies "peft".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import out_in
from regraft.adapters.update import LowRank
from regraft.errors import FamilyNotYet, ShapeMismatch


def chosen(settings: Mapping[str, Any]) -> bool:
    """Whether the settings mean QA-LoRA."""
    return bool(settings.get("use_qalora") or settings.get("qalora_pool"))


def is_pooled(module: Module) -> bool:
    """Whether A is narrower than the weight by a whole factor while B fits."""
    m, n = out_in(module)
    a, b = module.tensors["down"], module.tensors["up"]
    return (
        len(module.shape) == a.ndim == b.ndim == 2
        and b.shape == (m, a.shape[0])
        and a.shape[1] < n
        and n % a.shape[1] == 0
    )


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return shapes["down"][0] if shapes["down"] else None


@family(
    name="qa-lora",
    title="QA-LoRA",
    paper="https://arxiv.org/abs/2309.14717",
    equation="ΔW = c B A E",
    needs=[("down", "up")],
    needs_base=False,
    chosen=chosen,
    rank=_rank,
)
def build(module: Module) -> Built:
    """ΔW in factors of the file's rank, A's columns repeated over their groups."""
    rank = module.rank_of("down")
    module.rank_of("up")
    a, b = module.tensors["down"], module.tensors["up"]
    m, n = out_in(module)
    if module.layout == "transposed" or len(module.shape) > 2 or b.shape != (m, rank):
        raise ShapeMismatch(f"{module.name} is not a QA-LoRA of a weight {module.shape}.")
    if a.shape[1] == n:  # PEFT pools on GPTQ layers only; elsewhere this is plain LoRA
        return {"weight": LowRank(b, a, module.scale(rank), module.shape, module.layout)}
    if not is_pooled(module):
        raise ShapeMismatch(f"A of {tuple(a.shape)} does not pool {n} inputs.")
    groups = a.shape[1]
    length = n // groups
    pool = module.settings.get("qalora_pool") or (
        "peft" if module.settings.get("use_qalora") else None
    )
    constants = {"peft": groups / length, "mean": 1 / length, "sum": 1.0}
    if pool not in constants:
        raise FamilyNotYet(
            f"QA-LoRA with pooling {pool!r} is not known.",
            fix="Set qalora_pool in its adapter_config.json: peft, mean (the authors') or sum.",
        )
    wide = a.float().repeat_interleave(length, dim=1)
    scale = module.scale(rank) * constants[pool]
    return {"weight": LowRank(b.float(), wide, scale, module.shape, module.layout)}
