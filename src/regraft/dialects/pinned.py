"""Files that mean something on one base only: its weights by their hash, and bases made of them.

Configs of PEFT folders that Regraft's tuners wrote have ``base_hashes``: module → SHA-256 of the
weight the adapter was trained on (SVDiff; LoRA-X with ``store_bases=False``). The hash also says in
which precision training held a weight that the checkpoint stores in another.

LoRA-X without its bases is ΔΣ alone. Ũ and Ṽ are computed as the tuner does, with the signs that
the config records where ΔΣ is a matrix, so ΔW is the trained one to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from regraft.adapters.families import Module
from regraft.dialects.keys import PEFT_PREFIX
from regraft.errors import MalformedFile, ShapeMismatch, WrongBase
from regraft.subspaces.engine import Dimension, decompose
from regraft.subspaces.reproducible import signed, weight_hash

T = TypeVar("T")

#: What the model may have held the weight in while it was trained.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lacks_bases(roles: Mapping[str, object]) -> bool:
    """Whether a LoRA-X module with these roles leaves its bases to the base."""
    return "core" in roles and not roles.keys() & {"u", "v"}


def pinned(module: Module) -> Module:
    """The module on the very weight it was trained on, and with its bases if it is LoRA-X.

    Raises
    ------
    WrongBase
        The base's weight is another one, or its singular vectors come out otherwise.
    MalformedFile
        LoRA-X lacks its bases, and nothing says which weight they are of.
    ShapeMismatch
        The weight has fewer singular directions than ΔΣ.
    """
    said = _said(module, "base_hashes", str)
    checked = module.settings.get("check_base") is not False
    if said is not None and checked:
        dtype = _trained_in(module.weight(), said)
        if dtype is None:
            raise WrongBase(
                f"The weight of {module.name.removeprefix(PEFT_PREFIX)} is not the one that this "
                "adapter was trained on (its hash differs): its file means nothing on another.",
                fix="Give the base it was trained on, as it was then. To take this one all the "
                'same, as an approximation, set "check_base": false in its adapter_config.json.',
            )
        read = module.weight
        module = replace(module, weight=lambda: read().to(dtype).float())
    if not lacks_bases(module.tensors):
        return module
    if said is None and checked:
        raise MalformedFile(
            f"The LoRA-X module {module.name} has no lora_x_U and lora_x_V, and nothing says "
            "which weight's singular vectors they are.",
            fix="Restore the adapter_config.json that was saved with these weights.",
        )
    return _with_bases(module, _said(module, "signs", list) if checked else None)


def _with_bases(module: Module, signs: list[int] | None) -> Module:
    core = module.tensors["core"]
    if core.ndim not in (1, 2) or 0 in core.shape:
        raise ShapeMismatch(
            f"A change {tuple(core.shape)} of singular values is neither r nor r × r numbers."
        )
    weight = module.weight()
    if weight.ndim < 2:
        raise ShapeMismatch(f"LoRA-X does not fit a weight of shape {tuple(weight.shape)}.")
    found = decompose(weight.float().flatten(1), Dimension(k=len(core)))
    if found.k != len(core):
        raise ShapeMismatch(
            f"The base's weight has {found.k} singular directions, the adapter {len(core)}."
        )
    u, v = found.ut.mT.contiguous(), found.vt.mT.contiguous()
    if signs is not None:
        u, v = signed(u, v, signs)
    return replace(module, tensors={**module.tensors, "u": u, "v": v})


def _trained_in(weight: Tensor, said: str) -> torch.dtype | None:
    return next((d for d in _DTYPES if weight_hash(weight.to(d)) == said), None)


def _said(module: Module, setting: str, kind: type[T]) -> T | None:
    """What the config says of this module."""
    table = module.settings.get(setting)
    said = table.get(module.name.removeprefix(PEFT_PREFIX)) if isinstance(table, dict) else None
    return said if isinstance(said, kind) else None
