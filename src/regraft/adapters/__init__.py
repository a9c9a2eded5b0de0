"""Adapters: what a file changes, site by site, in one exact form, and its algebra."""

from regraft.adapters.adapter import Adapter, Site
from regraft.adapters.algebra import compress, energy, inner, rank_for_energy
from regraft.adapters.update import (
    LowRank,
    Spectral,
    Update,
    balance,
    delta,
    matrix_shape,
    same_matrix,
)

__all__ = [
    "Adapter",
    "LowRank",
    "Site",
    "Spectral",
    "Update",
    "balance",
    "compress",
    "delta",
    "energy",
    "inner",
    "matrix_shape",
    "rank_for_energy",
    "same_matrix",
]
