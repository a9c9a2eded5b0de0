"""Intruder dimensions: strong directions of an adapted weight that the base did not have.

Shuttleworth et al., "LoRA vs full fine-tuning: an illusion of equivalence" (arXiv 2410.21228):
a left singular vector y_j of W + ΔW, among the k with the largest singular values, is an intruder
when max_i |cos(y_j, x_i)| < ε over all left singular vectors x_i of W. The authors' code takes
k = 10 and absolute cosines; ε varies in the paper. PEFT's ``reduce_intruder_dimension`` uses the
same rule with ε = 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from regraft.adapters import Adapter, Site, delta, same_matrix
from regraft.bases import Base
from regraft.errors import BadOption, ShapeMismatch, SitesNotInBase
from regraft.subspaces.engine import Dimension, decompose

#: How many of the strongest directions are looked at (the authors' code).
TOP = 10
#: Largest cosine with any direction of W below which a direction is an intruder (PEFT's default).
EPSILON = 0.5


@dataclass(frozen=True)
class Intruders:
    """How familiar the strongest directions of one adapted weight are.

    Attributes
    ----------
    cosines : Tensor of shape (k,)
        fp32; for each left singular vector of W + ΔW, strongest first, its largest absolute cosine
        with any left singular vector of W.
    """

    cosines: Float[Tensor, " k"]

    def count(self, below: float = EPSILON) -> int:
        """How many of the directions are intruders: their largest cosine is below ``below``."""
        return int((self.cosines < below).sum())


def intruders(
    weight: Float[Tensor, "m n"], change: Float[Tensor, "m n"], *, top: int = TOP
) -> Intruders:
    """The strongest directions of ``weight + change``, held against all those of ``weight``.

    Parameters
    ----------
    weight, change : Tensors of shape (m, n)
        W and ΔW at the strength in question, fp32.
    top : int
        How many directions, at least 1; fewer if the adapted weight has lower rank.

    Raises
    ------
    BadOption

    Notes
    -----
    Singular vectors of equal singular values are arbitrary within their span, so nearly equal ones
    may rotate into each other and look new. That is the measure's own weakness.
    """
    if top < 1:
        raise BadOption(f"Intruders among the top {top} directions cannot be counted.")
    before = decompose(weight, Dimension(k=min(weight.shape)))
    after = decompose(weight + change, Dimension(k=top))
    largest = (after.ut @ before.ut.mT).abs().amax(dim=1)
    return Intruders(largest.clamp(max=1.0))


def adapter_intruders(
    adapter: Adapter, base: Base, *, strength: float = 1.0, top: int = TOP
) -> dict[Site, Intruders]:
    """:func:`intruders` at every site of an adapter, one site at a time.

    Parameters
    ----------
    adapter : Adapter
    base : Base
        The base it is used on.
    strength : float
        Multiplies ΔW.

    Raises
    ------
    SitesNotInBase
        The base lacks a site of the adapter.
    ShapeMismatch
        An update has another shape than its weight.
    """
    found: dict[Site, Intruders] = {}
    for site, update in adapter.updates.items():
        if site not in base:
            raise SitesNotInBase(
                f"The base has no module {str(site)!r}, which the adapter changes.",
                file=base.ref,
                fix="Give the base that the adapter is made for.",
            )
        if not same_matrix(update.shape, base.weights[site].shape):
            raise ShapeMismatch(
                f"The update of {str(site)!r} has shape {tuple(update.shape)}, its weight "
                f"{tuple(base.weights[site].shape)}.",
                file=base.ref,
            )
        weight = base.matrix(site)
        found[site] = intruders(weight, strength * delta(update).reshape(weight.shape), top=top)
    return found
