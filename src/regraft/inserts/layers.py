"""Which layer of the source a layer of the target takes after, and where a layer's result goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from regraft.activations import linear_cka
from regraft.inserts.places import pattern_of

#: Rows that layers are compared on.
_ROWS = 1000


def counterparts(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, tuple[str, float | None]]:
    """Target module → the source module of its kind that it takes after, and their CKA.

    Parameters
    ----------
    source, target : mapping of module to Tensor of shape (r, features)
        What the modules give on the same inputs, row by row.

    Returns
    -------
    dict
        By name, without CKA, where a kind has the same modules in both; otherwise so that the sum
        of the pairs' unbiased linear CKA is greatest among all pairings that keep the order.
        Modules without a match are left out.
    """
    found: dict[str, tuple[str, float | None]] = {}
    kinds = {pattern_of(name) for name in source}
    for kind in sorted(kinds):
        here = [name for name in source if pattern_of(name) == kind]
        there = [name for name in target if pattern_of(name) == kind]
        if set(here) == set(there):
            found |= {name: (name, None) for name in there}
            continue
        scores = [[_alike(source[s], target[name]) for s in here] for name in there]
        for name, row, i in zip(there, scores, _in_step(scores), strict=True):
            if row[i] > -1.0:
                found[name] = (here[i], row[i])
    return {name: found[name] for name in target if name in found}


def _in_step(scores: Sequence[Sequence[float]]) -> list[int]:
    """The column for each row, never going back, that makes the sum greatest; the first such."""
    best: list[tuple[float, list[int]]] = []
    for row in scores:
        ahead: list[tuple[float, list[int]]] = []
        for i, score in enumerate(row):
            total, path = max(best[: i + 1], key=lambda b: b[0]) if best else (0.0, [])
            ahead.append((total + score, [*path, i]))
        best = ahead
    return max(best, key=lambda b: b[0])[1] if best else []


def _alike(x: Tensor, y: Tensor) -> float:
    if len(x) != len(y):
        return -1.0
    step = -(-len(x) // _ROWS)
    return linear_cka(x[::step], y[::step], unbiased=True)


def block_of(root: nn.Module, module: str) -> str:
    """The innermost member of a list of blocks that a module is part of; "" for none."""
    lists = {name for name, part in root.named_modules() if isinstance(part, nn.ModuleList)}
    parts = module.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if name.rpartition(".")[0] in lists and parts[end - 1].isdigit():
            return name
    return ""


def shares(pairs: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """(which, of how many) of the target modules that take after one source module."""
    count: dict[str, int] = {}
    for source in pairs.values():
        count[source] = count.get(source, 0) + 1
    so_far: dict[str, int] = {}
    found = {}
    for name, source in pairs.items():
        so_far[source] = so_far.get(source, 0) + 1
        found[name] = (so_far[source], count[source])
    return found


def as_they_ran(names: Sequence[str], ran: Mapping[str, Tensor]) -> list[str]:
    """Names in the order in which their modules ran."""
    wanted = set(names)
    return [name for name in ran if name in wanted]


def rows_alike(x: Tensor, y: Tensor) -> bool:
    """Whether two sets of states are the same but for rounding."""
    return x.shape == y.shape and bool(torch.allclose(x, y, rtol=1e-3, atol=1e-3))
