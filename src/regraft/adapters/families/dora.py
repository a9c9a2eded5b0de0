"""DoRA: the weight split into magnitude and direction, beside any of LoRA, LoHa and LoKr.

Paper: arXiv 2402.09353 (ICML 2024). With V = W0 + ΔV, ΔV from the inner family:

    W' = g ⊙ V / ‖V‖,   ΔW = W' − W0

Two conventions that cannot be exchanged, told apart by the shape of g:

* per **output**: ‖·‖ over all axes but the first. g is (m, 1, …) in LyCORIS (``wd_on_output``, its
  default since 2024-12), (m,) or (1, m, 1, 1) in PEFT and diffusers, (m,) in ai-toolkit.
* per **input**: ‖·‖ over all axes but the second, kernel included. g is (1, n, …): LyCORIS before
  that, and OneTrainer by default.

A flat g on a square weight is per output: every writer of flat vectors means that. LyCORIS and
OneTrainer add a machine epsilon to the norm, PEFT none; it is below rounding. A zero row stays so.
ΔW depends on W0 and has full rank. Some readers divide by ‖W0‖; the writers, and we, by ‖V‖.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from regraft.adapters.families import loha, lokr, lora
from regraft.adapters.families.registry import Built, Module, family, family_of
from regraft.adapters.families.views import out_first
from regraft.adapters.update import Dense, Update, delta
from regraft.errors import FamilyNotYet, ShapeMismatch

_MAGNITUDES = ("dora_scale", "magnitude")
_INNER = (
    ("down", "up"),
    ("down", "mid", "up"),
    ("embedding_a", "embedding_b"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *lokr.NEEDS,
)


def _inner(roles: Mapping[str, object]) -> str:
    if "hada_w1_a" in roles:
        return "loha"
    return "lokr" if any(role.startswith("lokr") for role in roles) else "lora"


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return {"loha": loha._rank, "lokr": lokr._rank, "lora": lora._rank}[_inner(shapes)](shapes)


def _carried_as(roles: Iterable[str]) -> str:
    return (
        "DoRA: carried as the exact ΔW that it makes on the source; its magnitudes belong to the "
        "source's weights."
    )


@family(
    name="dora",
    title="DoRA",
    paper="https://arxiv.org/abs/2402.09353",
    equation="ΔW = g (W0 + s B A) / ‖W0 + s B A‖ − W0",
    needs=[(*inner, g) for inner in _INNER for g in _MAGNITUDES],
    may=("up_bias", "init_down", "init_up"),
    marks=_MAGNITUDES,
    needs_base=True,
    carried_as=_carried_as,
    rank=_rank,
)
def build(module: Module) -> Built:
    """ΔW in full, made from the base's weight each time it is asked for."""
    role = next(r for r in _MAGNITUDES if r in module.tensors)
    g = module.tensors[role].float()
    plain = replace(module, tensors={r: t for r, t in module.tensors.items() if r != role})
    found = family_of(plain.tensors, module.settings)
    if found is None:
        raise FamilyNotYet(f"A magnitude beside {', '.join(plain.tensors)} is not read.")
    built = dict(found.build(plain))
    inner = built["weight"]
    turned = inner.layout in ("transposed", "embedding")
    shape = (*reversed(inner.shape),) if turned else inner.shape
    per_output = _per_output(role, g, shape)
    stored = module.tensors[role].dtype
    rank = _rank({r: tuple(t.shape) for r, t in plain.tensors.items()})
    built["weight"] = Dense(
        lambda: _change(module, inner, g, per_output), module.shape, inner.layout, rank, stored
    )
    return built


def _change(module: Module, inner: Update, g: Tensor, per_output: bool) -> Tensor:
    weight = out_first(module.weight().float().reshape(inner.shape), inner.layout)
    direction = weight + out_first(delta(inner), inner.layout)
    axis = 0 if per_output else 1
    others = [i for i in range(direction.ndim) if i != axis]
    norm = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    factor = torch.where(norm > 0, g.reshape(norm.shape) / norm, 0.0)
    return out_first(direction * factor - weight, inner.layout)


def _per_output(role: str, g: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether g has one entry per output of a weight (out, in, …), else per input.

    Raises
    ------
    ShapeMismatch
        Neither fits.
    """
    m, n, size = shape[0], shape[1], g.numel()
    long = [axis for axis, length in enumerate(g.shape) if length > 1]
    # A magnitude is per output by its name: PEFT's (1, m, 1, 1) would pass for one per input.
    by_input = role == "dora_scale" and g.ndim > 1 and long == [1] and size == n
    if size == m and not by_input:
        return True
    if by_input or (role == "dora_scale" and g.ndim == 1 and size == n):
        return False
    raise ShapeMismatch(f"A magnitude {tuple(g.shape)} does not fit a weight {shape}.")
