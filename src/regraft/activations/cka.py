"""Linear CKA: how alike two models represent the same inputs.

Kornblith et al., "Similarity of neural network representations revisited" (arXiv 1905.00414), §3:
with centred X (n × p) and Y (n × q), rows being the same n inputs,

    CKA(X, Y) = ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) = HSIC(XXᵀ, YYᵀ) / √(HSIC(XXᵀ, XXᵀ) HSIC(YYᵀ, YYᵀ))

It needs no equal widths, and does not change under rotations and isotropic scaling of either side.
With fewer inputs than features it is biased towards 1; the unbiased form replaces HSIC by HSIC₁
(Song et al. 2012, Eq. 5; used for CKA by Nguyen et al., arXiv 2010.15327, Eq. 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from regraft.errors import BadOption, ShapeMismatch

#: Rows below which HSIC₁ is not defined.
_FEWEST = 4
#: Variation below this share of the largest value is rounding, even of fp32 inputs.
_DUST = 1e-10


def linear_cka(
    x: Float[Tensor, "n p"], y: Float[Tensor, "n q"], *, unbiased: bool = False
) -> float:
    """Linear CKA of two sets of representations of the same inputs.

    Parameters
    ----------
    x, y : Tensors of shape (n, p) and (n, q)
        One row per input, any float dtype; the sums are in fp64.
    unbiased : bool
        Use HSIC₁. Needs at least 4 rows, and may come out slightly below 0.

    Returns
    -------
    float
        1 for the same representation up to rotation and scale; 0 when a side does not vary.

    Raises
    ------
    ShapeMismatch
        The sides have different numbers of rows.
    BadOption
        Too few rows.
    """
    if len(x) != len(y):
        raise ShapeMismatch(
            f"CKA compares the same inputs: {len(x)} rows against {len(y)}.",
            fix="Run both models on the same inputs.",
        )
    fewest = _FEWEST if unbiased else 2
    if len(x) < fewest:
        raise BadOption(f"CKA needs at least {fewest} inputs, not {len(x)}.")
    a, b = _centred(x), _centred(y)
    if unbiased:
        k, ell = a @ a.mT, b @ b.mT
        across, own = _hsic1(k, ell), (_hsic1(k, k), _hsic1(ell, ell))
    else:
        across, own = _squares(a, b), (_squares(a, a), _squares(b, b))
    if own[0] <= 0 or own[1] <= 0:
        return 0.0
    return across / sqrt(own[0] * own[1])


def cka_matrix(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], *, unbiased: bool = False
) -> Float[Tensor, "s t"]:
    """CKA of every block of one model with every block of another, fp64, in their order.

    Parameters
    ----------
    source, target : mapping of block to Tensor of shape (n, features)
        As :func:`regraft.activations.gather` returns them.
    """
    rows = [[linear_cka(x, y, unbiased=unbiased) for y in target.values()] for x in source.values()]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(source), len(target))


def cka_by_depth(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], *, unbiased: bool = True
) -> float:
    """One figure for two models: the mean CKA of blocks at the same relative depth.

    Each block of the deeper model is held against the block of the other that lies nearest to its
    relative depth (first to first, last to last); equal depths compare block by block. So it is
    the same in both directions.

    Raises
    ------
    BadOption
        A side has no blocks.
    """
    xs, ys = list(source.values()), list(target.values())
    if not xs or not ys:
        raise BadOption("One of the models has no blocks to compare.")
    if len(xs) < len(ys):
        xs, ys = ys, xs
    scores = [
        linear_cka(x, y, unbiased=unbiased) for x, y in zip(xs, _stretch(ys, len(xs)), strict=True)
    ]
    return sum(scores) / len(scores)


def _stretch(blocks: Sequence[Tensor], depth: int) -> list[Tensor]:
    """``depth`` picks from ``blocks`` at even relative depths."""
    last = len(blocks) - 1
    return [blocks[int(i * last / max(depth - 1, 1) + 0.5)] for i in range(depth)]


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    centred = x - x.mean(dim=0)
    # A side that does not vary leaves rounding dust, which has a direction like any other.
    varies = bool(centred.abs().max() > _DUST * x.abs().max())
    return centred if varies else torch.zeros_like(x)


def _squares(a: Tensor, b: Tensor) -> float:
    """‖AᵀB‖²_F, through whichever of the n × n and p × q products is smaller."""
    if len(a) < min(a.shape[1], b.shape[1]):
        return float(((a @ a.mT) * (b @ b.mT)).sum())
    return float((a.mT @ b).square().sum())


def _hsic1(k: Tensor, ell: Tensor) -> float:
    """The unbiased estimate of HSIC from two n × n Gram matrices."""
    n = len(k)
    k, ell = (m - m.diagonal().diag() for m in (k, ell))
    cross = float((k.sum(0) * ell.sum(0)).sum())
    both = float((k * ell).sum())
    sums = float(k.sum()) * float(ell.sum()) / ((n - 1) * (n - 2))
    return (both + sums - 2 * cross / (n - 2)) / (n * (n - 3))
