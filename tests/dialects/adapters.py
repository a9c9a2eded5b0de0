"""Adapters with every kind of update on every kind of layer of a base."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from regraft.adapters import Adapter, Dense, Kronecker, LowRank, Site, Spectral, Update, delta
from regraft.adapters.update import matrix_shape
from regraft.bases import Base
from regraft.bases.native import native_parts


def layout_of(shape: tuple[int, ...]) -> str:
    return "conv" if len(shape) > 2 else "linear"


def some_update(shape: tuple[int, ...], kind: str, seed: int) -> Update:
    """An update of one form, with numbers of its own; a change of one dimension is dense."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    m, n = matrix_shape(shape)
    rank, layout = 1 + seed % 3, layout_of(shape)
    if len(shape) < 2 or kind == "dense":
        change = numbers(*shape)
        return Dense(lambda: change, shape, layout)
    if kind == "spectral":
        return Spectral(numbers(m, rank), numbers(rank), numbers(n, rank), shape, layout)
    if kind == "kronecker":
        a = next(d for d in (2, 3, 1) if m % d == 0)
        b = next(d for d in (2, 3, 1) if n % d == 0)
        return Kronecker(numbers(a, b), numbers(m // a, n // b), 0.7, shape, layout)
    return LowRank(numbers(m, rank), numbers(rank, n), 0.5 * (1 + seed % 4), shape, layout)


KINDS = ("low rank", "spectral", "kronecker", "dense", "low rank")


def every_kind(base: Base, *, share: float = 1.0, kinds: tuple[str, ...] = KINDS) -> Adapter:
    """An update at every site of a base, or at a share of them chosen by chance."""
    chance = random.Random(3)
    sites = [s for s in (*base.weights, *base.others) if chance.random() < share]
    updates = {
        site: some_update(base.at(site).shape, kinds[i % len(kinds)], i)
        for i, site in enumerate(sites)
    }
    return Adapter(updates, name="style", sha256="ab" * 32, dialect="kohya")


def only(adapter: Adapter, sites: set[Site]) -> Adapter:
    return Adapter({s: u for s, u in adapter.updates.items() if s in sites}, name=adapter.name)


def key_of(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def own_state(base: Base, component: str = "transformer") -> dict[str, Tensor]:
    """A component's parameters under diffusers' or transformers' names."""
    sites = [s for s in (*base.weights, *base.others) if s.component == component]
    return {key_of(s.module, s.parameter): base.read(s) for s in sites}


def native_state(base: Base, component: str = "transformer") -> dict[str, Tensor]:
    """A component's parameters as its original checkpoint has them."""
    state = {}
    for (module, parameter), parts in native_parts(base, component).items():
        count = sum(base.at(p.site).shape[0] for p in parts)
        rows = torch.full((count, *base.at(parts[0].site).shape[1:]), torch.nan)
        for part in parts:
            numbers = base.read(part.site)
            cuts = part.rows or ((0, count),)
            pieces = numbers.split([last - first for first, last in cuts])
            for (first, last), piece in zip(cuts, pieces, strict=True):
                rows[first:last] = piece
        state[key_of(module, parameter)] = rows
    return state


def changed(base: Base, adapter: Adapter, component: str = "transformer") -> dict[str, Tensor]:
    """A component's parameters with the adapter's updates added, under diffusers' names."""
    state = own_state(base, component)
    for site, update in adapter.updates.items():
        if site.component == component:
            key = key_of(site.module, site.parameter)
            state[key] = state[key] + delta(update)
    return state


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same parameters, to 1e-5."""
    assert set(found) >= set(wanted), set(wanted) - set(found)
    for key, tensor in wanted.items():
        error = float((found[key] - tensor).abs().max())
        assert error <= 1e-5 * max(1.0, float(tensor.abs().max())), f"{key}: {error}"
