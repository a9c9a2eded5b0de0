"""Integers of 2 to 8 bits packed into 32-bit words."""

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
