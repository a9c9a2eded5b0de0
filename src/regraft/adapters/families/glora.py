"""GLoRA: the weight is also multiplied.

Paper: arXiv 2306.07967. Two writers with the same name for different things:

* LyCORIS: ΔW = s (W0 A1 A2 + B1 B2), s = alpha / r; roles ``a1`` (in, r), ``a2`` (r, in),
  ``b1`` (out, r), ``b2`` (r, in·kh·kw), and the Tucker core ``bm``. On a convolution A acts on the
  input channels. LyCORIS before 2.0 multiplied in the other order, W0 A2 A1 + B2 B1; the shapes say
  which. A linear layer's ΔW has rank 2r: it is held as [W0 A1, B1] [A2; B2].
* PEFT (``GLORA``): ΔW = W0 ⊙ A + B and Δb = b0 ⊙ D + E + W0 C; no alpha. A, B: ``X`` (out, 1) or
  (1,), or ``Xd`` (out, r) times ``Xu`` (r, in); C the same over (in, 1); D, E ``X``; an empty part
  is ``zeros`` or absent. Its roles are the ends of its keys, such as ``glora_A.Xd``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regraft.adapters.families.lora import tucker
from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import changed, out_first, out_in
from regraft.adapters.update import Dense, LowRank
from regraft.errors import ShapeMismatch

_LYCORIS = ("a1", "a2", "b1", "b2")
_PARTS = {f"glora_{part}.{kind}" for part in "ABCDE" for kind in ("X", "Xd", "Xu", "zeros")}


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    if "a1" in shapes:
        return min(shapes["a1"][:2]) if len(shapes["a1"]) > 1 else None
    return next((s[1] for r, s in shapes.items() if r.endswith(".Xd") and len(s) > 1), None)


@family(
    name="glora",
    title="GLoRA",
    paper="https://arxiv.org/abs/2306.07967",
    equation="ΔW = s (W0 A1 A2 + B1 B2)",
    needs=[_LYCORIS, (*_LYCORIS, "bm"), *[(role,) for role in sorted(_PARTS)]],
    may=sorted(_PARTS),
    marks=(*_LYCORIS, "bm", *sorted(_PARTS)),
    needs_base=True,
    rank=_rank,
)
def build(module: Module) -> Built:
    """ΔW in factors on a linear layer of LyCORIS', else in full; PEFT's changes the bias too."""
    if "a1" not in module.tensors:
        return _peft(module)
    a1, a2, b1, b2 = _ordered(module)
    scale, (m, n) = module.scale(a2.shape[0]), out_in(module)
    core = module.tensors.get("bm")
    down = (b2 if core is None else tucker(b2, core)).float().flatten(1)
    a1, a2, up = a1.float().flatten(1), a2.float().flatten(1), b1.float().flatten(1)
    taps = n // a1.shape[0]
    if up.shape[0] != m or down.shape[1] != n or n % a1.shape[0] or a2.shape[1] != a1.shape[0]:
        raise ShapeMismatch(f"The factors of {module.name} do not fit a weight {module.shape}.")
    if taps == 1:
        weight = out_first(module.weight().float(), module.layout).flatten(1)
        left, right = torch.cat([weight @ a1, up], 1), torch.cat([a2, down])
        if module.layout == "transposed":
            left, right = right.mT.contiguous(), left.mT.contiguous()
        return {"weight": LowRank(left, right, scale, module.shape, module.layout)}

    def becomes(weight: Tensor) -> Tensor:
        channels = weight.reshape(m, -1, taps)
        turned = torch.einsum("oit,ir,rj->ojt", channels, a1, a2).reshape(m, n)
        return weight + scale * (turned + up @ down)

    stored = module.tensors["b1"].dtype
    return {"weight": changed(module, becomes, stored, a2.shape[0])}


def _ordered(module: Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a1, a2, b1, b2 in the order in which they are multiplied."""
    for role in _LYCORIS:
        module.rank_of(role)
    a1, a2, b1, b2 = (module.tensors[role] for role in _LYCORIS)
    m, _ = out_in(module)
    for first, second, up, down in ((a1, a2, b1, b2), (a2, a1, b2, b1)):
        rank = first.shape[1]
        fits = second.shape[0] == up.shape[1] == down.shape[0] == rank
        if fits and up.shape[0] == m and first.shape[0] == second.shape[1]:
            return first, second, up, down
    raise ShapeMismatch(f"The factors of {module.name} do not fit a weight {module.shape}.")


def _peft(module: Module) -> Built:
    """PEFT's five parts."""
    parts = {name: _part(module, f"glora_{name}") for name in "ABCDE"}
    a, b, c, d, e = (parts[name] for name in "ABCDE")
    stored = next(iter(module.tensors.values())).dtype
    rank = _rank({role: tuple(t.shape) for role, t in module.tensors.items()})
    built: Built = {"weight": changed(module, lambda w: w * (1 + a) + b, stored, rank)}
    bias = module.bias()
    if bias is None:
        return built

    def change() -> Tensor:
        found = module.bias()
        assert found is not None
        total = found.float() * d + e
        if c.any():
            weight = out_first(module.weight().float(), module.layout)
            total = total + (weight @ c.reshape(-1, 1)).flatten()
        return total

    if any(role[6] in "CDE" and not role.endswith("zeros") for role in module.tensors):
        built["bias"] = Dense(change, tuple(bias.shape), stored=stored)
    return built


def _part(module: Module, name: str) -> Tensor:
    tensors = module.tensors
    if f"{name}.Xd" in tensors or f"{name}.Xu" in tensors:
        if f"{name}.Xd" not in tensors or f"{name}.Xu" not in tensors:
            raise ShapeMismatch(f"{name} of {module.name} has one factor of two.")
        return tensors[f"{name}.Xd"].float() @ tensors[f"{name}.Xu"].float()
    found = tensors.get(f"{name}.X")
    return torch.zeros(1) if found is None else found.float()
