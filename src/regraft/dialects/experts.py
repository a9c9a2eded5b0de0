"""LoRA on the stacked experts of a mixture (PEFT's ``target_parameters``), expert by expert.

Models hold all experts of a layer in one parameter, (experts, out, in), with gate and up joined;
their checkpoints store each by itself. PEFT's factors are stacked too: A is (experts · r, in) by
expert, B is (out, r · experts) by rank, so that

    ΔW_e = s · B[:, :, e] A[e],   A as (experts, r, in), B as (out, r, experts)

Facts from PEFT 0.21, ``ParamWrapper.get_delta_weight``. The wrappers of one module are nested, so
which parameter a pair of factors means is read off its shapes.
"""

from __future__ import annotations

import re

from torch import Tensor

from regraft.adapters import LowRank, Site, Update
from regraft.bases import Base
from regraft.dialects.keys import PEFT_PREFIX
from regraft.errors import ShapeMismatch

_GATE, _UP, _DOWN = ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")
_EXPERT = re.compile(r"(.+)\.\w+\.experts\.(\d+)\.(w[123]|(?:gate|up|down)_proj)")


def stacked(name: str, base: Base) -> list[dict[str, Site]]:
    """Every expert of the layer that a module name means: "gate", "up", "down" → its site.

    Empty if the name means no stack of experts, or the base does not store them one by one.
    """
    plain = name.removeprefix(PEFT_PREFIX)
    while plain.endswith(".base_layer"):
        plain = plain.removesuffix(".base_layer")
    layer, _, end = plain.rpartition(".")
    if end != "experts":
        return []
    found: dict[int, dict[str, Site]] = {}
    for site in base.weights:
        match = _EXPERT.fullmatch(site.module)
        if match and match[1] == layer.rpartition(".")[0]:
            role = next(
                r
                for r, names in (("gate", _GATE), ("up", _UP), ("down", _DOWN))
                if match[3] in names
            )
            found.setdefault(int(match[2]), {})[role] = site
    return [found[i] for i in sorted(found)]


def expert_updates(
    experts: list[dict[str, Site]], a: Tensor, b: Tensor, scale: float, base: Base
) -> dict[Site, Update]:
    """The update of each expert's weights.

    Parameters
    ----------
    experts : list of dict
        From :func:`stacked`.
    a : Tensor of shape (experts · r, in)
    b : Tensor of shape (out, r · experts)
    scale : float
        alpha / r.

    Raises
    ------
    ShapeMismatch
        The factors fit neither the joined gate and up nor the down projection.
    """
    count = len(experts)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % count:
        raise ShapeMismatch(
            f"Factors {tuple(a.shape)} and {tuple(b.shape)} are not those of {count} experts."
        )
    rank = a.shape[0] // count
    by_expert = b.reshape(b.shape[0], rank, count)
    found: dict[Site, Update] = {}
    for e, sites in enumerate(experts):
        down, up = a[e * rank : (e + 1) * rank], by_expert[:, :, e]
        start = 0
        for role in _roles(sites, (b.shape[0], a.shape[1]), base):
            shape = base.weights[sites[role]].shape
            rows = up[start : start + shape[0]].contiguous()
            found[sites[role]] = LowRank(rows, down.contiguous(), scale, shape)
            start += shape[0]
    return found


def _roles(sites: dict[str, Site], shape: tuple[int, int], base: Base) -> tuple[str, ...]:
    sizes = {role: base.weights[site].shape for role, site in sites.items()}
    for roles in (("gate", "up"), ("down",)):
        if all(role in sizes for role in roles):
            rows = sum(sizes[role][0] for role in roles)
            if (rows, sizes[roles[0]][1]) == shape:
                return roles
    raise ShapeMismatch(f"A change {shape} is not one of experts with weights {sizes}.")
