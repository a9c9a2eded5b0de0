"""VeRA: two trained vectors around random matrices that all layers share.

Paper: arXiv 2310.11454. Written by PEFT (``VERA``); roles ``vera_lambda_b`` (out,),
``vera_lambda_d`` (r,), and the shared ``vera_a`` (r, ≥ in), ``vera_b`` (≥ out, r), which its files
hold once (``save_projection``), cut to each layer:

    ΔW = diag(λ_b) B[:out] diag(λ_d) A[:, :in]
"""

from __future__ import annotations

from collections.abc import Mapping

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import out_in
from regraft.adapters.update import LowRank
from regraft.errors import ShapeMismatch


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return shapes["vera_lambda_d"][0] if shapes.get("vera_lambda_d") else None


@family(
    name="vera",
    title="VeRA",
    paper="https://arxiv.org/abs/2310.11454",
    equation="ΔW = diag(λ_b) B diag(λ_d) A",
    needs=[("vera_lambda_b", "vera_lambda_d", "vera_a", "vera_b")],
    marks=("vera_lambda_b", "vera_lambda_d", "vera_a", "vera_b"),
    rank=_rank,
)
def build(module: Module) -> Built:
    """ΔW as its two factors."""
    module.rank_of("vera_a"), module.rank_of("vera_b")
    names = ("vera_lambda_b", "vera_lambda_d", "vera_b", "vera_a")
    outer, inner, b, a = (module.tensors[role].float() for role in names)
    m, n = out_in(module)
    ranks = {inner.numel(), a.shape[0], b.shape[1]}
    if len(ranks) != 1 or outer.numel() != m or b.shape[0] < m or a.shape[1] < n:
        raise ShapeMismatch(f"The shared matrices of VeRA do not cover a weight {module.shape}.")
    left, right = outer[:, None] * b[:m], inner[:, None] * a[:, :n]
    if module.layout == "transposed":
        left, right = right.mT.contiguous(), left.mT.contiguous()
    return {"weight": LowRank(left, right, 1.0, module.shape, module.layout)}
