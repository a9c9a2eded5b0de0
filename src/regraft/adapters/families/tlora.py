"""T-LoRA: orthogonal factors and a diagonal, less where they started; ranks masked by timestep.

Paper: arXiv 2507.05964. Written by LyCORIS (``tlora``) and the authors.

    ΔW = s (P diag(λ M_t) Q − P0 diag(λ0 M_t) Q0),   s = alpha / r

M_t masks the last ranks at high noise and is all ones at t = 0. We carry ΔW at all ones, which is
what tools without the mask apply. P0, λ0, Q0 are singular vectors and values of W0: the largest
("principal"), smallest ("last") or middle ones. LyCORIS' files do not have them and do not say
which (``sig_type``); they are recomputed, and where no setting says, the triple nearest to P is
taken. A random start cannot be recovered. Rank 2r.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import out_first
from regraft.adapters.update import LowRank
from regraft.errors import FamilyNotYet, ShapeMismatch

_BASE = ("t_base_p", "t_base_lambda", "t_base_q")
Triple = tuple[Tensor, Tensor, Tensor]


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return shapes["t_q"][0] if shapes["t_q"] else None


@family(
    name="t-lora",
    title="T-LoRA",
    paper="https://arxiv.org/abs/2507.05964",
    equation="ΔW = s (P λ Q − P0 λ0 Q0)",
    needs=[("t_q", "t_p", "t_lambda")],
    may=_BASE,
    marks=("t_q", "t_p", "t_lambda", *_BASE),
    needs_base=True,
    rank=_rank,
)
def build(module: Module) -> Built:
    """ΔW in factors of rank 2r, all ranks in play."""
    rank = module.rank_of("t_q")
    module.rank_of("t_p")
    p = module.tensors["t_p"].float().flatten(1)
    q = module.tensors["t_q"].float().flatten(1)
    size = module.tensors["t_lambda"].float().flatten()
    if any(k != 1 for k in module.shape[2:]):
        raise FamilyNotYet(
            f"T-LoRA on a {'×'.join(map(str, module.shape[2:]))} convolution has no ΔW: its "
            "writers put 1×1 factors there."
        )
    m, n = module.shape[:2] if module.layout != "transposed" else module.shape[1::-1]
    if p.shape != (m, rank) or q.shape != (rank, n) or size.numel() != rank:
        raise ShapeMismatch(f"The factors of {module.name} do not fit a weight {module.shape}.")
    p0, size0, q0 = _start(module, p)
    left = torch.cat([p * size, -p0 * size0], 1)
    right = torch.cat([q, q0])
    if module.layout == "transposed":
        left, right = right.mT.contiguous(), left.mT.contiguous()
    made = LowRank(left, right, module.scale(rank), module.shape, module.layout)
    return {"weight": made}


def _start(module: Module, p: Tensor) -> Triple:
    """P0, λ0, Q0: the file's own, or recomputed from the base's weight."""
    if all(role in module.tensors for role in _BASE):
        own = [module.tensors[role].float() for role in _BASE]
        return own[0].flatten(1), own[1].flatten(), own[2].flatten(1)
    weight = out_first(module.weight().float(), module.layout).flatten(1)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    rank, whole = p.shape[1], s.numel()
    middle = max((whole - rank) // 2, 0)
    ranges = {
        "principal": slice(0, rank),
        "last": slice(max(whole - rank, 0), whole),
        "middle": slice(middle, middle + rank),
    }
    said = module.settings.get("sig_type")
    if said in ranges:
        at = ranges[said]
        return u[:, at], s[at], vh[at]
    best, at = max(
        ((_nearness(p, u[:, at]), at) for at in ranges.values()), key=lambda found: found[0]
    )
    if best < 0.5:
        raise FamilyNotYet(
            f"{module.name} did not start from this base's singular vectors, so what T-LoRA "
            "subtracts is unknown.",
            fix="It was trained on another base, or from a random start.",
        )
    return u[:, at], s[at], vh[at]


def _nearness(p: Tensor, start: Tensor) -> float:
    """The mean |cosine| of columns, 0 to 1."""
    p = p[:, : start.shape[1]]
    return float(torch.cosine_similarity(p, start, dim=0).abs().mean())
