"""What several families share: a weight as (out, in, …), scales by PEFT's config, rotations.

Not a family: nothing is registered here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regraft.adapters.families.registry import Module
from regraft.adapters.patterns import matches_end
from regraft.adapters.update import Dense, Layout, matrix_shape
from regraft.errors import MalformedFile


def out_first(weight: Tensor, layout: Layout) -> Tensor:
    """A stored weight with one row per output, or such a weight as stored: the same turn."""
    return weight.mT if layout in ("transposed", "embedding") else weight


def out_in(module: Module) -> tuple[int, int]:
    """(outputs, inputs · kernel) of the module's weight."""
    m, n = matrix_shape(module.shape)
    return (n, m) if module.layout == "transposed" else (m, n)


def changed(
    module: Module,
    becomes: Callable[[Tensor], Tensor],
    stored: torch.dtype,
    rank: int | None = None,
) -> Dense:
    """ΔW of a family that says what the weight becomes. The base is read each time, not kept.

    ``becomes`` maps the weight as an (out, in·kernel) matrix in fp32 to what it is replaced by.
    """

    def make() -> Tensor:
        weight = module.weight().float()
        flat = out_first(weight, module.layout).flatten(1)
        change = becomes(flat) - flat
        return out_first(change, module.layout).reshape(module.shape)

    return Dense(make, module.shape, module.layout, trained_rank=rank, stored=stored)


def changed_bias(module: Module, becomes: Callable[[Tensor], Tensor]) -> Dense | None:
    """Δb of a family that says what the bias becomes; None if the layer has none."""
    bias = module.bias()
    if bias is None:
        return None
    shape, stored = tuple(bias.shape), bias.dtype
    del bias

    def make() -> Tensor:
        found = module.bias()
        assert found is not None
        return becomes(found.float()) - found.float()

    return Dense(make, shape, stored=stored)


def own_setting(module: Module, patterns: str, plain: str, default: Any) -> Any:
    """A PEFT setting of this module: by its pattern, else the general one.

    PEFT's rule: the first key of ``patterns`` that matches the module's dotted end.
    """
    name = module.name.removeprefix("base_model.model.")
    own = module.settings.get(patterns) or {}
    if not isinstance(own, dict):
        raise MalformedFile(f"The config's {patterns} is no table.")
    for key, value in own.items():
        if matches_end(key, name):
            return value
    return module.settings.get(plain, default)


def is_peft(module: Module, kind: str) -> bool:
    """Whether the file came with PEFT's config of this type."""
    return str(module.settings.get("peft_type", "")).upper() == kind


def cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ of a batch of skew-symmetric Q: orthogonal."""
    eye = torch.eye(skew.shape[-1])
    found: Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
    return found


def by_blocks(blocks: Tensor, weight: Tensor) -> Tensor:
    """block_diag(blocks) @ weight, for blocks (k, b, b) and a weight (k·b, n)."""
    k, b, _ = blocks.shape
    return (blocks @ weight.reshape(k, b, -1)).reshape(weight.shape)
