"""Activations: hidden states of a model on a few inputs, and how alike two models' are (CKA)."""

from regraft.activations.cka import cka_by_depth, cka_matrix, linear_cka
from regraft.activations.gather import Pool, block_names, gather

__all__ = ["Pool", "block_names", "cka_by_depth", "cka_matrix", "gather", "linear_cka"]
