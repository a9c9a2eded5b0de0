"""compressed-tensors, format pack-quantized: 4 or 8 bits, packed along the inputs.

``weight_packed`` (out, in · bits / 32) is int32 and holds q + 2^(bits−1); ``weight_scale``
(out, groups) or (out, 1); ``weight_shape`` is (out, in); ``weight_zero_point``
(out · bits / 32, groups), packed along the outputs, is there if the zero is not 0; ``weight_g_idx``
says which input is in which group. W = scale · (q − z).

Its fp8 and int8 formats are codes times scales, and :mod:`scaled` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from regraft.bases.quantised.integers import unpack
from regraft.bases.quantised.packed import Names, Packed, Parts, ending, malformed, need

_FORM = "compressed-tensors int"
_OPTIONAL = {"zero": "weight_zero_point", "g_idx": "weight_g_idx"}


def find(tensors: Names) -> Iterator[Packed]:
    """Every pack-quantized weight of a checkpoint.

    Raises
    ------
    MalformedFile
    """
    for codes, module, file in ending(tensors, ".weight_packed"):
        names = {"scale": f"{module}.weight_scale", "shape": f"{module}.weight_shape"}
        need(_FORM, tensors, codes, *names.values())
        names |= {w: f"{module}.{n}" for w, n in _OPTIONAL.items() if f"{module}.{n}" in tensors}
        info: dict[str, Any] = {w: tensors[n][n] for w, n in names.items()}
        bad = partial(malformed, _FORM, file, codes)
        words, scale, shape = file[codes], info["scale"].shape, info["shape"]
        if shape.dtype not in (torch.int64, torch.int32) or prod(shape.shape) != 2:
            raise bad("weight_shape is not two sizes")
        # Two numbers, and nothing else says how wide the weight is.
        outputs, inputs = tensors[names["shape"]].read(names["shape"]).reshape(2).tolist()
        fits = len(words.shape) == len(scale) == 2 and words.dtype == torch.int32 and inputs > 0
        bits = next(
            (b for b in (4, 8) if fits and words.shape == (outputs, -(-inputs * b // 32))), 0
        )
        if not bits or scale[0] != outputs or not scale[1]:
            raise bad("its codes, scales and weight_shape do not fit together")
        if "g_idx" not in info and inputs % scale[1]:
            raise bad("its inputs do not divide into its groups")
        if "g_idx" in info and info["g_idx"].shape != (inputs,):
            raise bad("weight_g_idx does not hold one group per input")
        if "zero" in info and info["zero"].shape != (-(-outputs * bits // 32), scale[1]):
            raise bad("weight_zero_point does not fit its scales")
        parts = {"codes": (file, codes)} | {w: (tensors[n], n) for w, n in names.items()}
        size = (outputs, inputs)
        decode = partial(_decode, bits, size)
        yield Packed(f"{module}.weight", f"{_FORM}{bits}", size, parts, decode)


def _decode(bits: int, shape: tuple[int, int], parts: Parts) -> Tensor:
    outputs, inputs = shape
    scale = parts["scale"].float()
    middle = 2 ** (bits - 1)
    whole: Tensor = unpack(parts["codes"], bits, inputs).float() - middle
    if "g_idx" in parts and bool((parts["g_idx"] >= 0).all()):
        group = parts["g_idx"].long()
    else:  # all −1 where the groups are in order
        group = torch.arange(inputs) // (inputs // scale.shape[1])
    if "zero" in parts:
        zero = unpack(parts["zero"].T, bits, outputs).T.float() - middle
        whole -= zero[:, group]
    whole *= scale[:, group]
    return whole
