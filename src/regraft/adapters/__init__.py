"""Adapters: what a file changes, site by site, in one exact form, and its algebra."""

from regraft.adapters.adapter import Adapter, Site
from regraft.adapters.algebra import energy, inner, rank_for_energy
from regraft.adapters.cut import cut
from regraft.adapters.ranks import RankRule
from regraft.adapters.update import (
    Dense,
    Kronecker,
    LowRank,
    Rows,
    Spectral,
    Update,
    balance,
    delta,
    matrix_shape,
    same_matrix,
)

__all__ = [
    "Adapter",
    "Dense",
    "Kronecker",
    "LowRank",
    "RankRule",
    "Rows",
    "Site",
    "Spectral",
    "Update",
    "balance",
    "cut",
    "delta",
    "energy",
    "inner",
    "matrix_shape",
    "rank_for_energy",
    "same_matrix",
]
