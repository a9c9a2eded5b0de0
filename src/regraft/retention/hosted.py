"""Adapters of every kind on a running base: changes of weights, and what changes none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adapters import Adapter
from regraft.bases import Base
from regraft.dialects import load_adapter
from regraft.dialects.inserted import is_insert
from regraft.files import locate
from regraft.running import Model, applied, random_like

if TYPE_CHECKING:  # at run time only where there is one: it needs PEFT
    from regraft.inserts.insert import InsertAdapter

    AnyAdapter = Adapter | InsertAdapter


def load_any(ref: str | Path, base: Base) -> AnyAdapter:
    """Read an adapter of any kind against its base.

    Raises
    ------
    RegraftError
        Whatever :func:`regraft.dialects.load_adapter` or
        :func:`regraft.inserts.read.load_insert` raises.
    """
    located = locate(ref)
    if not is_insert(located):
        return load_adapter(located.path, base)
    from regraft.inserts.read import load_insert

    return load_insert(located.path, base)


def hosted(
    model: Model, adapter: AnyAdapter | None, strength: float = 1.0
) -> AbstractContextManager[Any]:
    """The model with the adapter on it, inside the block; None is the bare model."""
    if adapter is None:
        return nullcontext(model)
    if isinstance(adapter, Adapter):
        return applied(model, adapter, strength)
    from regraft.inserts.attached import attached

    return attached(model, adapter, strength)


def random_of(adapter: AnyAdapter, seed: int) -> AnyAdapter:
    """An adapter of the same kind and size, of random numbers: the control."""
    if isinstance(adapter, Adapter):
        return random_like(adapter, seed)
    from regraft.inserts.attached import random_insert

    return random_insert(adapter, seed)


def has_strengths(adapter: AnyAdapter) -> bool:
    """Whether it can be put on at another strength than 1: prompts and prefixes cannot."""
    return adapter.family not in ("prompt", "prefix")


def facts_of(adapter: AnyAdapter, ref: str | Path) -> dict[str, Any]:
    """What a measurement says of an adapter; ``size`` is virtual tokens, or a width."""
    found: dict[str, Any] = {"ref": str(ref), "name": adapter.name, "family": adapter.family}
    if isinstance(adapter, Adapter):
        found |= {"rank": adapter.rank, "sites": len(adapter.updates)}
    else:
        from regraft.inserts.tables import size_of

        sizes = map(size_of, adapter.parts.values())
        found |= {"changes": "activations", "size": max(sizes), "sites": len(adapter.parts)}
    return {**found, "sha256": adapter.sha256}
