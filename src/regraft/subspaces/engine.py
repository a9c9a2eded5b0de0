"""Exact top-k singular bases: eigenvectors of the smaller Gram matrix, checked, with fallback.

W = U S Vᵀ. For m ≤ n the eigenvectors of W Wᵀ are U, and V = Wᵀ U / S; the other way round for
m > n. That is several times cheaper than an SVD, and unlike randomised methods it finds the true
subspace (``torch.svd_lowrank`` misses up to half of it on weights with a slowly falling spectrum).
Squaring W costs precision, so the result is checked: the derived side must be orthonormal. If it is
not in fp32, the work is repeated in fp64, and then with a real SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regraft.adapters import rank_for_energy
from regraft.errors import BadOption

#: Name and version of the engine; part of every cache key. Raise it when results may change.
ENGINE = "gram-eigh/1"

#: Largest deviation of VᵀV from I before correction that each stage may show.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}
#: Stripes of a Gram matrix; with n of them (n + 1) / 2n of the products are needed.
_BLOCKS = 5
#: Below this share of the largest singular value, a stage's singular vectors are not trusted.
_FLOOR = {torch.float32: 2e-3, torch.float64: 1e-6}
#: Singular values below this share of the largest are taken as zero: they span no subspace.
_RANK_FLOOR = 1e-6


@dataclass(frozen=True)
class Dimension:
    """How many singular directions a subspace keeps: a number, a share of the energy, or all.

    Exactly one of the three is set. ``full`` means complete orthonormal bases of both sides, so
    both projectors are the identity and nothing needs to be decomposed.
    """

    k: int | None = None
    share: float | None = None
    full: bool = False

    @classmethod
    def parse(cls, text: str | int | float) -> Dimension:
        """ "320" → k, "0.99" → share of energy, "full".

        Raises
        ------
        BadOption
        """
        if text == "full":
            return cls(full=True)
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if number >= 1 and number == int(number):
            return cls(k=int(number))
        if 0 < number < 1:
            return cls(share=number)
        raise BadOption(
            f"{text!r} is not a subspace dimension.",
            fix="Give a number of directions (320), a share of the energy (0.99), or full.",
        )

    def __str__(self) -> str:
        return "full" if self.full else str(self.k if self.k is not None else self.share)


@dataclass(frozen=True)
class Subspace:
    """The top singular directions of one weight.

    Parameters
    ----------
    ut : Tensor of shape (k, m)
        Uᵀ: rows are left singular vectors, fp32, largest entry of each positive.
    vt : Tensor of shape (k, n)
        Vᵀ, signs to match.
    s : Tensor of shape (min(m, n),)
        All singular values, falling.
    engine : str
        Which stage gave the result.
    deviation : float
        Largest entry of |VᵀV − I| before the final correction.
    """

    ut: Float[Tensor, "k m"]
    vt: Float[Tensor, "k n"]
    s: Float[Tensor, " p"]
    engine: str
    deviation: float

    @property
    def k(self) -> int:
        return self.ut.shape[0]

    @property
    def energy_share(self) -> float:
        """Share of ‖W‖² inside the subspace."""
        squares = self.s.double() ** 2
        return float(squares[: self.k].sum() / squares.sum().clamp_min(1e-300))

    def first(self, k: int) -> Subspace:
        """The first ``k`` directions."""
        if k >= self.k:
            return self
        return Subspace(self.ut[:k], self.vt[:k], self.s, self.engine, self.deviation)


def wanted(s: Tensor, dimension: Dimension) -> int:
    """How many directions ``dimension`` means for singular values ``s`` (zeros never count)."""
    nonzero = max(1, int((s > s[0] * _RANK_FLOOR).sum()))
    if dimension.share is not None:
        return min(rank_for_energy(s, dimension.share), nonzero)
    assert dimension.k is not None, "a full dimension needs no decomposition"
    return min(dimension.k, nonzero)


def decompose(weight: Float[Tensor, "m n"], dimension: Dimension) -> Subspace:
    """The top singular directions of ``weight``.

    Parameters
    ----------
    weight : Tensor of shape (m, n)
        fp32, on any device.
    dimension : Dimension
        A number or a share of energy.

    Returns
    -------
    Subspace
        On the CPU. ``k`` is smaller than asked if the weight has lower rank.
    """
    for dtype in (torch.float32, torch.float64):
        found = _gram(weight.to(dtype), dimension)
        if found is not None:
            return found
    return _svd(weight.double(), dimension)


def _gram_matrix(rows: Tensor) -> Tensor:
    """R Rᵀ, of which only the upper blocks are multiplied out."""
    size = rows.shape[0]
    gram = rows.new_empty(size, size)
    step = max(64, -(-size // _BLOCKS))
    for start in range(0, size, step):
        end = min(start + step, size)
        gram[start:end, start:] = rows[start:end] @ rows[start:].mT
        gram[end:, start:end] = gram[start:end, end:].mT
    return gram


def _gram(weight: Tensor, dimension: Dimension) -> Subspace | None:
    m, n = weight.shape
    wide = m <= n
    gram = _gram_matrix(weight if wide else weight.mT)
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    s = values.flip(0).clamp_min(0).sqrt()
    if s[0] == 0:
        return None
    k = wanted(s, dimension)
    # Rank is judged where it can be seen: fp32 Gram values are noise below the floor.
    if s[k - 1] < s[0] * _FLOOR[weight.dtype]:
        return None
    near = vectors[:, -k:].flip(1)
    far = (weight.mT @ near if wide else weight @ near) / s[:k]
    gram_far = far.mT @ far
    deviation = float((gram_far - torch.eye(k, dtype=far.dtype, device=far.device)).abs().max())
    if not deviation <= _TOLERANCE[weight.dtype]:
        return None
    # Same span, orthonormal to rounding.
    lower = torch.linalg.cholesky(gram_far)
    far = torch.linalg.solve_triangular(lower, far.mT, upper=False).mT
    u, v = (near, far) if wide else (far, near)
    name = "gram-fp32" if weight.dtype == torch.float32 else "gram-fp64"
    return _finish(u, v, s, name, deviation)


def _svd(weight: Tensor, dimension: Dimension) -> Subspace:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    k = wanted(s, dimension) if s[0] > 0 else 1
    return _finish(u[:, :k], vh[:k].mT, s, "svd-fp64", 0.0)


def _finish(u: Tensor, v: Tensor, s: Tensor, engine: str, deviation: float) -> Subspace:
    signs = torch.sign(u.gather(0, u.abs().argmax(dim=0, keepdim=True))[0])
    ut = (u * signs).mT.float().cpu().contiguous()
    vt = (v * signs).mT.float().cpu().contiguous()
    return Subspace(ut, vt, s.float().cpu(), engine, deviation)
