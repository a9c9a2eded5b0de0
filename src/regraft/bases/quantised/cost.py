"""What reading a base from quantised weights costs, as measured."""

from __future__ import annotations

from regraft.bases.base import Base


def cost(base: Base) -> str | None:
    """One sentence."""
    return None
