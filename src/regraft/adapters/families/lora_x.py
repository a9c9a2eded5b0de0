"""LoRA-X: a change of the singular values in a pair of fixed bases.

Paper: arXiv 2501.16559 (ICLR 2025), Eq. 1: ΔW = Ũ ΔΣ Ṽᵀ. Files bring their bases (docs/formats.md);
or the hash of the weight that they are of, and then whoever reads the file computes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.update import Spectral
from regraft.errors import MalformedFile, ShapeMismatch


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return shapes["core"][0] if shapes["core"] else None


def _carried_as(roles: Iterable[str]) -> str:
    if "u" in roles:
        return ""
    return "LoRA-X: the file leaves its bases out; they were computed from the source's weights."


@family(
    name="lora-x",
    title="LoRA-X",
    paper="https://arxiv.org/abs/2501.16559",
    equation="ΔW = U ΔΣ Vᵀ",
    needs=[("u", "core", "v"), ("core",)],
    marks=("u", "core", "v"),
    carried_as=_carried_as,
    rank=_rank,
)
def build(module: Module) -> Built:
    """The three tensors as they are; there is no alpha."""
    if module.alpha is not None:
        raise MalformedFile("alpha does not belong with U, S and V: U S Vᵀ is ΔW.")
    if "u" not in module.tensors:
        raise MalformedFile(
            "The file leaves out U and V.", fix="Give the base that it was trained on."
        )
    u, core, v = (module.tensors[role] for role in ("u", "core", "v"))
    if u.ndim != 2 or v.ndim != 2 or 0 in u.shape:
        raise ShapeMismatch(f"Bases {tuple(u.shape)} and {tuple(v.shape)} are not matrices.")
    if u.shape[1] != v.shape[1]:
        raise ShapeMismatch(f"Bases {tuple(u.shape)} and {tuple(v.shape)} differ in rank.")
    return {"weight": Spectral(u, core, v, module.shape, module.layout)}
