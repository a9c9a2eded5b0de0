"""LoRA-X: a change of the singular values in a pair of fixed bases.

Paper: arXiv 2501.16559 (ICLR 2025), Eq. 1: ΔW = Ũ ΔΣ Ṽᵀ. Files bring their bases (docs/formats.md).
"""

from __future__ import annotations

from collections.abc import Mapping

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.update import Spectral
from regraft.errors import MalformedFile, ShapeMismatch


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return shapes["u"][1] if len(shapes["u"]) > 1 else None


@family(
    name="lora-x",
    title="LoRA-X",
    paper="https://arxiv.org/abs/2501.16559",
    equation="ΔW = U ΔΣ Vᵀ",
    needs=[("u", "core", "v")],
    marks=("u", "core", "v"),
    rank=_rank,
)
def build(module: Module) -> Built:
    """The three tensors as they are; there is no alpha."""
    u, core, v = (module.tensors[role] for role in ("u", "core", "v"))
    if module.alpha is not None:
        raise MalformedFile("alpha does not belong with U, S and V: U S Vᵀ is ΔW.")
    if u.ndim != 2 or v.ndim != 2 or 0 in u.shape:
        raise ShapeMismatch(f"Bases {tuple(u.shape)} and {tuple(v.shape)} are not matrices.")
    if u.shape[1] != v.shape[1]:
        raise ShapeMismatch(f"Bases {tuple(u.shape)} and {tuple(v.shape)} differ in rank.")
    return {"weight": Spectral(u, core, v, module.shape, module.layout)}
