"""LoRA, and LoCon: the same on convolutions, with or without a Tucker core.

Papers: LoRA, arXiv 2106.09685; LoCon, LyCORIS, arXiv 2309.14859.

* ΔW = s · B A with s = alpha / r; rsLoRA (arXiv 2312.03732): s = alpha / √r.
* Convolution: A is a kernel (r, in, kh, kw), B is (out, r, 1, 1); ΔW = B.flat @ A.flat.
* Tucker (``lora_mid``, the core M): ΔW[o,i,x,y] = s · Σ_jk B[o,j] M[j,k,x,y] A[k,i].
* A bias on B (PEFT's ``lora_bias``): Δb = s · b_B.

DyLoRA (arXiv 2210.07558; sd-scripts, LyCORIS) trains at changing ranks, and its files are plain
LoRA: all directions, joined. Readers apply them at alpha / r. LyCORIS itself trains at
alpha / (number of blocks) when all blocks are in play.
PiSSA and its like are in mutated.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from regraft.adapters.families import qalora
from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.update import Dense, Layout, LowRank
from regraft.errors import ShapeMismatch


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    role = "down" if "down" in shapes else "embedding_a"
    return shapes[role][0] if shapes[role] else None


@family(
    name="lora",
    title="LoRA",
    paper="https://arxiv.org/abs/2106.09685",
    equation="ΔW = (alpha / r) B A",
    needs=[("down", "up"), ("embedding_a", "embedding_b"), ("down", "mid", "up")],
    may=("up_bias",),
    marks=("down", "up", "embedding_a", "embedding_b", "mid"),
    rank=_rank,
)
def build(module: Module) -> Built:
    """ΔW as its two factors; a Tucker core is multiplied into A, which is exact."""
    tensors = module.tensors
    embedding = "embedding_a" in tensors
    a, b = (
        (tensors["embedding_a"], tensors["embedding_b"])
        if embedding
        else (tensors["down"], tensors["up"])
    )
    rank = module.rank_of("embedding_a" if embedding else "down")
    module.rank_of("embedding_b" if embedding else "up")
    if not embedding and qalora.is_pooled(module):
        raise ShapeMismatch(
            f"A of shape {tuple(a.shape)} reads fewer inputs than the weight {module.shape} has.",
            fix="It is not made for this base; or it is a QA-LoRA, and its adapter_config.json "
            'must say how it pools: "qalora_pool": "peft", "mean" (the authors\' code) or "sum".',
        )
    if "mid" in tensors:
        a, b = tucker(a, tensors["mid"]), b.flatten(1)
    layout: Layout = "embedding" if embedding else turned(module, a, b)
    scale = module.scale(rank)
    built: Built = {"weight": low_rank(a, b, scale, module.shape, layout)}
    if "up_bias" in tensors:
        change = tensors["up_bias"].float() * scale
        built["bias"] = Dense(lambda: change, tuple(change.shape), stored=tensors["up_bias"].dtype)
    return built


def tucker(down: Tensor, mid: Tensor) -> Tensor:
    """A kernel (r, in, kh, kw) from the Tucker core (r, r', kh, kw) and A (r', in)."""
    if mid.ndim < 3 or mid.shape[1] != down.shape[0]:
        raise ShapeMismatch(f"A core {tuple(mid.shape)} does not fit A {tuple(down.shape)}.")
    return torch.einsum("jk...,ki->ji...", mid.float(), down.flatten(1).float())


def turned(module: Module, a: Tensor, b: Tensor) -> Layout:
    """How the base stores this weight: as the module says, unless the shapes say otherwise.

    PEFT keeps one ``fan_in_fan_out`` for all layers and goes by each layer's class, so a saved
    flag can be wrong for a layer.
    """
    if len(module.shape) > 2:
        return "conv"
    out, inside = b.shape[0], prod(a.shape[1:])
    straight, turn = module.shape == (out, inside), module.shape == (inside, out)
    if straight != turn:
        return "transposed" if turn else "linear"
    said = module.layout == "transposed" or bool(module.settings.get("fan_in_fan_out"))
    return "transposed" if said else "linear"


def low_rank(a: Tensor, b: Tensor, scale: float, shape: tuple[int, ...], layout: Layout) -> LowRank:
    """The update of a pair of factors in the shapes files use.

    Raises
    ------
    ShapeMismatch
    """
    if a.shape[0] != b.shape[1]:
        raise ShapeMismatch(f"Factors {tuple(a.shape)} and {tuple(b.shape)} differ in rank.")
    if layout in ("embedding", "transposed"):
        # The base stores (in, out): ΔW = (B A)ᵀ.
        a, b = a.flatten(1), b.flatten(1)
        return LowRank(a.mT.contiguous(), b.mT.contiguous(), scale, shape, layout)
    if a.ndim > 2 and len(shape) > 2 and tuple(a.shape[1:]) != shape[1:]:
        raise ShapeMismatch(f"A factor {tuple(a.shape)} does not fit a weight {shape}.")
    if b.ndim > 2 and prod(b.shape[2:]) != 1:
        raise ShapeMismatch(f"A factor {tuple(b.shape)} is not 1×1.")
    return LowRank(b.flatten(1), a.flatten(1), scale, shape, layout)
