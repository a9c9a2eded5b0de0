"""Updates: what an adapter does at one site, held in factors, never as a full matrix.

Every update gives ``factors() -> (left, right)`` with ΔW = left @ right, scale included. ΔW is seen
as a matrix with one row per output: a convolution weight (out, in, kh, kw) is (out, in·kh·kw).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from regraft.errors import ShapeMismatch

#: How a file stores the two factors of this site. ``transposed`` is GPT-2's Conv1D and
#: ``embedding`` an embedding table: the base stores (in, out), so ΔW = (B A)ᵀ.
Layout = Literal["linear", "conv", "transposed", "embedding"]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The (rows, columns) of a weight seen as a matrix."""
    return shape[0], prod(shape[1:])


def balance(
    left: Float[Tensor, "m r"], right: Float[Tensor, "r n"]
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """The same product with equal norms per rank direction.

    It keeps fp16 files away from under- and overflow. A zero direction stays zero.
    """
    a, b = left.norm(dim=0), right.norm(dim=1)
    size = torch.where((a > 0) & (b > 0), a.sqrt() / b.sqrt(), torch.ones_like(a))
    return left / size, right * size[:, None]


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · up @ down (LoRA, arXiv 2106.09685).

    Parameters
    ----------
    up : Tensor of shape (m, r)
    down : Tensor of shape (r, n)
        For a convolution n = in·kh·kw.
    scale : float
        alpha / rank (rsLoRA: alpha / √rank).
    shape : tuple of int
        The shape of the base's weight.
    layout : str
        How files store it.

    Raises
    ------
    ShapeMismatch
        The factors do not multiply to ``shape``.
    """

    up: Float[Tensor, "m r"]
    down: Float[Tensor, "r n"]
    scale: float
    shape: tuple[int, ...]
    layout: Layout = "linear"

    def __post_init__(self) -> None:
        m, n = matrix_shape(self.shape)
        if self.up.shape != (m, self.rank) or self.down.shape != (self.rank, n):
            raise ShapeMismatch(
                f"Factors {tuple(self.up.shape)} and {tuple(self.down.shape)} do not make an "
                f"update of a weight {self.shape}."
            )

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def factors(self) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """(left, right) in fp32 with ΔW = left @ right."""
        return self.up.float() * self.scale, self.down.float()

    def with_factors(self, left: Tensor, right: Tensor, shape: tuple[int, ...]) -> LowRank:
        """The same kind of update with other factors, scale 1, balanced norms."""
        up, down = balance(left, right)
        return replace(self, up=up, down=down, scale=1.0, shape=shape)


@dataclass(frozen=True)
class Spectral:
    """ΔW = U ΔΣ Vᵀ in a pair of orthonormal bases (LoRA-X, arXiv 2501.16559, Eq. 1).

    Parameters
    ----------
    u : Tensor of shape (m, r)
    core : Tensor of shape (r,) or (r, r)
        ΔΣ, diagonal or full.
    v : Tensor of shape (n, r)
    shape : tuple of int
        The shape of the base's weight.
    """

    u: Float[Tensor, "m r"]
    core: Float[Tensor, ...]
    v: Float[Tensor, "n r"]
    shape: tuple[int, ...]
    layout: Layout = "linear"

    def __post_init__(self) -> None:
        m, n = matrix_shape(self.shape)
        r = self.rank
        if self.u.shape != (m, r) or self.v.shape != (n, r):
            raise ShapeMismatch(
                f"Bases {tuple(self.u.shape)} and {tuple(self.v.shape)} do not make an update of "
                f"a weight {self.shape}."
            )
        if tuple(self.core.shape) not in {(r,), (r, r)}:
            raise ShapeMismatch(
                f"ΔΣ of shape {tuple(self.core.shape)} is neither ({r},) nor ({r}, {r})."
            )

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    @property
    def diagonal(self) -> bool:
        return self.core.ndim == 1

    def factors(self) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """(left, right) in fp32 with ΔW = left @ right."""
        u, core, v = self.u.float(), self.core.float(), self.v.float()
        return (u * core if self.diagonal else u @ core), v.mT

    def low_rank(self) -> LowRank:
        """The same ΔW as a LoRA of the same rank, scale 1."""
        left, right = self.factors()
        empty = LowRank(left, right, 1.0, self.shape, self.layout)
        return empty.with_factors(left, right, self.shape)


Update = LowRank | Spectral


def delta(update: Update) -> Tensor:
    """ΔW in the base's shape, fp32. For tests and small weights: it forms the full matrix."""
    left, right = update.factors()
    return (left @ right).reshape(update.shape)


def same_matrix(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two weight shapes hold the same matrix: equal, or linear against 1×1 convolution."""
    return a == b or (matrix_shape(a) == matrix_shape(b) and set(a[2:]) | set(b[2:]) <= {1})
