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
    flags = (values.long()[..., None] >> torch.arange(bits)) & 1
    row = flags.flatten(-2)
    row = torch.nn.functional.pad(row, (0, -row.shape[-1] % 32))
    words = (row.reshape(*row.shape[:-1], -1, 32) << torch.arange(32)).sum(dim=-1)
    found: Tensor = words.to(torch.uint32).view(torch.int32)
    return found
