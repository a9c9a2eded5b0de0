"""Merging: a base with an adapter's change added to its weights, once and for good."""

from regraft.merge.run import merge

__all__ = ["merge"]
