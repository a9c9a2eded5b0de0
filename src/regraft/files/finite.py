"""A cheap test for NaN and infinity."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite.

    A sum is not finite if any number is not, so one pass settles nearly every tensor; only when
    the sum itself overflows are the numbers looked at one by one.
    """
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no sum of its own
        tensor = tensor.float()
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(float(tensor.sum(dtype=wide))) or bool(torch.isfinite(tensor).all())
