"""An adapter on a running base, for the length of a ``with`` block; and a random one for control.

The weights become W + strength · ΔW, with ΔW exact from the adapter's factors: what a loader does
when it fuses an adapter, and the same function as a loader that adds the low-rank path beside W.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regraft.adapters import (
    Adapter,
    LowRank,
    Site,
    Update,
    balance,
    delta,
    energy,
    matrix_shape,
    same_matrix,
)
from regraft.errors import CannotRun, ShapeMismatch, SitesNotInBase
from regraft.running.model import Model
from regraft.running.quantised import storage_of

M = TypeVar("M", bound=Model)
#: In front of CLIP's modules in adapters and in some versions of transformers, not in others.
_WRAPPER = "text_model."


@contextmanager
def applied(model: M, adapter: Adapter, strength: float = 1.0) -> Iterator[M]:
    """The model with ``strength`` · ΔW added to its weights inside the block.

    The weights that were there are put back after it, bit for bit, also after an error. Blocks may
    be nested: the updates add up. A weight that the model shares between two modules is changed in
    the adapter's module only, as loaders do.

    Parameters
    ----------
    model : Model
    adapter : Adapter
        Its sites and shapes are the model's.
    strength : float
        1.0 as trained.

    Raises
    ------
    SitesNotInBase
        The model has no weight for a site.
    ShapeMismatch
        An update does not fit its weight.
    CannotRun
        An adapter is attached to the model already, by another library; or a weight is quantised.
    """
    places = []
    for site, update in adapter.updates.items():
        module, weight = _holder(model, site)
        places.append((module, weight, update))
        shape = tuple(weight.shape)
        if not same_matrix(update.shape, shape):
            raise ShapeMismatch(
                f"The update {update.shape} of {site} does not fit the weight {shape} of "
                f"{model.ref}."
            )
    before: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for module, weight, update in places:
            changed = nn.Parameter(_changed(weight, update, strength), requires_grad=False)
            before.append((module, weight))
            module.weight = changed
        yield model
    finally:
        for module, weight in reversed(before):
            module.weight = weight


@torch.no_grad()
def _changed(weight: Tensor, update: Update, strength: float) -> Tensor:
    change = delta(update).reshape(weight.shape).to(weight.device)
    return (weight.float() + strength * change).to(weight.dtype)


def _holder(model: Model, site: Site) -> tuple[nn.Module, nn.Parameter]:
    """The module that holds the site's weight, and the weight."""
    component = model.modules.get(site.component, nn.Module())
    for name in (site.module, site.module.removeprefix(_WRAPPER), _WRAPPER + site.module):
        try:
            module: Any = component.get_submodule(name)
        except AttributeError:
            continue
        while hasattr(module, "base_layer"):  # PEFT's wrapper, which stays when it is detached
            if any(len(getattr(module, n, ())) for n in module.adapter_layer_names):
                raise CannotRun(
                    f"Another library has attached an adapter to {site} of {model.ref}.",
                    fix="Remove it first, or open the base again.",
                )
            module = module.base_layer
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            if (stored := storage_of(module)) and not stored.held:
                raise CannotRun(
                    f"The weight {site} of {model.ref} is quantised ({stored}); a change added to "
                    "it would be rounded.",
                    fix="Give the base in 16 bits.",
                )
            return module, weight
    raise SitesNotInBase(
        f"{model.ref} has no weight for the adapter's site {site}.",
        fix="Is this the base that the adapter was made for?",
    )


def random_like(adapter: Adapter, seed: int) -> Adapter:
    """An adapter of random updates: the control that says what mere change of that size does.

    At every site ΔW is a product of Gaussian factors of the same rank, scaled to the same Frobenius
    norm. A site's draw depends on the seed and the site's name only.

    Parameters
    ----------
    adapter : Adapter
    seed : int

    Returns
    -------
    Adapter
    """
    updates: dict[Site, Update] = {
        site: _random(update, site, seed) for site, update in adapter.updates.items()
    }
    return replace(adapter, updates=updates, family="lora", name=f"random-{seed}")


def _random(update: Update, site: Site, seed: int) -> LowRank:
    digest = hashlib.sha256(f"{seed} {site}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    m, n = matrix_shape(update.shape)
    left = torch.randn(m, update.rank, generator=draw)
    right = torch.randn(update.rank, n, generator=draw)
    size = math.sqrt(update.energy() / energy((left, right)))
    up, down = balance(left * size, right)
    return LowRank(up, down, 1.0, update.shape, update.layout)
