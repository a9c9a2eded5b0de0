"""bitsandbytes: NF4 and FP4 with their quant_state, and LLM.int8() with its SCB.

4 bits: ``weight`` holds two codes a byte, in blocks of ``blocksize`` numbers with one ``absmax``
each; ``quant_map`` has the 16 values; ``quant_state.bitsandbytes__nf4`` is JSON in a uint8 tensor
(shape, dtype, block sizes). With double quantisation ``absmax`` is uint8 itself and
``nested_absmax``, ``nested_quant_map`` and an offset give it back.
8 bits: W = weight · SCB / 127, one SCB per row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from regraft.bases.quantised.packed import Names, Packed, Parts, ending, malformed, need
from regraft.files import TensorFile

_STATE = ".quant_state.bitsandbytes__"
_DTYPES = ("float32", "float16", "bfloat16")
#: The largest quant_state that is read; real ones have about 200 bytes.
_LARGEST_STATE = 65_536


@dataclass(frozen=True)
class FourBits:
    """What a quant_state says; ``nested_blocksize`` is 0 without double quantisation."""

    shape: tuple[int, ...]
    dtype: str
    blocksize: int
    nested_blocksize: int
    nested_offset: float


def find(tensors: Names) -> Iterator[Packed]:
    """Every bitsandbytes weight of a checkpoint.

    Raises
    ------
    MalformedFile
    """
    for kind in ("nf4", "fp4"):
        for state, name, _ in ending(tensors, _STATE + kind):
            if name in tensors:
                yield _four_bits(tensors, name, state, kind)
    for absmax, name, file in ending(tensors, ".absmax"):
        if name in tensors and not any(f"{name}{_STATE}{k}" in tensors for k in ("nf4", "fp4")):
            raise malformed("bitsandbytes", file, absmax, "the checkpoint lacks its quant_state")
    for scb, module, _ in ending(tensors, ".SCB"):
        yield _eight_bits(tensors, module, scb)


def _state(tensors: Names, name: str, tensor: str, form: str) -> dict[str, Any]:
    """The quant_state, its shape, block size and dtype checked."""
    file = tensors[tensor]
    bad = partial(malformed, form, file, tensor)
    if file[tensor].dtype != torch.uint8 or prod(file[tensor].shape) > _LARGEST_STATE:
        raise bad("its quant_state is not a short JSON text")
    try:
        state = json.loads(file.read_bytes(tensor).decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise bad("its quant_state is not JSON") from error
    if not isinstance(state, dict):
        raise bad("its quant_state is not a JSON object")
    shape, block = state.get("shape"), state.get("blocksize")
    sizes = shape if isinstance(shape, list) else [None]
    if not all(type(n) is int and n > 0 for n in (*sizes, block)) or prod(sizes) > 1 << 48:
        raise bad("its quant_state has no usable shape or block size")
    if state.get("quant_type") != tensor[-3:]:
        raise bad("its quant_state is of another type than its name")
    if state.get("dtype") not in _DTYPES:
        raise bad(f"its quant_state has the dtype {str(state.get('dtype'))[:20]!r}")
    return state


def _four_bits(tensors: Names, name: str, state_name: str, kind: str) -> Packed:
    form = f"bitsandbytes {kind.upper()}"
    need(form, tensors, name, f"{name}.absmax", f"{name}.quant_map")
    state = _state(tensors, name, state_name, form)
    words = ["absmax", "quant_map"]
    if "nested_blocksize" in state or f"{name}.nested_absmax" in tensors:
        words += ["nested_absmax", "nested_quant_map"]
        need(form, tensors, name, *(f"{name}.{w}" for w in words))
    parts = {"codes": (tensors[name], name), "state": (tensors[state_name], state_name)}
    parts |= {w: (tensors[f"{name}.{w}"], f"{name}.{w}") for w in words}
    _check(form, parts, state)
    known = FourBits(
        tuple(state["shape"]),
        state["dtype"],
        state["blocksize"],
        state["nested_blocksize"] if "nested_absmax" in parts else 0,
        float(state["nested_offset"]) if "nested_absmax" in parts else 0.0,
    )
    return Packed(name, form, known.shape, parts, partial(_decode_four_bits, known))


def _check(form: str, parts: dict[str, tuple[TensorFile, str]], state: dict[str, Any]) -> None:
    """Sizes and dtypes of all parts, from the header."""
    info = {word: file[tensor] for word, (file, tensor) in parts.items()}
    numbers = prod(state["shape"])
    blocks = -(-numbers // state["blocksize"])
    codes = info["codes"]
    nested = "nested_absmax" in info
    wanted = {"absmax": blocks, "quant_map": 16}
    right = state["blocksize"] in (32, 64, 128, 256, 512, 1024, 2048, 4096)
    right &= prod(codes.shape) * codes.dtype.itemsize == -(-numbers // 2)
    right &= info["absmax"].dtype == (torch.uint8 if nested else torch.float32)
    if nested:
        inner = state.get("nested_blocksize")
        right &= inner in (64, 128, 256, 512, 1024, 2048, 4096)
        right &= state.get("nested_dtype") == "float32"
        offset = state.get("nested_offset")
        right &= isinstance(offset, int | float) and abs(offset) < 1e30
        wanted |= {"nested_absmax": -(-blocks // inner) if right else 0, "nested_quant_map": 256}
    floats = [w for w in wanted if w != "absmax"]
    right &= all(info[w].dtype == torch.float32 for w in floats)
    right &= all(prod(info[w].shape) == count for w, count in wanted.items())
    if not right:
        file, tensor = parts["codes"]
        raise malformed(form, file, tensor, "its codes, scales and quant_state do not fit together")


def _decode_four_bits(state: FourBits, parts: Parts) -> Tensor:
    # Written out: bitsandbytes 0.50.2 on a CPU takes the wrong absmax where blocks cross rows.
    octets = parts["codes"].contiguous().view(torch.uint8).reshape(-1)
    both, values = torch.arange(256), parts["quant_map"]
    pairs = torch.stack([values[both >> 4], values[both & 15]], 1)  # what each byte stands for
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        inner = parts["nested_quant_map"].index_select(0, absmax.reshape(-1).int())
        absmax = _scaled(inner, parts["nested_absmax"], state.nested_blocksize)
        absmax += state.nested_offset
    whole = pairs.index_select(0, octets.int()).reshape(-1)[: prod(state.shape)]
    whole = _scaled(whole, absmax, state.blocksize)
    # It gives numbers in the dtype the weight had.
    return whole.to(getattr(torch, state.dtype)).reshape(state.shape)


def unpacked(codes: Tensor, state: Any) -> Tensor:
    """The numbers of 4-bit codes with bitsandbytes' own ``QuantState``, in its dtype and shape."""
    parts = {"codes": codes, "quant_map": state.code, "absmax": state.absmax}
    inner = state.state2 if state.nested else None
    if inner is not None:
        parts |= {"nested_absmax": inner.absmax, "nested_quant_map": inner.code}
    known = FourBits(
        tuple(state.shape),
        str(state.dtype).removeprefix("torch."),
        state.blocksize,
        inner.blocksize if inner is not None else 0,
        float(state.offset) if inner is not None else 0.0,
    )
    return _decode_four_bits(known, parts)


def _scaled(values: Tensor, absmax: Tensor, size: int) -> Tensor:
    """Values in blocks of ``size`` (the last may be shorter), each times its absmax; in place."""
    full = len(values) // size * size
    absmax = absmax.reshape(-1)
    values[:full].view(-1, size).mul_(absmax[: full // size, None])
    values[full:].mul_(absmax[full // size :])
    return values


def _eight_bits(tensors: Names, module: str, scb: str) -> Packed:
    form, name, layout = "bitsandbytes int8", f"{module}.weight", f"{module}.weight_format"
    if name not in tensors:
        raise malformed(form, tensors[scb], scb, f"the checkpoint lacks {name}")
    codes, scale = tensors[name][name], tensors[scb][scb]
    bad = partial(malformed, form, tensors[name], name)
    if codes.dtype != torch.int8 or len(codes.shape) != 2:
        raise bad("its codes are not an int8 matrix")
    if not scale.dtype.is_floating_point or prod(scale.shape) != codes.shape[0]:
        raise bad("SCB is not one number per row")
    if layout in tensors:
        # bitsandbytes before 0.45 could save tiled layouts made for one kind of GPU.
        file = tensors[layout]
        one = file[layout].dtype == torch.uint8 and prod(file[layout].shape) == 1
        if not one or file.read_bytes(layout)[0] != 0:
            raise bad("its layout (weight_format) is not by rows")
    parts = {"codes": (tensors[name], name), "scale": (tensors[scb], scb)}
    mates = (layout,) if layout in tensors else ()
    return Packed(name, form, codes.shape, parts, _decode_eight_bits, mates)


def unpacked_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """The numbers of LLM.int8() codes with their SCB, in fp32."""
    return _decode_eight_bits({"codes": codes, "scale": scale})


def _decode_eight_bits(parts: Parts) -> Tensor:
    # What int8_vectorwise_dequant does; written out, bitsandbytes need not be installed.
    return parts["codes"].float() * parts["scale"].float().reshape(-1, 1) * 7.874015718698502e-3
