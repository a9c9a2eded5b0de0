"""AWQ: 4-bit integers, packed along the outputs in the order its kernels like ("gemm").

W[o, i] = scales[g, o] · (q[i, o] − z[g, o]), g = i over the group size. ``qweight`` (in, out / 8)
and ``qzeros`` (groups, out / 8) are int32; the eight nibbles of a word, lowest first, are the
outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from regraft.bases.quantised.integers import unpack
from regraft.bases.quantised.packed import Names, Packed, Parts, ending, malformed, method

_FORM = "AWQ 4-bit"
#: Where in a word output 0, 1, 2, … lies: the inverse of the order above.
_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


def find(tensors: Names) -> Iterator[Packed]:
    """Every AWQ weight of a checkpoint; what :mod:`gptq` reads is left.

    Raises
    ------
    MalformedFile
    """
    for codes, module, file in ending(tensors, ".qweight"):
        names = {w: f"{module}.{w}" for w in ("qzeros", "scales")}
        if not all(n in tensors for n in names.values()):
            continue  # gptq says so
        words, info = file[codes], {w: tensors[n][n] for w, n in names.items()}
        scales = info["scales"].shape
        if len(words.shape) == len(scales) == 2 and words.shape[1] == scales[1]:
            continue
        bad = partial(malformed, _FORM, file, codes)
        version = str(method(file).get("version", "gemm")).lower()
        if version != "gemm":
            raise bad(f"its layout is {version[:20]!r}, and only gemm is read")
        inputs, outputs = words.shape[0], words.shape[1] * 8
        groups = scales[0]
        fits = info["qzeros"].shape == (groups, words.shape[1]) and scales == (groups, outputs)
        if not fits or not groups or inputs % groups:
            raise bad("its codes, zeros and scales do not fit together")
        if words.dtype != torch.int32 or info["qzeros"].dtype != torch.int32:
            raise bad("its codes are not int32")
        parts = {"codes": (file, codes)} | {w: (tensors[n], n) for w, n in names.items()}
        shape = (outputs, inputs)
        yield Packed(f"{module}.weight", _FORM, shape, parts, partial(_decode, inputs // groups))


def _nibbles(words: Tensor) -> Tensor:
    rows, columns = words.shape
    return unpack(words, 4, columns * 8).reshape(rows, columns, 8)[..., _PLACES].flatten(1)


def _decode(group: int, parts: Parts) -> Tensor:
    whole = _nibbles(parts["codes"]).float()  # (in, out)
    whole -= _nibbles(parts["qzeros"]).float().repeat_interleave(group, 0)
    whole *= parts["scales"].float().repeat_interleave(group, 0)
    return whole.T.contiguous()
