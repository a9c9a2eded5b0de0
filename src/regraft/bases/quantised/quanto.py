"""optimum-quanto: ``M.weight._data`` and its scale, per row or per group.

8 bits (qint8, qfloat8): W = _scale · _data. 2 and 4 bits: ``M.weight._data._data`` is uint8 with
several rows in one, ``_scale`` and ``_shift`` have one number per group, and
W = _scale · q − _shift. A grouped weight is stored as (groups, group size) and nothing beside it
says its shape, which is found from the layer's bias or the widths in the model's config.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from regraft.bases.quantised.packed import (
    Names,
    Packed,
    Parts,
    ending,
    malformed,
    need,
    settings,
)
from regraft.errors import NotABase
from regraft.files import TensorFile

#: Group sizes that quanto chooses among; it groups only weights of more than 128 inputs.
_GROUPS = (32, 64, 96, 128)
#: Layers that read from, or write to, the width the config calls hidden_size.
_FROM_HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "qkv_proj")
_TO_HIDDEN = ("o_proj", "out_proj", "down_proj", "fc2")


def find(tensors: Names) -> Iterator[Packed]:
    """Every quanto weight of a checkpoint.

    Raises
    ------
    MalformedFile
    NotABase
        A grouped weight whose shape nothing tells.
    """
    for codes, name, file in ending(tensors, "._data"):
        if name.endswith("._data"):
            yield _low_bits(tensors, name.removesuffix("._data"), codes)
            continue
        if f"{codes}._data" in tensors:
            continue
        form = "quanto int8" if file[codes].dtype == torch.int8 else "quanto fp8"
        need(form, tensors, codes, f"{name}._scale")
        shape, scale = file[codes].shape, tensors[f"{name}._scale"][f"{name}._scale"]
        by_row = (shape[0], *(1 for _ in shape[1:])) if shape else ()
        if not shape or not scale.dtype.is_floating_point or scale.shape not in ((), by_row):
            raise malformed(form, file, codes, "its scale is not one number per row")
        parts = {"codes": (file, codes), "scale": (tensors[f"{name}._scale"], f"{name}._scale")}
        yield Packed(name, form, shape, parts, _decode, _scales_of_activations(tensors, name))


def _scales_of_activations(tensors: Names, name: str) -> tuple[str, ...]:
    module = name.rpartition(".")[0]
    mates = (f"{module}.input_scale", f"{module}.output_scale")
    return tuple(m for m in mates if m in tensors)


def _decode(parts: Parts) -> Tensor:
    # In the scale's dtype, as quanto multiplies.
    return parts["scale"] * parts["codes"].to(parts["scale"].dtype)


def _low_bits(tensors: Names, name: str, codes: str) -> Packed:
    form, file = "quanto int4", tensors[codes]
    need(form, tensors, codes, f"{name}._scale", f"{name}._shift")
    info, scale = file[codes], tensors[f"{name}._scale"][f"{name}._scale"]
    shift = tensors[f"{name}._shift"][f"{name}._shift"]
    rows = prod(scale.shape)
    bits = next((b for b in (4, 2) if info.shape and info.shape[0] == -(-rows * b // 8)), 0)
    fits = info.dtype == torch.uint8 and len(info.shape) >= 2 and scale.shape == shift.shape
    if not bits or not fits or scale.shape != (rows, *(1 for _ in info.shape[1:])):
        raise malformed(form, file, codes, "its codes, scale and shift do not fit together")
    form = f"quanto int{bits}"
    stored = (rows, *info.shape[1:])
    shape = _shape(tensors, name, form, file, stored)
    parts = {"codes": (file, codes)}
    parts |= {w: (tensors[f"{name}.{w}"], f"{name}.{w}") for w in ("_scale", "_shift")}
    decode = partial(_decode_low_bits, bits, stored, shape)
    return Packed(name, form, shape, parts, decode, _scales_of_activations(tensors, name))


def _shape(
    tensors: Names, name: str, form: str, file: TensorFile, stored: tuple[int, ...]
) -> tuple[int, ...]:
    """The weight's own shape, which is not the stored one if it has groups."""
    rows, columns, numbers = stored[0], stored[-1], prod(stored)
    if len(stored) > 2 or columns not in _GROUPS:
        return stored
    module = name.rpartition(".")[0]
    bias = f"{module}.bias"
    config: dict[str, Any] = settings(file)
    hidden, last = config.get("hidden_size"), module.rpartition(".")[2]
    outputs = 0
    if bias in tensors:
        outputs = prod(tensors[bias][bias].shape)
    elif isinstance(hidden, int) and hidden > 0 and last in _TO_HIDDEN:
        outputs = hidden
    elif isinstance(hidden, int) and hidden > 0 and last in _FROM_HIDDEN and not numbers % hidden:
        outputs = numbers // hidden
    if not outputs:
        raise NotABase(
            f"This {form} weight is stored in groups, and nothing says its shape.",
            file=file.path,
            tensor=name,
            fix="Put the model's config.json beside the file, or give the 16-bit checkpoint.",
        )
    if rows % outputs:
        raise malformed(form, file, name, f"its groups do not divide into {outputs} rows")
    return outputs, numbers // outputs


def _decode_low_bits(
    bits: int, stored: tuple[int, ...], shape: tuple[int, ...], parts: Parts
) -> Tensor:
    # Written out: the first time quanto unpacks, it compiles a C++ extension for a minute.
    octets = parts["codes"]
    # The first rows are in the lowest bits of each byte, the next ones above them.
    planes = [octets >> place & (2**bits - 1) for place in range(0, 8, bits)]
    codes = torch.cat(planes)[: stored[0]]
    scale, shift = parts["_scale"], parts["_shift"]
    if shift.dtype.is_floating_point:
        whole = scale * codes.to(scale.dtype) - shift
    else:
        whole = (codes.to(scale.dtype) - shift) * scale
    return whole.reshape(shape)
