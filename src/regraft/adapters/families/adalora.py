"""AdaLoRA: LoRA with a diagonal, whose ranks were pruned in training.

Paper: arXiv 2303.10512. Written by PEFT (``ADALORA``): ``lora_A`` (r, in), ``lora_B`` (out, r),
``lora_E`` (r, 1).

    ΔW = lora_alpha / (ranknum + 1e-5) · B (A ⊙ E)

``ranknum`` is the number of directions left. PEFT does not save it and counts the saved ones on
loading. A ``lora_alpha`` of 0 or less stands for r.
"""

from __future__ import annotations

from collections.abc import Mapping

from regraft.adapters.families.lora import low_rank, turned
from regraft.adapters.families.registry import Built, Module, family
from regraft.errors import FamilyNotYet, ShapeMismatch


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return shapes["down"][0] if shapes["down"] else None


@family(
    name="adalora",
    title="AdaLoRA",
    paper="https://arxiv.org/abs/2303.10512",
    equation="ΔW = (alpha / r) B E A",
    needs=[("down", "up", "lora_E")],
    may=("ranknum",),
    marks=("lora_E", "ranknum"),
    rank=_rank,
)
def build(module: Module) -> Built:
    """ΔW as its two factors, E multiplied into A."""
    rank = module.rank_of("down")
    module.rank_of("up")
    a, b, e = (module.tensors[role].float() for role in ("down", "up", "lora_E"))
    if e.numel() != rank:
        raise ShapeMismatch(f"A diagonal {tuple(e.shape)} does not fit rank {rank}.")
    if "lora_alpha" not in module.settings:
        raise FamilyNotYet(
            "An AdaLoRA file does not hold its scale.", fix="Put its adapter_config.json beside it."
        )
    alpha = float(module.settings["lora_alpha"])
    left = float(module.tensors["ranknum"]) if "ranknum" in module.tensors else float(rank)
    scale = (alpha if alpha > 0 else rank) / (left + 1e-5)
    a = a * e.reshape(-1, *[1] * (a.ndim - 1))
    return {"weight": low_rank(a, b, scale, module.shape, turned(module, a, b))}
