"""SVDiff: a shift of every singular value.

Paper: arXiv 2303.11305 (ICCV 2023). With W0 = U diag(σ) Vᵀ, convolutions seen as out × in·kh·kw and
a vector (d,) as a 1 × d matrix, of one singular value:

    ΔW = U (diag(ReLU(σ + δ)) − diag(σ)) Vᵀ

Written by svdiff-pytorch (``<module>.delta``; δ in the order of falling σ). U, σ, V are not in the
file: they are recomputed from the base's weight, so a base in another precision gives another ΔW
(fp16 1–2 %, bf16 5–16 % in tests on synthetic weights). PEFT folders say which weight it was, by
its hash; svdiff-pytorch's files do not. Full rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.update import Dense, matrix_shape
from regraft.errors import ShapeMismatch


def _carried_as(roles: Iterable[str]) -> str:
    return (
        "SVDiff: carried as the exact ΔW that its shifts make on the source at strength 1, "
        "ReLU included; a shift means something between the source's singular vectors only."
    )


@family(
    name="svdiff",
    title="SVDiff",
    paper="https://arxiv.org/abs/2303.11305",
    equation="ΔW = U (diag(ReLU(σ + δ)) − diag(σ)) Vᵀ",
    needs=[("delta",)],
    marks=("delta",),
    needs_base=True,
    carried_as=_carried_as,
)
def build(module: Module) -> Built:
    """ΔW in full, through the base's singular values, each time it is asked for."""
    shift = module.tensors["delta"].float().flatten()
    m, n = matrix_shape(module.shape) if len(module.shape) > 1 else (1, module.shape[0])
    if shift.numel() != min(m, n):
        raise ShapeMismatch(f"{shift.numel()} shifts do not fit a weight {module.shape}.")

    def make() -> Tensor:
        u, s, vh = torch.linalg.svd(module.weight().float().reshape(m, n), full_matrices=False)
        change: Tensor = (u * ((s + shift).clamp_min(0) - s)) @ vh
        return change.reshape(module.shape)

    stored = module.tensors["delta"].dtype
    return {"weight": Dense(make, module.shape, module.layout, stored=stored)}
