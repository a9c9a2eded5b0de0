"""Converting an adapter on its own base: another rank, family, dialect, form or dtype."""

from regraft.convert.run import convert

__all__ = ["convert"]
