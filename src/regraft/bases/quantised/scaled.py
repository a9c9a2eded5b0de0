"""Codes times scales: scaled fp8 and int8, under the names of the tools that write them.

W = code · scale, where the scale is one number, one per row, or one per block. Its name:

* ``M.scale_weight``, with a ``scaled_fp8`` tensor as the file's mark (ComfyUI, kohya, musubi);
* ``M.weight_scale`` (newer ComfyUI, with ``M.comfy_quant``; compressed-tensors, FBGEMM);
* ``M.weight_scale_inv`` (DeepSeek, transformers' fine-grained fp8). It is multiplied all the same.

Float8 without any of these is a plain float and not read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from math import prod

import torch
from torch import Tensor

from regraft.bases.quantised.packed import Names, Packed, Parts, malformed, method
from regraft.files import TensorFile

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: Rows and columns of one block, where no config says it: DeepSeek's and everyone's since.
_BLOCK = (128, 128)


def find(tensors: Names) -> Iterator[Packed]:
    """Every weight with a scale beside it.

    Raises
    ------
    MalformedFile
    """
    for name, file in tensors.items():
        info = file[name]
        module, _, parameter = name.rpartition(".")
        if info.dtype not in (*_FP8, torch.int8) or not info.shape:
            continue
        names = (f"{module}.scale_{parameter}", f"{name}_scale", f"{name}_scale_inv")
        scales = [n for n in names if n in tensors]
        if not scales:
            continue
        form = "scaled int8" if info.dtype == torch.int8 else "scaled fp8"
        if len(scales) > 1:
            raise malformed(form, file, name, f"it has two scales, {scales[0]} and {scales[1]}")
        zero = f"{name}_zero_point"
        parts = {"codes": (file, name), "scale": (tensors[scales[0]], scales[0])}
        if zero in tensors:
            parts["zero"] = (tensors[zero], zero)
        mates = (f"{module}.{m}" for m in ("scale_input", "input_scale", "comfy_quant"))
        blocks = _blocks(form, file, name, tensors[scales[0]][scales[0]].shape)
        yield Packed(
            name,
            form,
            info.shape,
            parts,
            partial(_decode, blocks),
            tuple(m for m in mates if m in tensors),
        )


def marks(tensors: Names) -> Iterator[str]:
    """Tensors that only say that a file is scaled fp8."""
    return (t for t in tensors if t.rpartition(".")[2] == "scaled_fp8")


def _blocks(
    form: str, file: TensorFile, name: str, scale: tuple[int, ...]
) -> tuple[int, ...] | None:
    """How many rows and columns share a scale; None for one number for all."""
    shape = file[name].shape
    if prod(scale) == 1:
        return None
    if scale in ((shape[0],), (shape[0], *(1 for _ in shape[1:]))):
        return 1, *shape[1:]
    if len(scale) == 3 and len(shape) == 2 and scale[2] == 1:  # musubi: (rows, blocks, 1)
        scale = scale[:2]
    if len(scale) == len(shape):
        for block in (_configured(file), _BLOCK):
            sizes = (1,) * (len(shape) - 2) + block
            if scale == tuple(-(-n // b) for n, b in zip(shape, sizes, strict=True)):
                return sizes
        # One scale for so many columns of each row.
        if scale[:-1] == shape[:-1] and scale[-1] and shape[-1] % scale[-1] == 0:
            return *(1 for _ in shape[1:]), shape[-1] // scale[-1]
    raise malformed(form, file, name, f"a scale of shape {scale} does not fit {shape}")


def _configured(file: TensorFile) -> tuple[int, int]:
    """The block size that the model's config states, or the usual one."""
    config = method(file)
    found = config.get("weight_block_size")
    groups = config.get("config_groups")
    if found is None and isinstance(groups, dict):  # compressed-tensors
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, dict) else None
            found = weights.get("block_structure") if isinstance(weights, dict) else found
    if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    return _BLOCK


def _decode(blocks: tuple[int, ...] | None, parts: Parts) -> Tensor:
    codes = parts["codes"].float()
    scale = _spread(parts["scale"].float(), blocks, codes.shape)
    if "zero" in parts:
        codes = codes - _spread(parts["zero"].float(), blocks, codes.shape)
    return codes.mul_(scale)


def _spread(scale: Tensor, blocks: tuple[int, ...] | None, shape: torch.Size) -> Tensor:
    """One number per weight, or what broadcasts to that."""
    if blocks is None:
        return scale.reshape(())
    scale = scale.reshape(tuple(-(-n // b) for n, b in zip(shape, blocks, strict=True)))
    for place, block in enumerate(blocks):
        if block > 1 and scale.shape[place] > 1:
            scale = scale.repeat_interleave(block, place).narrow(place, 0, shape[place])
    return scale


def format_in(file: TensorFile, tensor: str) -> str:
    """The format that a ``comfy_quant`` tensor (JSON in uint8) names, or ""."""
    if prod(file[tensor].shape) > 65_536:
        return ""
    try:
        found = json.loads(file.read_bytes(tensor).decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError):
        return ""
    return str(found.get("format", "")) if isinstance(found, dict) else ""
