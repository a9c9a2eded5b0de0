"""GGUF: llama.cpp's types, under llama.cpp's or the model's own names.

llama.cpp changes some numbers when it converts a model, and they are changed back here: it reorders
the rows of Llama's queries and keys (for its rotary embedding), adds 1 to Gemma's norms, and
transposes GPT-2's Conv1D. Files for diffusion models keep names and numbers; what ComfyUI's tools
had to reshape carries its shape in ``comfy.gguf.orig_shape.NAME``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from regraft.bases.quantised.gguf_names import architecture, to_transformers
from regraft.bases.quantised.packed import Names, Packed, Parts, malformed, missing, transposed
from regraft.errors import NotABase
from regraft.files.gguffile import GGUFFile

_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def find(tensors: Names) -> Iterator[Packed]:
    """Every weight of a GGUF file, also the plain ones: names and numbers may be changed.

    Raises
    ------
    MalformedFile
    NotABase
        A language model of an architecture whose names have no table.
    """
    known: dict[int, str] = {}
    for tensor, file in tensors.items():
        if not isinstance(file, GGUFFile):
            continue
        kind = known.get(id(file))
        if kind is None:
            kind = known[id(file)] = architecture(file)
        name = to_transformers(kind, tensor, tensors) if kind else tensor
        if name is not None:
            yield _packed(file, tensor, name, kind)


def _packed(file: GGUFFile, tensor: str, name: str, kind: str) -> Packed:
    form = f"GGUF {file.kinds[tensor]}"
    _check_readable(file, tensor)
    shape = _own_shape(file, tensor, form)
    heads = _heads(file, tensor, name, kind, form)
    less = 1.0 if kind.startswith("gemma") and name.endswith("norm.weight") else 0.0
    if heads and (shape[0] % (2 * heads)):
        raise malformed(form, file, tensor, f"its rows do not divide into {heads} heads")
    decode = partial(_decode, file.kinds[tensor], shape, heads, less)
    plain = file[tensor].dtype.is_floating_point and shape == file.shapes[tensor]
    plain &= not heads and not less
    packed = Packed(name, form, shape, {"codes": (file, tensor)}, decode, plain=plain)
    if kind == "gpt2" and name.endswith(_CONV1D) and len(shape) == 2:
        return transposed(packed)
    return packed


def _check_readable(file: GGUFFile, tensor: str) -> None:
    """Whether the gguf package can decode a tensor's type; a few exist for computing only."""
    if file[tensor].dtype != torch.uint8:
        return
    try:
        from gguf import quants
    except ImportError as error:
        raise missing("GGUF", "gguf") from error
    if not hasattr(quants, file.kinds[tensor]):
        raise NotABase(
            f"The gguf package cannot decode the type {file.kinds[tensor]}.",
            file=file.path,
            tensor=tensor,
            fix="Upgrade gguf, or give the 16-bit checkpoint it was made from.",
        )


def _own_shape(file: GGUFFile, tensor: str, form: str) -> tuple[int, ...]:
    shape = file.shapes[tensor]
    told = file.settings.get(f"comfy.gguf.orig_shape.{tensor}")
    if not isinstance(told, list):
        return shape
    if not all(type(n) is int and n > 0 for n in told) or prod(told) != prod(shape):
        raise malformed(form, file, tensor, "its own shape does not hold as many numbers")
    return tuple(told)


def _heads(file: GGUFFile, tensor: str, name: str, kind: str, form: str) -> int:
    """The number of heads among whose rows llama.cpp reordered; 0 where it did not."""
    if kind != "llama" or not any(f".self_attn.{w}_proj." in name for w in ("q", "k")):
        return 0
    found: Any = file.settings.get("llama.attention.head_count")
    if ".k_proj." in name:
        found = file.settings.get("llama.attention.head_count_kv", found)
    layer = int(tensor.split(".")[1])
    if isinstance(found, list):
        found = found[layer] if layer < len(found) else None
    if not isinstance(found, int) or found < 1:
        raise malformed(form, file, tensor, "the file does not say how many heads it has")
    return found


def _decode(kind: str, shape: tuple[int, ...], heads: int, less: float, parts: Parts) -> Tensor:
    codes = parts["codes"]
    if codes.dtype == torch.uint8:
        try:
            import gguf
        except ImportError as error:
            raise missing(f"GGUF {kind}", "gguf") from error
        numbers = gguf.quants.dequantize(codes.numpy(), gguf.GGMLQuantizationType[kind])
        whole = torch.from_numpy(numbers).reshape(shape)
    else:
        whole = codes.float().reshape(shape)
    if heads:
        half = shape[0] // heads // 2
        whole = whole.reshape(heads, half, 2, *shape[1:]).transpose(1, 2).reshape(shape)
    return whole - less if less else whole
