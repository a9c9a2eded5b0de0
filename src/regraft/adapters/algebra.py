"""Exact algebra on products left @ right, without ever forming the product.

An m × n product of rank r costs O((m + n) r²) here; decomposing the product itself costs
O(m n min(m, n)). QR of both factors and an SVD of the r × r core give its exact SVD.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from regraft.errors import NonFiniteTensor

Factors = tuple[Tensor, Tensor]


def inner(a: Factors, b: Factors) -> float:
    """Frobenius inner product ⟨a₀a₁, b₀b₁⟩ = tr((b₀ᵀa₀)(a₁b₁ᵀ))."""
    left = (b[0].mT @ a[0]).double()
    right = (a[1] @ b[1].mT).double()
    return float((left * right.mT).sum())


def energy(factors: Factors) -> float:
    """Squared Frobenius norm of left @ right."""
    return max(inner(factors, factors), 0.0)


def svd_of_product(
    left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]
) -> tuple[Float[Tensor, "m q"], Float[Tensor, " q"], Float[Tensor, "q n"]]:
    """Exact thin SVD of left @ right through two QRs and a small core.

    Returns
    -------
    u, s, vh : Tensors of shape (m, q), (q,), (q, n)
        q ≤ r; the largest entry of each column of ``u`` is positive, so signs are reproducible.

    Raises
    ------
    NonFiniteTensor
        The product is beyond fp32.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    # The core is small: in fp64 it costs nothing and takes two thirds of the error away.
    core = r_left.double() @ r_right.double().mT
    if not torch.isfinite(core.to(left.dtype)).all():  # LAPACK would hang, or say something else
        raise NonFiniteTensor(
            "The change is beyond what fp32 can hold.",
            fix="The file is damaged or its training diverged; use an earlier checkpoint.",
        )
    u, s, vh = (t.to(left.dtype) for t in torch.linalg.svd(core, full_matrices=False))
    return fixed_signs(q_left @ u, s, vh @ q_right.mT)


def top_of_product(
    left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]
) -> tuple[Float[Tensor, " q"], Callable[[int], Factors]]:
    """The singular values of left @ right, and its best approximations.

    For tall factors of full rank the triangles of both QRs are the Cholesky factors of the small
    Gram matrices, here in fp64, and Q itself is never formed: half the time, and as exact
    (2.8e-7 against 3.2e-7 on random products). Others go through :func:`svd_of_product`.

    Returns
    -------
    s : Tensor of shape (q,)
    top : function
        k → (U√S, √S Vᵀ) of the first k directions.
    """
    a, b = _triangle(left), _triangle(right.mT)
    if a is None or b is None:
        u, s, vh = svd_of_product(left, right)
        root = s.sqrt()
        return s, lambda k: (u[:, :k] * root[:k], root[:k, None] * vh[:k])
    core_u, core_s, core_vh = torch.linalg.svd(a @ b.mT)

    def top(k: int) -> Factors:
        root = core_s[:k].sqrt()
        x = torch.linalg.solve_triangular(a, core_u[:, :k] * root, upper=True)
        y = torch.linalg.solve_triangular(b, core_vh[:k].mT * root, upper=True)
        u, v = left @ x.to(left.dtype), right.mT @ y.to(left.dtype)
        u, _, vh = fixed_signs(u, root, v.mT)
        return u, vh

    return core_s.to(left.dtype), top


def _triangle(tall: Float[Tensor, "m r"]) -> Tensor | None:
    """R of the QR of a tall matrix in fp64, by Cholesky; None if it is not tall or not of full
    rank, where Cholesky is no good."""
    m, r = tall.shape
    if m < r:
        return None
    wide = tall.double()
    lower, failed = torch.linalg.cholesky_ex(wide.mT @ wide)
    diagonal = lower.diagonal()
    if failed or not bool(diagonal.min() > 1e-6 * diagonal.max()):
        return None
    upper: Tensor = lower.mT
    return upper


def fixed_signs(
    u: Float[Tensor, "m q"], s: Float[Tensor, " q"], vh: Float[Tensor, "q n"]
) -> tuple[Float[Tensor, "m q"], Float[Tensor, " q"], Float[Tensor, "q n"]]:
    """The same decomposition with the largest entry of each column of ``u`` positive."""
    signs = torch.sign(u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0])
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return u * signs, s, vh * signs[:, None]


def rank_for_energy(s: Float[Tensor, " q"], share: float) -> int:
    """The smallest k with Σ_{i≤k} s_i² ≥ share · Σ s_i² (at least 1)."""
    squares = s.double() ** 2
    total = float(squares.sum())
    if total == 0.0:
        return 1
    kept = squares.cumsum(0) / total
    return min(int((kept < share - 1e-12).sum()) + 1, s.numel())
