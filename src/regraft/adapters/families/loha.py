"""LoHa: the Hadamard product of two low-rank matrices.

Papers: FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859. Written by LyCORIS and PEFT.

* ΔW = s · (W1a W1b) ⊙ (W2a W2b), s = alpha / r.
* A product of rank r is a sum of outer products, so the Hadamard product of two is one of rank r²:
  column (i, j) on the left is W1a[:, i] ⊙ W2a[:, j], row (i, j) on the right W1b[i] ⊙ W2b[j].
  LoHa is held so while r² is less than the weight's smaller side, and as a full matrix otherwise.
* Convolutions: the b factors are (r, in·kh·kw). Tucker (LyCORIS ``use_tucker``, PEFT
  ``use_effective_conv2d``): cores ``hada_t1``, ``hada_t2`` (r, r, kh, kw), and the a factors are
  stored turned, (r, out): half = Σ_ij t[i,j,x,y] a[i,o] b[j,n].
* LyCORIS 4.1's ``get_merged_weight`` multiplies by s twice; its forward pass, by which the file was
  trained, does so once, as PEFT and the loaders do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regraft.adapters.algebra import Factors
from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import out_first, out_in
from regraft.adapters.update import Dense, LowRank
from regraft.errors import ShapeMismatch


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return shapes["hada_w1_b"][0] if shapes["hada_w1_b"] else None


@family(
    name="loha",
    title="LoHa",
    paper="https://arxiv.org/abs/2108.06098",
    equation="ΔW = (alpha / r) (W1a W1b) ⊙ (W2a W2b)",
    needs=[
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    ],
    marks=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    rank=_rank,
)
def build(module: Module) -> Built:
    """ΔW as factors of rank r² if that is smaller, else made in full when asked for."""
    tensors = module.tensors
    rank = module.rank_of("hada_w1_b")
    stored = tensors["hada_w1_a"].dtype
    scale = module.scale(rank)
    one, two = _half(module, 1), _half(module, 2)
    m, n = out_in(module)
    for left, right in (one, two):
        if left.shape[0] != m or right.shape[1] != n or left.shape[1] != right.shape[0]:
            raise ShapeMismatch(
                f"Factors {tuple(left.shape)} and {tuple(right.shape)} do not make an update of "
                f"a weight {module.shape}."
            )
    if one[0].shape[1] * two[0].shape[1] < min(m, n):
        up = _rowwise(one[0], two[0])
        down = _rowwise(one[1].mT, two[1].mT).mT
        if module.layout == "transposed":
            up, down = down.mT, up.mT
        return {"weight": LowRank(up, down, scale, module.shape, module.layout)}

    def make() -> Tensor:
        change = (one[0] @ one[1]) * (two[0] @ two[1]) * scale
        return out_first(change, module.layout).reshape(module.shape)

    return {"weight": Dense(make, module.shape, module.layout, rank, stored)}


def _half(module: Module, index: int) -> Factors:
    """One of the two low-rank matrices, as fp32 factors (out, r) and (r, in·kernel)."""
    a = module.tensors[f"hada_w{index}_a"].float()
    b = module.tensors[f"hada_w{index}_b"].float()
    module.rank_of(f"hada_w{index}_a"), module.rank_of(f"hada_w{index}_b")
    core = module.tensors.get(f"hada_t{index}")
    if core is None:
        return a.flatten(1), b.flatten(1)
    if core.ndim < 3 or core.shape[:2] != (a.shape[0], b.shape[0]):
        raise ShapeMismatch(
            f"A core {tuple(core.shape)} does not fit factors {tuple(a.shape)}, {tuple(b.shape)}."
        )
    kernel = torch.einsum("ij...,jn->in...", core.float(), b)
    return a.mT, kernel.reshape(a.shape[0], -1)


def _rowwise(x: Tensor, y: Tensor) -> Tensor:
    """Row by row, the Kronecker product: (m, r) and (m, q) make (m, r·q)."""
    return (x[:, :, None] * y[:, None, :]).flatten(1)
