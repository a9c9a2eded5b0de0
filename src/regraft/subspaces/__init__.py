"""Subspaces: singular bases of weights, their on-disk cache, and how alike two weights are."""

from regraft.subspaces.atc import Transferability, transferability, transport
from regraft.subspaces.cache import Cache, cache_folder
from regraft.subspaces.closeness import Closeness
from regraft.subspaces.engine import ENGINE, Dimension, Subspace, decompose
from regraft.subspaces.intruder import Intruders, adapter_intruders, intruders
from regraft.subspaces.library import SubspaceLibrary

__all__ = [
    "ENGINE",
    "Cache",
    "Closeness",
    "Dimension",
    "Intruders",
    "Subspace",
    "SubspaceLibrary",
    "Transferability",
    "adapter_intruders",
    "cache_folder",
    "decompose",
    "intruders",
    "transferability",
    "transport",
]
