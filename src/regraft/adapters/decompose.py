"""Singular value decomposition of a full matrix, in the cheapest way that is exact enough."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from regraft.adapters.algebra import Factors, fixed_signs, svd_of_product

#: U, S, Vᵀ.
SVD = tuple[Tensor, Tensor, Tensor]
#: Up to this size a plain SVD takes a few hundredths of a second.
SMALL = 384


def decompose(matrix: Float[Tensor, "m n"], noise: float = 0.0) -> SVD:
    """A matrix of any size: a small one directly, one of few directions through a sketch, any
    other through its smaller Gram matrix.

    Parameters
    ----------
    matrix : Tensor of shape (m, n), fp32
    noise : float
        The share of its energy that is rounding of the stored numbers, and may be lost.
    """
    if min(matrix.shape) <= SMALL:
        return svd(matrix)
    found = few_directions(matrix, max(noise, 1e-12))
    return by_gram(matrix) if found is None else svd_of_product(*found)


def svd(matrix: Float[Tensor, "m n"]) -> SVD:
    """Thin SVD with reproducible signs."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return fixed_signs(u, s, vh)


def few_directions(matrix: Tensor, noise: float) -> Factors | None:
    """(Q, QᵀM) if a few directions hold all of M but ``noise``, as in a merged LoRA; else None."""
    smallest = min(matrix.shape)
    whole = float(matrix.double().square().sum())
    generator = torch.Generator().manual_seed(0)
    for k in (64, 256):
        if 3 * k > smallest:
            return None
        sketch = matrix @ torch.randn(matrix.shape[1], k, generator=generator)
        q = torch.linalg.qr(sketch)[0]
        core = q.mT @ matrix
        # Pythagoras, good to 1e-6: enough to turn down nearly every matrix of full rank.
        if whole - float(core.double().square().sum()) > max(1e-4, 4 * noise) * whole:
            continue
        lost = float((matrix - q @ core).double().square().sum())
        if lost <= noise * whole:
            return q, core
    return None


def by_gram(matrix: Tensor) -> SVD:
    """U, S, Vᵀ through the eigenvectors of M Mᵀ (or MᵀM, if that is smaller)."""
    m, n = matrix.shape
    if m > n:
        u, s, vh = by_gram(matrix.mT)
        return fixed_signs(vh.mT, s, u.mT)
    q = torch.linalg.eigh(matrix @ matrix.mT)[1].flip(1)
    core = q.mT @ matrix
    s = core.norm(dim=1)
    s, order = s.sort(descending=True)
    q, core = q[:, order], core[order]
    return fixed_signs(q, s, core / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None])
