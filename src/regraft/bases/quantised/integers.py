"""Integers of 2 to 8 bits packed into 32-bit words, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Integers packed one behind the other along the last dimension, the lowest bits first.

    For 3 bits some straddle two words (10 and 21 of every 32), as GPTQ packs them.

    Parameters
    ----------
    words : Tensor
        int32, (…, w).
    bits : int
        2, 3, 4 or 8.
    count : int
        How many to take from each row.

    Returns
    -------
    Tensor
        uint8, (…, count).

    Raises
    ------
    ValueError
        The words hold fewer than ``count``.
    """
    if words.dtype != torch.int32 or bits not in (2, 3, 4, 8):
        raise ValueError(f"{bits}-bit integers in {words.dtype} are not read")
    if words.shape[-1] * 32 < count * bits:
        raise ValueError("there are fewer packed integers than the weight has numbers")
    octets = words.contiguous().view(torch.uint8)  # little-endian, as the file is
    if bits == 8:
        return octets[..., :count]
    first = torch.arange(count) * bits
    low, shift = first // 8, (first % 8).to(torch.uint8)
    found: Tensor = octets[..., low] >> shift
    straddles = (first % 8 + bits > 8).nonzero()[:, 0]
    if len(straddles):
        high = octets[..., low[straddles] + 1]
        found[..., straddles] |= high << (8 - shift[straddles])
    found &= 2**bits - 1
    return found


def pack(values: Tensor, bits: int) -> Tensor:
    """What :func:`unpack` reads.

    Parameters
    ----------
    values : Tensor
        Whole numbers from 0 to 2^bits − 1, (…, count).
    bits : int
        2, 3, 4 or 8.

    Returns
    -------
    Tensor
        int32, (…, ⌈count · bits / 32⌉).
    """
    codes = values.to(torch.uint8)
    flags = torch.stack([(codes >> bit) & 1 for bit in range(bits)], dim=-1).flatten(-2)
    flags = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 32))
    words = flags.new_zeros((*flags.shape[:-1], flags.shape[-1] // 32), dtype=torch.int64)
    for bit in range(32):  # one byte for each bit at a time, not eight
        words |= flags[..., bit::32].long() << bit
    found: Tensor = words.to(torch.uint32).view(torch.int32)
    return found
