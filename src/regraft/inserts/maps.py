"""Affine maps between two activation spaces, in closed form.

With rows x of the one space and y of the other, of the same inputs,

* ridge: A, a = argmin Σ ‖A x + a − y‖² + λ‖A‖² (Hoerl & Kennard 1970), with the λ that does best
  on rows kept back;
* Procrustes: A = c Q, Q = U Vᵀ of Yᵀ X = U Σ Vᵀ and c = tr Σ / ‖Q X‖² (Schönemann 1966), on
  centred rows. Where y is narrower than x, Q is the partial isometry with the greatest ⟨Q X, Y⟩,
  which need not be the one nearest to Y.

* towards a prior: A = Q + argmin_D Σ ‖D x + a − (y − Q x)‖² + λ‖D‖². Ridge alone forgets the
  directions that the inputs hardly vary in, and an insert may well read or write there; this one
  falls back to a rotation, or to no change at all.

All sums are in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regraft.errors import BadOption, ShapeMismatch

#: λ over the mean of Σ x², per feature of x: from hardly any to hardly a map.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
#: The share of rows, the last ones, that a map is judged on.
KEPT_BACK = 0.2
_FEWEST = 2


@dataclass(frozen=True)
class Affine:
    """y ≈ A x + a.

    Attributes
    ----------
    matrix : Tensor of shape (n, m), fp64
    offset : Tensor of shape (n,), fp64
    fit : float
        R² on rows that were kept back: 1 exact, 0 no better than the mean, below 0 worse.
    ridge : float
        The λ that was taken, over the mean of Σ x², per feature of (centred) x.
    """

    matrix: Float[Tensor, "n m"]
    offset: Float[Tensor, " n"]
    fit: float
    ridge: float = 0.0

    def __call__(self, x: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """A point's image, fp64."""
        return self.linear(x) + self.offset

    def linear(self, x: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """A difference's image: without the offset."""
        return x.double() @ self.matrix.mT


def r2(
    wanted: Float[Tensor, "r n"], got: Float[Tensor, "r n"], mean: Tensor | None = None
) -> float:
    """1 − ‖wanted − got‖² / ‖wanted − mean‖², over all numbers; 0 where ``wanted`` does not vary.

    ``mean`` of shape (n,): default that of ``wanted``.
    """
    centre = wanted.mean(dim=0) if mean is None else mean
    spread = float((wanted - centre).square().sum())
    return 1 - float((wanted - got).square().sum()) / spread if spread > 0 else 0.0


def energy_kept(x: Float[Tensor, "r m"], back: Float[Tensor, "r m"]) -> float:
    """1 − ‖x − back‖² / ‖x‖², in [0, 1]; 1 for x = 0. ``back``: x mapped there and back."""
    size = float(x.double().square().sum())
    lost = float((x.double() - back.double()).square().sum())
    return min(1.0, max(0.0, 1 - lost / size)) if size > 0 else 1.0


def ridge(
    x: Float[Tensor, "r m"],
    y: Float[Tensor, "r n"],
    *,
    offset: bool = True,
    prior: Float[Tensor, "n m"] | None = None,
    ridges: tuple[float, ...] = RIDGES,
) -> Affine:
    """The ridge map from x to y.

    Parameters
    ----------
    x, y : Tensors of shape (r, m) and (r, n)
        Rows of one input lie together: the last fifth is kept back to choose λ and to judge the
        map, which is then fitted to all rows.
    offset : bool
        Without, A x alone.
    prior : Tensor of shape (n, m), optional
        The A that λ draws towards; default 0.
    ridges : tuple of float
        The λ to try, over the mean of Σ x², per feature of (centred) x.

    Raises
    ------
    ShapeMismatch
    BadOption
        Too few rows.
    """
    x, y = _checked(x, y)
    back = _kept_back(len(x))
    start = x.new_zeros(y.shape[1], x.shape[1]) if prior is None else prior.double()
    rest = y - x @ start.mT
    known = _Spectrum(x[:-back], rest[:-back], offset)
    centre = y[:-back].mean(dim=0) if offset else y.new_zeros(y.shape[1])
    tried = []
    for strength in ridges:
        matrix, shift = known.solve(strength)
        got = x[-back:] @ (start + matrix).mT + shift
        tried.append((r2(y[-back:], got, centre), strength))
    fit, best = max(tried)
    matrix, shift = _Spectrum(x, rest, offset).solve(best)
    return Affine(start + matrix, shift, fit, best)


def procrustes(x: Float[Tensor, "r m"], y: Float[Tensor, "r n"], *, scale: bool = True) -> Affine:
    """The best rotation (partial isometry where the widths differ) from x to y, and a scale.

    Raises
    ------
    ShapeMismatch, BadOption
    """
    x, y = _checked(x, y)
    back = _kept_back(len(x))
    matrix, shift = _rotation(x[:-back], y[:-back], scale)
    fit = r2(y[-back:], x[-back:] @ matrix.mT + shift, y[:-back].mean(dim=0))
    matrix, shift = _rotation(x, y, scale)
    return Affine(matrix, shift, fit)


def towards(x: Float[Tensor, "r m"], y: Float[Tensor, "r n"], *, strength: float = 1.0) -> Affine:
    """The ridge map drawn towards no change at all where that fits better than a rotation, else
    towards the rotation.

    Parameters
    ----------
    x, y : Tensors of shape (r, m) and (r, n)
    strength : float
        λ over the mean of Σ x², per feature of centred x.

    Raises
    ------
    ShapeMismatch, BadOption
    """
    x, y = _checked(x, y)
    start = procrustes(x, y, scale=False)
    if x.shape[1] == y.shape[1]:
        back = _kept_back(len(x))
        shift = (y - x)[:-back].mean(dim=0)
        if r2(y[-back:], x[-back:] + shift, y[:-back].mean(dim=0)) >= start.fit:
            start = identity(x.shape[1])
    return ridge(x, y, prior=start.matrix, ridges=(strength,))


def identity(width: int) -> Affine:
    """x itself."""
    eye = torch.eye(width, dtype=torch.float64)
    return Affine(eye, torch.zeros(width, dtype=torch.float64), 1.0)


class _Spectrum:
    """Xᵀ X decomposed once, for any λ."""

    def __init__(self, x: Tensor, y: Tensor, offset: bool) -> None:
        self.x0 = x.mean(dim=0) if offset else x.new_zeros(x.shape[1])
        self.y0 = y.mean(dim=0) if offset else y.new_zeros(y.shape[1])
        x, y = x - self.x0, y - self.y0
        gram = x.mT @ x
        self.scale = float(gram.diagonal().mean()) or 1.0
        self.values, self.vectors = torch.linalg.eigh(gram)
        self.cross = self.vectors.mT @ (x.mT @ y)

    def solve(self, strength: float) -> tuple[Tensor, Tensor]:
        # What does not vary at all stays out, whatever λ.
        damped = self.values.clamp_min(0) + strength * self.scale
        matrix = (self.vectors @ (self.cross / damped[:, None])).mT
        return matrix, self.y0 - matrix @ self.x0


def _rotation(x: Tensor, y: Tensor, scale: bool) -> tuple[Tensor, Tensor]:
    x0, y0 = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x0, y - y0
    u, s, vt = torch.linalg.svd(y.mT @ x, full_matrices=False)
    matrix = u @ vt
    if scale:
        reached = x if y.shape[1] >= x.shape[1] else x @ matrix.mT
        matrix = float(s.sum() / reached.square().sum().clamp_min(1e-300)) * matrix
    return matrix, y0 - matrix @ x0


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ShapeMismatch(
            f"A map needs the same inputs on both sides: {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if len(x) < _FEWEST + 1:
        raise BadOption(
            f"A map needs more inputs than {len(x)}.", fix="Give more calibration items."
        )
    return x.double(), y.double()


def _kept_back(rows: int) -> int:
    return max(1, int(rows * KEPT_BACK))
