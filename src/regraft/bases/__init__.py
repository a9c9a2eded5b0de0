"""Bases: checkpoints opened lazily. Names and shapes now, one weight at a time on request."""

from regraft.bases.base import Base, Weight
from regraft.bases.identity import architecture
from regraft.bases.open import open_base

__all__ = ["Base", "Weight", "architecture", "open_base"]
