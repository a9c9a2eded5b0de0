"""Bases: checkpoints opened lazily. Names and shapes now, one weight at a time on request."""

from regraft.bases.base import Base, Weight
from regraft.bases.identity import Architecture, architecture
from regraft.bases.made_for import Candidate, made_for
from regraft.bases.native import Part, architecture_of_names, native_parts
from regraft.bases.open import open_base
from regraft.bases.spelling import same_made_for

__all__ = [
    "Architecture",
    "Base",
    "Candidate",
    "Part",
    "Weight",
    "architecture",
    "architecture_of_names",
    "made_for",
    "native_parts",
    "open_base",
    "same_made_for",
]
