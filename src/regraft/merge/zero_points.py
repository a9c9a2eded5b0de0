"""Zero points that take a change: z' = z − ΔW / s, in each form that stores them.

torchao's integers may have zero points that are floats: exact, to fp32 rounding. Those of GPTQ and
AWQ are integers of as many bits as the codes: rounded to the nearest that can be stored, which
takes away what lies between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from regraft.adapters import Adapter
from regraft.bases import Base
from regraft.bases.base import Weight
from regraft.bases.quantised import awq, gptq, torch_ao
from regraft.bases.quantised.integers import pack, unpack
from regraft.bases.quantised.packed import Packed, Parts, method
from regraft.errors import QuantisedWeight, ShapeMismatch

_AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


@dataclass(frozen=True)
class Moved:
    """One weight with its zero points moved.

    Attributes
    ----------
    tensor : str
        Name of the stored zero points.
    zeros : Tensor
        What is stored instead: fp32 (m, groups), or int32 words.
    written : Tensor
        The change that they mean, (m, groups) in fp64.
    differs : bool
        Whether any stored zero point is another than before.
    ends : int
        Zero points that were cut off at an end of their range.
    """

    tensor: str
    zeros: Tensor
    written: Tensor
    differs: bool
    ends: int = 0


def has_zeros(base: Base, adapter: Adapter) -> bool:
    """Whether every site of the adapter is a weight of the base with zero points that can move."""
    return bool(adapter.updates) and all(
        site in base.weights and _mover(base.weights[site]) is not None for site in adapter.updates
    )


def moved_zeros(weight: Weight, change: Tensor) -> tuple[Moved, Tensor]:
    """Move a weight's zero points by a change's mean over each group.

    Parameters
    ----------
    weight : Weight
    change : Tensor
        ΔW, (out, in).

    Returns
    -------
    Moved
    Tensor
        The group of each input, (in,).

    Raises
    ------
    QuantisedWeight
        The weight has no zero points that can move.
    ShapeMismatch
    """
    move = _mover(weight)
    if move is None:
        form = weight.quantised.form if weight.quantised is not None else "not quantised"
        raise QuantisedWeight(
            f"The weight of {weight.site} has no zero points that could take a change ({form}).",
            file=weight.file.path,
            tensor=weight.tensor,
            fix="Give the base quantised to torchao integers by groups, GPTQ or AWQ.",
        )
    if tuple(change.shape) != weight.shape:
        raise ShapeMismatch(
            f"The update {tuple(change.shape)} of {weight.site} does not fit the weight "
            f"{weight.shape}.",
            file=weight.file.path,
        )
    packed = weight.quantised
    assert isinstance(packed, Packed)
    parts = {word: file.read(tensor) for word, (file, tensor) in packed.parts.items()}
    return move(packed, parts, change.double())


_Move = Callable[[Packed, Parts, Tensor], tuple[Moved, Tensor]]


def _mover(weight: Weight) -> _Move | None:
    packed = weight.quantised
    if not isinstance(packed, Packed) or weight.rows or not isinstance(packed.decode, partial):
        return None
    if packed.decode.func is gptq._decode:
        return _move_gptq
    if packed.decode.func is awq._decode:
        return _move_awq
    if packed.decode.func is torch_ao._decode and "zero_point" in packed.parts:
        file, tensor = packed.parts["zero_point"]
        shape = file[tensor].shape
        fits = len(shape) == 2 and shape[0] == packed.shape[0] and not packed.shape[1] % shape[1]
        return _move_torchao if fits and "scale" in packed.parts else None
    return None


def means_of(change: Tensor, group: Tensor, groups: int) -> Tensor:
    """Mean over the inputs of each group: (m, n) → (m, groups)."""
    count = torch.bincount(group, minlength=groups).clamp(min=1)
    return torch.zeros(len(change), groups, dtype=change.dtype).index_add_(1, group, change) / count


def _move_torchao(packed: Packed, parts: Parts, change: Tensor) -> tuple[Moved, Tensor]:
    scale, before = parts["scale"].double(), parts["zero_point"].double()
    groups = scale.shape[1]
    group = torch.arange(change.shape[1]) // (change.shape[1] // groups)
    zeros = (before - means_of(change, group, groups) / scale).float()
    moved = before - zeros.double()
    return Moved(packed.parts["zero_point"][1], zeros, moved * scale, bool(moved.any())), group


def _move_gptq(packed: Packed, parts: Parts, change: Tensor) -> tuple[Moved, Tensor]:
    outputs, inputs = packed.shape
    bits = int(packed.form.split()[1].removesuffix("-bit"))
    offset = 0 if method(packed.file).get("checkpoint_format") == "gptq_v2" else 1
    scale = parts["scales"].double().T
    if "g_idx" in parts:
        group = parts["g_idx"].long()
    else:
        group = torch.arange(inputs) // (inputs // scale.shape[1])
    before = unpack(parts["qzeros"], bits, outputs).T.long() + offset
    means = means_of(change, group, scale.shape[1])
    found, written, ends = _rounded(before, scale, means, bits, offset)
    words = pack(found.T - offset, bits)
    differs = not found.equal(before)
    return Moved(packed.parts["qzeros"][1], words, written, differs, ends), group


def _move_awq(packed: Packed, parts: Parts, change: Tensor) -> tuple[Moved, Tensor]:
    outputs, inputs = packed.shape
    scale = parts["scales"].double().T
    group = torch.arange(inputs) // (inputs // scale.shape[1])
    before = awq._nibbles(parts["qzeros"]).T.long()
    means = means_of(change, group, scale.shape[1])
    found, written, ends = _rounded(before, scale, means, 4, 0)
    placed = found.T.reshape(scale.shape[1], outputs // 8, 8)[..., _AWQ_ORDER].flatten(1)
    differs = not found.equal(before)
    return Moved(packed.parts["qzeros"][1], pack(placed, 4), written, differs, ends), group


def _rounded(
    before: Tensor, scale: Tensor, change: Tensor, bits: int, offset: int
) -> tuple[Tensor, Tensor, int]:
    """The nearest zero points that can be stored, the change they mean, and how many are cut."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    wanted = torch.where(scale == 0, before.double(), before - change / safe)
    nearest = wanted.round()
    found = nearest.clamp(offset, offset + 2**bits - 1)
    return found.long(), (before - found) * scale, int((found != nearest).sum())
