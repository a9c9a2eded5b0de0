"""Weights that a library keeps in fewer bits: their shape, their numbers, their zero points.

bitsandbytes' weights are parameters of another shape than the matrix they hold; torchao's are
tensors of the right shape that know how to unpack themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BITS_AND_BYTES = ("Params4bit", "Int8Params")
#: torchao's integers with a scale and a zero point for each group of inputs.
_GROUPED = "IntxUnpackedToInt8Tensor"


def is_packed(module: nn.Module) -> bool:
    """Whether a module's weight is stored by a quantising library."""
    kind = type(getattr(module, "weight", None))
    return kind.__name__ in _BITS_AND_BYTES or kind.__module__.startswith("torchao.")


def shape_of(module: Any) -> torch.Size:
    """The shape of the weight that is meant: (out, in) of a linear layer."""
    if type(module.weight).__name__ in _BITS_AND_BYTES:
        return torch.Size((module.out_features, module.in_features))
    found: torch.Size = module.weight.shape
    return found


def whole(module: nn.Module) -> Tensor:
    """The numbers of a packed weight, as its library unpacks them, in its own dtype."""
    from peft.utils.integrations import dequantize_module_weight

    found: Tensor = dequantize_module_weight(module)
    return found.detach()


def group_of(module: nn.Module) -> int | None:
    """How many inputs share a scale and a zero point; None where weights have none that move."""
    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ != _GROUPED or weight.ndim != 2 or weight.block_size[0] != 1:
        return None
    return int(weight.block_size[1])


def with_moved_zeros(weight: Any, change: Tensor) -> nn.Parameter:
    """A grouped weight whose numbers are changed by moving its zero points: W = s (q − z).

    z' = z − ΔW / s in fp32, one number for each output and group; q and s are shared with
    ``weight``.

    Parameters
    ----------
    weight : torchao's IntxUnpackedToInt8Tensor, (m, n) in groups of L
    change : Tensor
        ΔW, one number for each output and group: (m, n / L).
    """
    zeros = weight.zero_point.float() - change.float() / weight.scale.float()
    moved = type(weight)(
        weight.qdata,
        weight.scale,
        zeros,
        weight.target_dtype,
        weight.block_size,
        weight.dtype,
        weight.activation_quantization,
    )
    return nn.Parameter(moved, requires_grad=False)
