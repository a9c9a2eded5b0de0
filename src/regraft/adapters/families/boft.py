"""BOFT: the weight is rotated by a product of sparse rotations, as in a butterfly.

Paper: arXiv 2311.06243. Stage i mixes rows 2ⁱ·b/2 apart, in blocks of size b.

* LyCORIS ``boft`` rotates **outputs**: ``oft_blocks`` (stages, k, b, b), Q, alpha and ``rescale``
  as in OFT, W' = rescale ⊙ R_last … R_0 W0. Its files have OFT's names and one axis more.
* PEFT rotates **inputs**: ``boft_r`` (stages, k, b, b), Q = (X − Xᵀ) / 2, R = (I − Q)(I + Q)⁻¹,
  W' = s ⊙ W0 (R_last … R_0)ᵀ with ``boft_s`` one factor per output. (More than one stage needs its
  CUDA extension to train.) Convolutions: the input side is in·kh·kw.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.adapters.families.oft import constrained, rescale
from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import by_blocks, cayley, changed, out_in
from regraft.adapters.update import Dense
from regraft.errors import ShapeMismatch


@family(
    name="boft",
    title="BOFT",
    paper="https://arxiv.org/abs/2311.06243",
    equation="W = s R_last … R_0 W0, each R orthogonal in blocks",
    needs=[("boft_r", "boft_s"), ("boft_r",)],
    marks=("boft_r", "boft_s"),
    needs_base=True,
)
def build(module: Module) -> Built:
    """PEFT's BOFT: ΔW in full, made from the base's weight each time it is asked for."""
    blocks = module.tensors["boft_r"].float()
    m, side = out_in(module)
    _fits(blocks, side)
    turns, orders = cayley((blocks.mT - blocks) / 2), _dealt(blocks)
    s = module.tensors.get("boft_s")
    if s is not None and s.numel() != m:
        raise ShapeMismatch(f"Factors {tuple(s.shape)} do not fit {m} outputs.")
    factor = 1.0 if s is None else s.float().reshape(m, 1)
    stored = module.tensors["boft_r"].dtype

    def becomes(weight: Tensor) -> Tensor:
        return _stages(turns, orders, weight.mT).mT * factor

    return {"weight": changed(module, becomes, stored)}


def butterfly(module: Module) -> Dense:
    """LyCORIS' BOFT."""
    skew = constrained(module)
    _fits(skew, out_in(module)[0], even=True)
    turns, orders, factor = cayley(skew), _paired(skew), rescale(module)
    stored = module.tensors["oft_blocks"].dtype
    return changed(module, lambda w: _stages(turns, orders, w) * factor, stored)


def _fits(blocks: Tensor, side: int, *, even: bool = False) -> None:
    whole = blocks.ndim == 4 and blocks.shape[1] * blocks.shape[2] == side
    if whole and (blocks.shape[0] > 1 or even):
        b = blocks.shape[2]
        whole = b % 2 == 0 and side % (b << (blocks.shape[0] - 1)) == 0
    if not whole:
        raise ShapeMismatch(f"Blocks {tuple(blocks.shape)} do not make a butterfly of {side}.")


def _stages(turns: Tensor, orders: list[Tensor], weight: Tensor) -> Tensor:
    """R_last … R_0 @ weight, each stage mixing the rows in its own order."""
    for turn, order in zip(turns, orders, strict=True):
        mixed = by_blocks(turn, weight[order])
        weight = torch.empty_like(mixed).index_copy_(0, order, mixed)
    return weight


def _paired(blocks: Tensor) -> list[Tensor]:
    """LyCORIS' order of rows, for each stage: row j beside row j + 2ⁱ·b/2."""
    stages, k, b, _ = blocks.shape
    rows = torch.arange(k * b)
    halves = [(b // 2) << i for i in range(stages)]
    return [rows.reshape(-1, 2, near).transpose(1, 2).flatten() for near in halves]


def _dealt(blocks: Tensor) -> list[Tensor]:
    """PEFT's order of rows, for each stage: undoes putting even groups of b/2 before odd ones."""
    stages, k, b, _ = blocks.shape
    rows = torch.arange(k * b)
    if stages == 1:  # one stage needs no shuffle, so its blocks may be of odd size
        return [rows]
    dealt = [rows.reshape(-1, 1 << i, 2, b // 2).transpose(1, 2).flatten() for i in range(stages)]
    return [order.argsort() for order in dealt]
