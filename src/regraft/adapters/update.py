"""Updates: what an adapter does at one site, held in the smallest exact form.

Every form gives ``factors() -> (left, right)`` with ΔW = left @ right, scale included, and its own
cheapest exact decomposition. ΔW is seen as a matrix with one row per output: a convolution weight
(out, in, kh, kw) is (out, in·kh·kw), a bias (out,) is (out, 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import frexp, prod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from regraft.adapters.algebra import Factors, energy, top_of_product
from regraft.adapters.decompose import decompose, svd
from regraft.errors import NonFiniteTensor, ShapeMismatch

#: How a file stores the two factors of this site. ``transposed`` is GPT-2's Conv1D and
#: ``embedding`` an embedding table: the base stores (in, out), so ΔW = (B A)ᵀ.
Layout = Literal["linear", "conv", "transposed", "embedding"]

#: Ranges of rows, in order.
Rows = tuple[tuple[int, int], ...]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The (rows, columns) of a weight seen as a matrix."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


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
class Spectrum:
    """The singular values of ΔW, largest first, and its top singular vectors on request.

    ``top(k)`` gives (U√S, √S Vᵀ), the best approximation of rank k.
    """

    s: Float[Tensor, " q"]
    top: Callable[[int], Factors]


class Update(ABC):
    """ΔW at one site. ``shape`` is the weight's, as the base stores it."""

    shape: tuple[int, ...]
    layout: Layout

    @property
    @abstractmethod
    def rank(self) -> int:
        """A bound on the rank of ΔW, known without computing it."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the file stored it in."""

    @abstractmethod
    def factors(self) -> Factors:
        """(left, right) in fp32 with ΔW = left @ right."""

    def energy(self) -> float:
        """‖ΔW‖², squared Frobenius norm."""
        return energy(self.factors())

    def spectrum(self) -> Spectrum:
        """The exact singular values and vectors, in the cheapest way this form allows."""
        return Spectrum(*top_of_product(*self.factors()))

    def low_rank(self) -> LowRank:
        """The same ΔW as a LoRA, scale 1."""
        return LowRank(*balance(*self.factors()), 1.0, self.shape, self.layout)

    def on(self, shape: tuple[int, ...], layout: Layout) -> Update:
        """The same matrix as the update of a weight of another shape (linear, 1×1 convolution)."""
        return replace(self, shape=shape, layout=layout)  # type: ignore[type-var]

    def rows(self, rows: Rows) -> Update | None:
        """The part of ΔW in some rows of a fused weight; None if it is zero there. Exact.

        Directions that do not reach these rows are left out.
        """
        left, right = self.factors()
        plain = LowRank(left, right, 1.0, self.shape, self.layout)
        return plain.rows(rows)


def _picked(tensor: Tensor, rows: Rows) -> Tensor:
    return torch.cat([tensor[first:last] for first, last in rows])


@dataclass(frozen=True)
class LowRank(Update):
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

    @property
    def dtype(self) -> torch.dtype:
        return self.up.dtype

    def factors(self) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """(left, right) in fp32 with ΔW = left @ right."""
        return self.up.float() * self.scale, self.down.float()

    def low_rank(self) -> LowRank:
        return self

    def rows(self, rows: Rows) -> LowRank | None:
        up = _picked(self.up, rows)
        used = up.any(dim=0)
        if not used.any():
            return None
        down = self.down
        if not used.all():
            up, down = up[:, used], down[used]
        return replace(self, up=up, down=down, shape=(up.shape[0], *self.shape[1:]))

    def with_factors(self, left: Tensor, right: Tensor, shape: tuple[int, ...]) -> LowRank:
        """The same kind of update with other factors, scale 1, balanced norms."""
        up, down = balance(left, right)
        return replace(self, up=up, down=down, scale=1.0, shape=shape)


@dataclass(frozen=True)
class Spectral(Update):
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
    def dtype(self) -> torch.dtype:
        return self.u.dtype

    @property
    def diagonal(self) -> bool:
        return self.core.ndim == 1

    def factors(self) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """(left, right) in fp32 with ΔW = left @ right."""
        u, core, v = self.u.float(), self.core.float(), self.v.float()
        return (u * core if self.diagonal else u @ core), v.mT


@dataclass(frozen=True)
class Kronecker(Update):
    """ΔW = scale · left ⊗ right (LoKr, arXiv 2212.10650 and 2309.14859).

    Parameters
    ----------
    left : Tensor of shape (a, b)
    right : Tensor of shape (c, d)
        For a convolution d = in·kh·kw of its share. ΔW is (a·c, b·d).
    """

    left: Float[Tensor, "a b"]
    right: Float[Tensor, "c d"]
    scale: float
    shape: tuple[int, ...]
    layout: Layout = "linear"

    def __post_init__(self) -> None:
        (a, b), (c, d) = self.left.shape, self.right.shape
        if (a * c, b * d) != matrix_shape(self.shape):
            raise ShapeMismatch(
                f"Factors {(a, b)} ⊗ {(c, d)} do not make an update of a weight {self.shape}."
            )

    @property
    def rank(self) -> int:
        return min(self.left.shape) * min(self.right.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.right.dtype

    def energy(self) -> float:
        norms = self.left.double().square().sum() * self.right.double().square().sum()
        return float(norms) * self.scale**2

    def factors(self) -> Factors:
        found = self.spectrum()
        return found.top(found.s.numel())

    def spectrum(self) -> Spectrum:
        """Singular values of a Kronecker product are the products of its factors'."""
        u1, s1, v1 = svd(self.left.float())
        u2, s2, v2 = svd(self.right.float())
        s, order = (abs(self.scale) * torch.outer(s1, s2)).flatten().sort(descending=True)
        if not torch.isfinite(s[0]):
            raise NonFiniteTensor("The change is beyond what fp32 can hold.")
        count = int((s > s[0] * 1e-7).sum()) if s[0] > 0 else 1
        s, order = s[:count], order[:count]
        sign = -1.0 if self.scale < 0 else 1.0

        def top(k: int) -> Factors:
            i, j = order[:k] // s2.numel(), order[:k] % s2.numel()
            root = s[:k].sqrt()
            left = (u1[:, None, i] * u2[None, :, j]).reshape(-1, i.numel())
            right = (v1[i][:, :, None] * v2[j][:, None, :]).reshape(i.numel(), -1)
            return left * (sign * root), right * root[:, None]

        return Spectrum(s, top)

    def rows(self, rows: Rows) -> Update | None:
        c = self.right.shape[0]
        if all(first % c == 0 and last % c == 0 for first, last in rows):
            left = _picked(self.left, tuple((first // c, last // c) for first, last in rows))
            if not left.any():
                return None
            return replace(self, left=left, shape=(left.shape[0] * c, *self.shape[1:]))
        return super().rows(rows)


@dataclass(frozen=True)
class Dense(Update):
    """ΔW as a full matrix, made when it is asked for and not kept.

    For families whose ΔW has full rank or depends on the base's weight.

    Parameters
    ----------
    make : function
        Gives ΔW in fp32, in ``shape``.
    trained_rank : int or None
        The rank the file was trained at, if its family has one.
    dtype : torch.dtype
    """

    make: Callable[[], Tensor]
    shape: tuple[int, ...]
    layout: Layout = "linear"
    trained_rank: int | None = None
    stored: torch.dtype = torch.float32

    @property
    def rank(self) -> int:
        return min(matrix_shape(self.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.stored

    def matrix(self) -> Float[Tensor, "m n"]:
        """ΔW as a matrix.

        Raises
        ------
        ShapeMismatch
            What was made is not of the weight's shape.
        """
        made = self.make()
        if matrix_shape(tuple(made.shape)) != matrix_shape(self.shape):
            raise ShapeMismatch(
                f"A change {tuple(made.shape)} is not one of a weight {self.shape}."
            )
        return made.float().reshape(matrix_shape(self.shape))

    def energy(self) -> float:
        return float(self.matrix().double().square().sum())

    def factors(self) -> Factors:
        matrix = self.matrix()
        m, n = matrix.shape
        return (torch.eye(m), matrix) if m <= n else (matrix, torch.eye(n))

    def spectrum(self) -> Spectrum:
        """Singular values that rounding of the stored numbers alone can make are left out: a merged
        rank-8 LoRA is of rank 8 again.

        A Gram matrix in fp32 blurs singular values below about 3e-4 of the largest, together less
        than 1e-4 of the energy; the projection on its eigenvectors is exact all the same.

        Raises
        ------
        NonFiniteTensor
            A singular value is beyond fp32.
        """
        matrix = self.matrix()
        # Squares of very large or small numbers are beyond fp32; a power of two changes no bit.
        unit = 2.0 ** (frexp(float(matrix.abs().max()))[1] - 1)
        matrix = matrix / unit
        u, s, vh = decompose(matrix, noise=(0.5 * torch.finfo(self.stored).eps) ** 2)
        # 16 eps: what fp32 arithmetic itself may leave behind.
        floor = max(self._rounding(matrix), 16 * torch.finfo(torch.float32).eps * float(s[0]))
        count = max(1, int((s > floor).sum()))
        u, s, vh = u[:, :count], s[:count] * unit, vh[:count]
        if not torch.isfinite(s[0]):
            raise NonFiniteTensor("The change is beyond what fp32 can hold.")
        root = s.sqrt()
        return Spectrum(s, lambda k: (u[:, :k] * root[:k], root[:k, None] * vh[:k]))

    def _rounding(self, matrix: Tensor) -> float:
        """The largest singular value of rounding errors of this size (independent entries)."""
        m, n = matrix.shape
        typical = float(matrix.norm()) / (m * n) ** 0.5
        return float(0.5 * torch.finfo(self.stored).eps * typical * (m**0.5 + n**0.5))

    def rows(self, rows: Rows) -> Dense:
        size = sum(last - first for first, last in rows)
        return replace(self, make=lambda: _picked(self.make(), rows), shape=(size, *self.shape[1:]))


def delta(update: Update) -> Tensor:
    """ΔW in the base's shape, fp32. For tests and small weights: it forms the full matrix."""
    if isinstance(update, Dense):
        return update.matrix().reshape(update.shape)
    left, right = update.factors()
    return (left @ right).reshape(update.shape)


def same_matrix(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two weight shapes hold the same matrix: equal, or linear against 1×1 convolution."""
    return a == b or (matrix_shape(a) == matrix_shape(b) and set(a[2:]) | set(b[2:]) <= {1})
