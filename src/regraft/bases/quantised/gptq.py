"""GPTQ: integers of 2, 3, 4 or 8 bits, packed along the inputs.

For input i, output o, and g = g_idx[i] (or i over the group size):
W[o, i] = scales[g, o] · (q[i, o] − z[g, o]).

``qweight`` (in · bits / 32, out) and ``qzeros`` (groups, out · bits / 32) are int32, ``scales``
(groups, out). Files of ``checkpoint_format`` "gptq" (v1, the usual) store z − 1, those of
"gptq_v2" store z. With ``desc_act`` the groups are not in order, and ``g_idx`` says which is whose.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from regraft.bases.quantised.integers import unpack
from regraft.bases.quantised.packed import (
    Names,
    Packed,
    Parts,
    ending,
    malformed,
    method,
    need,
)

_FORM = "GPTQ"


def find(tensors: Names) -> Iterator[Packed]:
    """Every GPTQ weight of a checkpoint; AWQ's tensors have the same names and are left.

    Raises
    ------
    MalformedFile
    """
    for codes, module, file in ending(tensors, ".qweight"):
        names = {w: f"{module}.{w}" for w in ("qzeros", "scales", "g_idx")}
        need(_FORM, tensors, codes, names["qzeros"], names["scales"])
        info = {w: tensors[n][n] for w, n in names.items() if n in tensors}
        words, zeros, scales = file[codes].shape, info["qzeros"].shape, info["scales"].shape
        bad = partial(malformed, _FORM, file, codes)
        if not len(words) == len(zeros) == len(scales) == 2 or not all((*zeros, *scales)):
            raise bad("its parts are not matrices")
        if words[1] != scales[1]:
            continue  # packed along the outputs: AWQ
        groups, outputs = scales
        bits, odd = divmod(zeros[1] * 32, outputs)
        # With few outputs the last word of zeros is only part full.
        bits = (
            bits
            if not odd
            else next((b for b in (2, 3, 4, 8) if -(-outputs * b // 32) == zeros[1]), 0)
        )
        if bits not in (2, 3, 4, 8) or zeros[0] != groups or words[0] * 32 % bits:
            raise bad("its codes, zeros and scales do not fit together")
        inputs = words[0] * 32 // bits
        ids = info.get("g_idx")
        if ids is not None and (ids.shape != (inputs,) or ids.dtype.is_floating_point):
            raise bad("g_idx does not hold one group per input")
        if ids is None and inputs % groups:
            raise bad("its inputs do not divide into its groups")
        if file[codes].dtype != torch.int32 or info["qzeros"].dtype != torch.int32:
            raise bad("its codes are not int32")
        offset = 0 if method(file).get("checkpoint_format") == "gptq_v2" else 1
        parts = {"codes": (file, codes)} | {w: (tensors[names[w]], names[w]) for w in info}
        decode = partial(_decode, bits, offset, (outputs, inputs))
        yield Packed(f"{module}.weight", f"{_FORM} {bits}-bit", (outputs, inputs), parts, decode)


def _decode(bits: int, offset: int, shape: tuple[int, int], parts: Parts) -> Tensor:
    outputs, inputs = shape
    scales = parts["scales"].float()
    codes = unpack(parts["codes"].T, bits, inputs)  # (out, in)
    zeros = unpack(parts["qzeros"], bits, outputs).float() + offset  # (groups, out)
    if "g_idx" in parts:
        group = parts["g_idx"].long()
        if int(group.min()) < 0:
            raise ValueError("g_idx names a group below 0")
    else:
        group = torch.arange(inputs) // (inputs // scales.shape[0])
    whole = codes.float()
    whole -= zeros.T[:, group]
    whole *= scales.T[:, group]
    return whole
