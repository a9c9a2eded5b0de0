"""Subspaces: singular bases of weights, their on-disk cache, and how alike two weights are."""

from regraft.subspaces.cache import Cache, cache_folder
from regraft.subspaces.closeness import Closeness
from regraft.subspaces.engine import ENGINE, Dimension, Subspace, decompose
from regraft.subspaces.library import SubspaceLibrary

__all__ = [
    "ENGINE",
    "Cache",
    "Closeness",
    "Dimension",
    "Subspace",
    "SubspaceLibrary",
    "cache_folder",
    "decompose",
]
