"""FouRA: LoRA in the frequency domain, with a frozen gate.

Paper: arXiv 2406.08798 (NeurIPS 2024). F is an orthonormal one-dimensional transform of the
embedding (the channels of a convolution, at each tap of its kernel), once of the inputs, its
inverse of the outputs; g is the mask of rank directions:

    ΔW = s · F_out⁻¹ B diag(g) A F_in,   s = alpha / r

* DCT-II: real, rank r. DFT with real A and B: the output's real part is taken, rank 2r, since
  Re(L R) = Re L Re R − Im L Im R.
* The paper's gate depends on the input, and then no ΔW exists; files bring the frozen mask g (its
  frozen variant), or none for all ones. The metadata's ``transform`` says "dct" or "dft".

No writer of the authors' exists; the format is ours (docs/formats.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import pi

import torch
from torch import Tensor

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import out_in
from regraft.adapters.update import LowRank
from regraft.errors import FamilyNotYet, MalformedFile, ShapeMismatch


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    return shapes["foura_a"][0] if shapes["foura_a"] else None


def _carried_as(roles: Iterable[str]) -> str:
    if "foura_mask" not in roles:
        return ""  # it never had a gate: its ΔW is all there is of it
    return (
        "FouRA: its gate was frozen to a fixed mask before it was saved; carried as the exact ΔW "
        "under that mask, not as the gated adapter that was trained."
    )


@family(
    name="foura",
    title="FouRA",
    paper="https://arxiv.org/abs/2406.08798",
    equation="ΔW = s F⁻¹ B diag(g) A F",
    needs=[("foura_a", "foura_b")],
    may=("foura_mask",),
    marks=("foura_a", "foura_b", "foura_mask"),
    carried_as=_carried_as,
    rank=_rank,
)
def build(module: Module) -> Built:
    """ΔW in factors: of rank r with a DCT, 2r with a DFT."""
    rank = module.rank_of("foura_a")
    module.rank_of("foura_b")
    a = module.tensors["foura_a"].float().flatten(1)
    b = module.tensors["foura_b"].float().flatten(1)
    mask = module.tensors.get("foura_mask")
    gate = str(module.settings.get("gate") or "none")
    if mask is None and gate != "none":
        raise MalformedFile(
            f"The settings say that the gate is {gate}, but the module {module.name} has no "
            "foura_mask.",
            fix="Some tool dropped it; get the adapter as it was saved.",
        )
    if mask is not None:
        if mask.numel() != rank:
            raise ShapeMismatch(f"A mask {tuple(mask.shape)} does not fit rank {rank}.")
        a = mask.float().reshape(-1, 1) * a
    if (b.shape[0], a.shape[1]) != out_in(module) or b.shape[1] != rank:
        raise ShapeMismatch(
            f"Factors {tuple(b.shape)} and {tuple(a.shape)} do not make an update of a weight "
            f"{module.shape}."
        )
    kind = str(module.settings.get("transform", "")).lower()
    channels = module.shape[1] if module.layout == "conv" else a.shape[1]
    taps = a.reshape(rank, channels, -1)
    if kind == "dct":
        left, right = inverse_dct(b.mT).mT, inverse_dct(taps.mT).mT.flatten(1)
    elif kind == "dft":
        to = torch.fft.fft(taps, dim=1, norm="ortho").flatten(1)
        back = torch.fft.ifft(b, dim=0, norm="ortho")
        left = torch.cat([back.real, -back.imag], dim=1)
        right = torch.cat([to.real, to.imag])
    else:
        raise FamilyNotYet(
            "This FouRA file does not say which transform its factors belong to.",
            fix='Its metadata must have "transform": "dct" or "dft".',
        )
    if module.layout == "transposed":
        left, right = right.mT, left.mT
    made = LowRank(left.contiguous(), right.contiguous(), module.scale(rank), module.shape,
                   module.layout)  # fmt: skip
    return {"weight": made}


def inverse_dct(rows: Tensor) -> Tensor:
    """Each row times the orthonormal DCT-II matrix, which undoes the transform (DCT-III)."""
    n = rows.shape[-1]
    k = torch.arange(n, dtype=torch.float64)
    weights = torch.full((n,), (2 / n) ** 0.5, dtype=torch.float64)
    weights[0] = n**-0.5
    turned = rows.double() * weights * torch.exp(0.5j * pi * k / n)
    # Σ_k c_k x_k cos(π(2i + 1)k / 2n) is the real part of an inverse DFT of twice the length.
    whole: Tensor = torch.fft.ifft(turned, n=2 * n) * (2 * n)
    return whole.real[..., :n].to(rows.dtype)
