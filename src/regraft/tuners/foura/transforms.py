"""The orthonormal transforms of FouRA, moved from the activations into the factors.

With F_in the transform of the inputs and F_out⁻¹ the inverse one of the outputs (arXiv 2406.08798),

    F_out⁻¹ B (g ⊙ A F_in x) = U (g ⊙ D x),   D = A F_in,  U = F_out⁻¹ B

so a forward pass transforms r rows instead of every token. The DFT's output is complex; its real
part is kept:

    Re(U (g ⊙ D x)) = [Re U, −Im U] ([g, g] ⊙ [Re D; Im D] x)

which is real, exact and of rank 2r.
"""

from __future__ import annotations

from math import pi
from typing import Literal, get_args

import torch
from torch import Tensor

Transform = Literal["dct", "dft"]
TRANSFORMS: tuple[str, ...] = get_args(Transform)


def transposed_dct(tensor: Tensor, dim: int = -1) -> Tensor:
    """C^T applied along ``dim``, where C is the orthonormal DCT-II matrix; the shape stays.

    A row vector times C, and the inverse transform of a spectrum, are both this. It stays in the
    tensor's own precision: consumer GPUs do fp64 at a fraction of their fp32 speed.
    """
    n = tensor.shape[dim]
    rows = tensor.movedim(dim, -1)
    angle = torch.arange(n, device=tensor.device, dtype=tensor.dtype) * (pi / (2 * n))
    weight = torch.full_like(angle, (2 / n) ** 0.5)
    weight[0] = 2 / n**0.5  # irfft counts the first coefficient once, the others twice
    spectrum = torch.complex(rows * (weight * angle.cos()), rows * (weight * angle.sin()))
    # Σ_k c_k x_k cos(π(2i + 1)k / 2n) is an inverse real DFT of twice the length.
    turned: Tensor = torch.fft.irfft(spectrum, n=2 * n)[..., :n] * n
    return turned.movedim(-1, dim)


def spatial_factors(a: Tensor, b: Tensor, transform: str) -> tuple[Tensor, Tensor]:
    """(down, up): what A and B, which live in frequencies, are between plain activations.

    Parameters
    ----------
    a : Tensor of shape (r, n) or (r, n, *kernel)
        Convolutions are transformed along their n channels, at each tap of the kernel.
    b : Tensor of shape (m, r)
    transform : str
        "dct" or "dft".

    Returns
    -------
    down : Tensor of shape (q, n, *kernel), up : Tensor of shape (m, q)
        q = r for the DCT, 2r for the DFT: the real parts, then the imaginary ones. Differentiable,
        in the dtype of ``a`` but at least fp32.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if transform == "dct":
        down, up = transposed_dct(a.to(wide), 1), transposed_dct(b.to(wide), 0)
    else:
        there = torch.fft.fft(a.to(wide), dim=1, norm="ortho")
        back = torch.fft.ifft(b.to(wide), dim=0, norm="ortho")
        down = torch.cat([there.real, there.imag])
        up = torch.cat([back.real, -back.imag], dim=1)
    return down, up
