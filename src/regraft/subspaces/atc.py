"""ATC, the adapter transferability cost: how much of one model's subspaces another one lacks.

LoRA-X (arXiv 2501.16559) §4.2.4 names an optimal-transport cost over the subspace similarities
between the layers of two models. Its formula could not be found; what is defined here:

    C_ij = 1 − (Φ_l(W_i, W_j) + Φ_r(W_i, W_j)) / 2       Φ: Eq. 4
    C_ij = 1                                             layers of other shape or kind
    ATC  = min_P Σ_ij P_ij C_ij,   P 1 = a,  Pᵀ 1 = b,  P ≥ 0

a and b are the masses of the source's and the target's layers; each sums to 1. The cost is between
0 (every layer's subspaces are found again) and 1. docs/metrics.md lists what the paper leaves open.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from regraft.adapters import Site, matrix_shape
from regraft.bases import Base
from regraft.errors import BadOption, MissingDependency, NotABase
from regraft.subspaces.closeness import phi
from regraft.subspaces.engine import Dimension, Subspace
from regraft.subspaces.library import SubspaceLibrary

Masses = Literal["uniform", "energy"]

#: Steps of the network simplex. Its default of 100,000 is too few for a thousand layers a side.
_STEPS = 5_000_000


@dataclass(frozen=True)
class Transferability:
    """The cost of moving one model's layers onto another's, and the plan that attains it.

    Attributes
    ----------
    cost : float
        ATC, in [0, 1].
    by_name : float
        The cost of the plan that moves every layer to the layer of its own name; mass without a
        namesake, or beyond its namesake's mass, costs 1. Never below ``cost``.
    chance : float
        The cost of ``plan`` if each comparable pair had the Φ of unrelated weights, k / d.
    plan, costs : Tensor of shape (s, t)
        fp64; rows follow ``source``, columns ``target``.
    source, target : tuple of Site
    """

    cost: float
    by_name: float
    chance: float
    plan: Float[Tensor, "s t"]
    costs: Float[Tensor, "s t"]
    source: tuple[Site, ...]
    target: tuple[Site, ...]

    @property
    def relative(self) -> float | None:
        """``cost / chance``: 0 for the same subspaces, about 1 for unrelated ones, whatever the
        dimension. None where the subspaces are complete, so that Φ says nothing."""
        return self.cost / self.chance if self.chance > 0 else None


def transport(
    costs: Float[Tensor, "s t"], source: Float[Tensor, " s"], target: Float[Tensor, " t"]
) -> tuple[float, Float[Tensor, "s t"]]:
    """The exact optimal transport cost and plan (POT's network simplex, fp64).

    Parameters
    ----------
    costs : Tensor of shape (s, t)
    source, target : Tensors of shape (s,) and (t,)
        Masses, not negative; each is scaled to sum to 1.

    Raises
    ------
    MissingDependency
        POT is not installed.
    BadOption
        A side has no mass.
    """
    try:
        import ot
    except ImportError as error:
        raise MissingDependency(
            f"The transferability cost needs the package {error.name!r} (POT).",
            fix="pip install 'regraft[measure]'",
        ) from error
    a, b = source.double(), target.double()
    if not (a.sum() > 0 and b.sum() > 0):
        raise BadOption("One side has no mass to transport: all of its weights are zero.")
    a, b = a / a.sum(), b / b.sum()
    plan = ot.emd(a.numpy(), b.numpy(), costs.double().numpy(), numItermax=_STEPS)
    found = torch.as_tensor(plan, dtype=torch.float64)
    return float((found * costs.double()).sum()), found


def transferability(
    source: Base,
    target: Base,
    library: SubspaceLibrary,
    *,
    dimension: Dimension,
    sites: tuple[Iterable[Site], Iterable[Site]] | None = None,
    kind: Callable[[Site], Hashable] = lambda site: None,
    masses: Masses = "uniform",
) -> Transferability:
    """ATC of two bases.

    Parameters
    ----------
    source, target : Base
    library : SubspaceLibrary
    dimension : Dimension
        Of the singular subspaces; not "full", which makes every Φ 1.
    sites : (source sites, target sites), optional
        The layers that take part. Default all.
    kind : callable
        Only layers of equal kind and matrix shape are comparable. Default: shape alone.
    masses : str
        "uniform": every layer weighs the same; "energy": by ‖W‖².

    Returns
    -------
    Transferability

    Raises
    ------
    BadOption, MissingDependency
    NotABase
        One side has no layer that takes part.
    """
    if dimension.full:
        raise BadOption(
            "Complete subspaces are all alike, so a transferability cost would say nothing.",
            fix="Give a number of directions or a share of the energy.",
        )
    chosen = sites or (source.weights, target.weights)
    here, there = (tuple(dict.fromkeys(side)) for side in chosen)
    for base, side in ((source, here), (target, there)):
        if not side:
            raise NotABase("No layer takes part in the transferability cost.", file=base.ref)
    costs = torch.ones(len(here), len(there), dtype=torch.float64)
    chances = torch.ones_like(costs)
    weights = (torch.ones_like(costs[:, 0]), torch.ones_like(costs[0]))
    rows, columns = _groups(source, here, kind), _groups(target, there, kind)
    # One group at a time: all subspaces of a large model at once would be gigabytes.
    for group in dict.fromkeys([*rows, *columns]):
        sides = (rows.get(group, []), columns.get(group, []))
        if masses == "uniform" and not all(sides):
            continue
        xs = [library.subspace(source, here[i], dimension) for i in sides[0]]
        ys = [library.subspace(target, there[j], dimension) for j in sides[1]]
        for i, x in zip(sides[0], xs, strict=True):
            for j, y in zip(sides[1], ys, strict=True):
                costs[i, j], chances[i, j] = _cost(x, y)
        if masses == "energy":
            for mass, places, spaces in zip(weights, sides, (xs, ys), strict=True):
                for place, space in zip(places, spaces, strict=True):
                    mass[place] = space.s.double().square().sum()
    cost, plan = transport(costs, *weights)
    return Transferability(
        cost=cost,
        by_name=_by_name(costs, weights, here, there),
        chance=float((plan * chances).sum()),
        plan=plan,
        costs=costs,
        source=here,
        target=there,
    )


def _groups(
    base: Base, sites: tuple[Site, ...], kind: Callable[[Site], Hashable]
) -> dict[Hashable, list[int]]:
    """Positions of the sites that may be compared with each other."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for i, site in enumerate(sites):
        shape = base.weights[site].shape
        # A linear layer and a 1×1 convolution hold the same matrix; a 3×3 one holds another thing.
        kernel = tuple(d for d in shape[2:] if set(shape[2:]) != {1})
        found[matrix_shape(shape), kernel, kind(site)].append(i)
    return found


def _cost(x: Subspace, y: Subspace) -> tuple[float, float]:
    """1 − mean Φ of two weights of one shape, and the same for unrelated ones."""
    left, right = phi(x, y)
    k = max(x.k, y.k)
    chance = 1 - (k / x.ut.shape[1] + k / x.vt.shape[1]) / 2
    # Φ is 1 only to rounding.
    return min(max(1 - (left + right) / 2, 0.0), 1.0), max(chance, 0.0)


def _by_name(
    costs: Tensor, weights: tuple[Tensor, Tensor], here: tuple[Site, ...], there: tuple[Site, ...]
) -> float:
    a, b = (w / w.sum() for w in weights)
    place = {site: j for j, site in enumerate(there)}
    total = moved = 0.0
    for i, site in enumerate(here):
        j = place.get(site)
        if j is not None:
            mass = float(torch.minimum(a[i], b[j]))
            moved += mass
            total += mass * float(costs[i, j])
    return total + max(1 - moved, 0.0)
