"""LoKr: a Kronecker product.

Papers: KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859. Written by LyCORIS, PEFT, ai-toolkit.

* ΔW = s · W1 ⊗ W2; each may be a product, W1 = W1a W1b, W2 = W2a W2b.
* Convolutions: W2 is a kernel (c, d, kh, kw); ΔW as a matrix is W1 ⊗ W2.flat.
* Tucker core ``lokr_t2`` (r, r, kh, kw): W2[c,d,x,y] = Σ_ij t[i,j,x,y] W2a[i,c] W2b[j,d].
* s = alpha / r with the rank of the half that is a product. **Both halves whole: s = 1**, whatever
  the file's alpha says (LyCORIS sets alpha to the rank there, and readers drop it; some writers
  leave an alpha of no meaning). PEFT is the exception: it always multiplies by its config's
  alpha / r, and its files have no alpha.
* A Conv1d with W2 whole in PEFT: it takes the product over the wrong axes, in training as in
  merging. That is its ΔW, and it is held in full.
* LyCORIS 4.1's ``get_merged_weight`` multiplies by s twice; its forward pass does so once.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import is_peft, out_in, own_setting
from regraft.adapters.update import Dense, Kronecker
from regraft.errors import MalformedFile, ShapeMismatch

_FIRST = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_SECOND = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
NEEDS = tuple((*one, *two) for one in _FIRST for two in _SECOND)


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    for role in ("lokr_w1_b", "lokr_w2_b"):
        if shapes.get(role):
            return shapes[role][0]
    return None


@family(
    name="lokr",
    title="LoKr",
    paper="https://arxiv.org/abs/2212.10650",
    equation="ΔW = s W1 ⊗ W2",
    needs=NEEDS,
    marks=[f"lokr_{r}" for r in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")],
    rank=_rank,
)
def build(module: Module) -> Built:
    """ΔW as its two Kronecker factors, products multiplied out."""
    whole = module.tensors.get("lokr_w2")
    if whole is not None and whole.ndim == 3 and is_peft(module, "LOKR"):
        return {"weight": _pefts_conv1d(module, _half(module, 1), whole)}
    first, second = _half(module, 1), _half(module, 2)
    (a, b), (c, d) = first.shape, second.shape
    if (a * c, b * d) != out_in(module):
        raise ShapeMismatch(
            f"Factors {(a, b)} ⊗ {(c, d)} do not make an update of a weight {module.shape}."
        )
    if module.layout == "transposed":
        first, second = first.mT, second.mT
    made = Kronecker(first, second, _scale(module), module.shape, module.layout)
    return {"weight": made}


def _pefts_conv1d(module: Module, first: Tensor, second: Tensor) -> Dense:
    scale = _scale(module)
    if first.numel() * second.numel() != prod(module.shape):
        raise ShapeMismatch(f"The factors of {module.name} do not fit a weight {module.shape}.")

    def make() -> Tensor:
        product = torch.kron(first.float()[None], second.float()) * scale
        return product.reshape(module.shape)

    return Dense(make, module.shape, module.layout, stored=second.dtype)


def _scale(module: Module) -> float:
    rank = _rank({role: tuple(t.shape) for role, t in module.tensors.items()})
    if rank is not None:
        return module.scale(rank)
    if not is_peft(module, "LOKR") or module.alpha is not None:
        return 1.0
    said = own_setting(module, "rank_pattern", "r", 8)
    alpha = own_setting(module, "alpha_pattern", "alpha", 8)
    try:
        return float(alpha) / int(said)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise MalformedFile(
            f"The config gives no usable rank and alpha for {module.name} ({error})."
        ) from error


def _half(module: Module, index: int) -> Tensor:
    """W1 or W2 as a matrix; in the file's dtype if it is stored whole, else fp32."""
    whole = f"lokr_w{index}"
    if whole in module.tensors:
        module.rank_of(whole)
        return module.tensors[whole].flatten(1)
    module.rank_of(f"{whole}_a"), module.rank_of(f"{whole}_b")
    a, b = module.tensors[f"{whole}_a"].float(), module.tensors[f"{whole}_b"].float()
    core = module.tensors.get(f"lokr_t{index}")
    if core is not None:
        if core.ndim < 3 or core.shape[:2] != (a.shape[0], b.shape[0]):
            raise ShapeMismatch(f"A core {tuple(core.shape)} does not fit {whole}'s factors.")
        return torch.einsum("ij...,ic,jd->cd...", core.float(), a, b).flatten(1)
    if a.ndim > 2 or a.shape[1] != b.shape[0]:
        raise ShapeMismatch(f"{whole}_a {tuple(a.shape)} and {whole}_b {tuple(b.shape)} differ.")
    return a.flatten(1) @ b.flatten(1)
