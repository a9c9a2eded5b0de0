"""OFT: the weight is rotated, block by block.

Paper: arXiv 2306.07280. Three writers, two sides of the weight:

* LyCORIS ``diag-oft`` and sd-scripts ``networks/oft.py`` rotate **outputs**. ``oft_blocks``
  (k, b, b), k·b = out. Q = X − Xᵀ over all blocks, shrunk to the norm alpha · out if it is larger
  (alpha is a constraint here, not a scale; 0 is none). R = (I + Q)(I − Q)⁻¹, W' = Rᵀ W0 per block.
  ``rescale`` (out, 1, …): W' = rescale ⊙ Rᵀ W0.
* PEFT rotates **inputs**. ``oft_r`` (k, b(b−1)/2) holds the upper triangle of each Q = U − Uᵀ.
  W' = W0 block_diag(R)ᵀ with R = (I − Q)(I + Q)⁻¹, or the truncated series
  R = I + 2Q + 2Q² + … + Qᵗ (``use_cayley_neumann``, its default; t from
  ``num_cayley_neumann_terms``, 5: powers to the fourth). Note the other sign of Q.
  ``coft`` first shrinks each Q to the norm eps / √k. One row with ``block_share``: repeated.
  Convolutions: the input side is in·kh·kw. There PEFT's merge and its own forward pass disagree
  unless the kernel is 1×1; we do what its merge does.
  Embeddings (``oft_embedding_r``): W' = W0 block_diag(R).

ΔW depends on W0 and has full rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import by_blocks, cayley, changed, out_in
from regraft.adapters.update import Dense
from regraft.errors import FamilyNotYet, ShapeMismatch


@family(
    name="oft",
    title="OFT",
    paper="https://arxiv.org/abs/2306.07280",
    equation="W = R W0, R orthogonal in blocks",
    needs=[("oft_blocks",), ("oft_r",), ("oft_embedding_r",)],
    may=("rescale",),
    marks=("oft_blocks", "oft_r", "oft_embedding_r", "rescale"),
    needs_base=True,
)
def build(module: Module) -> Built:
    """ΔW in full, made from the base's weight each time it is asked for."""
    for role in ("oft_r", "oft_embedding_r"):
        if role in module.tensors:
            return {"weight": _peft(module, role)}
    if module.tensors["oft_blocks"].ndim == 4:
        from regraft.adapters.families.boft import butterfly  # which imports this file

        return {"weight": butterfly(module)}
    blocks = constrained(module)
    m = out_in(module)[0]
    if blocks.ndim != 3 or blocks.shape[0] * blocks.shape[1] != m:
        raise ShapeMismatch(f"Blocks {tuple(blocks.shape)} do not make {m} outputs.")
    rotation = cayley(blocks).mT
    factor = rescale(module)
    stored = module.tensors["oft_blocks"].dtype
    return {"weight": changed(module, lambda w: by_blocks(rotation, w) * factor, stored)}


def constrained(module: Module) -> Tensor:
    """Q = X − Xᵀ of LyCORIS' and sd-scripts' blocks, within the constraint."""
    blocks = module.tensors["oft_blocks"].float()
    if blocks.ndim < 3 or blocks.shape[-1] != blocks.shape[-2]:
        raise ShapeMismatch(f"Blocks {tuple(blocks.shape)} are not square.")
    skew = blocks - blocks.mT
    most = (module.alpha or 0.0) * out_in(module)[0]
    norm = float(skew.norm()) + 1e-8
    return skew * (most / norm) if 0 < most < norm else skew


def rescale(module: Module) -> Tensor:
    """The factor of each output, (out, 1); ones if the file has none."""
    m = out_in(module)[0]
    found = module.tensors.get("rescale")
    if found is None:
        return torch.ones(m, 1)
    if found.numel() != m:
        raise ShapeMismatch(f"A rescale {tuple(found.shape)} does not fit {m} outputs.")
    return found.float().reshape(m, 1)


def _peft(module: Module, role: str) -> Dense:
    packed = module.tensors[role].float()
    said = module.settings
    if packed.ndim == 3:
        raise FamilyNotYet(
            "This OFT is of PEFT before 0.14, which defined it otherwise.",
            fix="Merge it with the PEFT it was made with, and diff the merged checkpoint.",
        )
    if not said:
        raise FamilyNotYet(
            "An OFT file of PEFT says nothing without its config: exact or truncated rotation.",
            fix="Put its adapter_config.json beside it.",
        )
    b = round(0.5 + (0.25 + 2 * packed.shape[-1]) ** 0.5)
    if packed.ndim != 2 or b * (b - 1) // 2 != packed.shape[-1]:
        raise ShapeMismatch(f"Rotations {tuple(packed.shape)} are not packed triangles.")
    side = out_in(module)[1]
    if side % b or (len(packed) != 1 and len(packed) * b != side):
        raise ShapeMismatch(f"Rotations of size {b} do not divide {side} inputs.")
    skew = torch.zeros(len(packed), b, b)
    rows, cols = torch.triu_indices(b, b, 1)
    skew[:, rows, cols] = packed
    skew = skew - skew.mT
    if said.get("coft"):
        most = float(said.get("eps", 6e-5)) / len(packed) ** 0.5
        norm = skew.flatten(1).norm(dim=1)[:, None, None]
        skew = torch.where(norm <= most, skew, skew * most / norm.clamp_min(1e-30))
    if said.get("use_cayley_neumann", True):
        rotation = _series(skew, int(said.get("num_cayley_neumann_terms", 5)))
    else:
        rotation = cayley(-skew)
    if len(rotation) == 1:
        rotation = rotation.expand(side // b, b, b)
    stored = module.tensors[role].dtype
    if role == "oft_embedding_r":  # the embedding itself is rotated, x R
        rotation = rotation.mT
    return changed(module, lambda w: by_blocks(rotation, w.mT).mT, stored)


def _series(skew: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + Q^(terms − 1), as PEFT has it: 3 terms make the same as 4."""
    total = torch.eye(skew.shape[-1]).repeat(len(skew), 1, 1)
    if terms < 3:
        return total + 2 * skew * (terms == 2)
    power = total
    for _ in range(1, max(terms, 4) - 1):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew
