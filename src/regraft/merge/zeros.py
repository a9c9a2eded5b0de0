"""The merge that QA-LoRA is made for: a change put into the zero points of a quantised base.

A base quantised by groups of inputs has W = s (q − z), with a scale s and a zero point z for each
output and group. A change that is the same within each group moves z alone (arXiv 2309.14717):

    z' = z − ΔW / s

torchao's integers may have zero points that are floats: exact, to fp32 rounding. Those of GPTQ and
AWQ are integers of as many bits as the codes: rounded to the nearest that can be stored, which
takes away what lies between, and the amount is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.adapters import Adapter, Site, Update, delta, same_matrix
from regraft.bases import Base
from regraft.bases.base import Weight
from regraft.bases.quantised import awq, gptq, torch_ao
from regraft.bases.quantised.integers import pack, unpack
from regraft.bases.quantised.packed import Packed, Parts, method
from regraft.errors import BadOption, QuantisedWeight, ShapeMismatch
from regraft.files import TensorFile, atomic_folder, serialize
from regraft.files.atomic import check_free
from regraft.merge.folder import copy, lay_out, sync

#: ‖written − ΔW‖ / ‖ΔW‖ below which a merge counts as exact.
_EXACT = 1e-5
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
    ends : int
        Zero points that were cut off at an end of their range.
    """

    tensor: str
    zeros: Tensor
    written: Tensor
    ends: int = 0


@dataclass
class ZeroMerge:
    """What a merge into zero points reports.

    Attributes
    ----------
    sites : int
        Weights that changed.
    forms : dict
        Form of the quantised weights → how many.
    error : float
        ‖written − ΔW‖ / ‖ΔW‖ over all sites.
    outside_groups : float
        The part of ``error`` that is there before any rounding, because ΔW differs within groups.
    cut_off : float
        Share of the zero points that are cut off at an end of their range.
    sha256 : dict
        Weight file → its hash.
    """

    output: str
    sites: int
    forms: dict[str, int]
    error: float
    outside_groups: float
    cut_off: float
    sha256: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(vars(self))


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


def _means(change: Tensor, group: Tensor, groups: int) -> Tensor:
    """Mean over the inputs of each group: (m, n) → (m, groups)."""
    count = torch.bincount(group, minlength=groups).clamp(min=1)
    return torch.zeros(len(change), groups, dtype=change.dtype).index_add_(1, group, change) / count


def _move_torchao(packed: Packed, parts: Parts, change: Tensor) -> tuple[Moved, Tensor]:
    scale, before = parts["scale"].double(), parts["zero_point"].double()
    groups = scale.shape[1]
    group = torch.arange(change.shape[1]) // (change.shape[1] // groups)
    zeros = (before - _means(change, group, groups) / scale).float()
    written = (before - zeros.double()) * scale
    return Moved(packed.parts["zero_point"][1], zeros, written), group


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
    means = _means(change, group, scale.shape[1])
    found, written, ends = _rounded(before, scale, means, bits, offset)
    words = pack(found.T - offset, bits)
    return Moved(packed.parts["qzeros"][1], words, written, ends), group


def _move_awq(packed: Packed, parts: Parts, change: Tensor) -> tuple[Moved, Tensor]:
    outputs, inputs = packed.shape
    scale = parts["scales"].double().T
    group = torch.arange(inputs) // (inputs // scale.shape[1])
    before = awq._nibbles(parts["qzeros"]).T.long()
    means = _means(change, group, scale.shape[1])
    found, written, ends = _rounded(before, scale, means, 4, 0)
    placed = found.T.reshape(scale.shape[1], outputs // 8, 8)[..., _AWQ_ORDER].flatten(1)
    return Moved(packed.parts["qzeros"][1], pack(placed, 4), written, ends), group


def _rounded(
    before: Tensor, scale: Tensor, change: Tensor, bits: int, offset: int
) -> tuple[Tensor, Tensor, int]:
    """The nearest zero points that can be stored, the change they mean, and how many are cut."""
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    wanted = torch.where(scale == 0, before.double(), before - change / safe)
    nearest = wanted.round()
    found = nearest.clamp(offset, offset + 2**bits - 1)
    return found.long(), (before - found) * scale, int((found != nearest).sum())


def merge_into_zeros(
    adapters: Sequence[tuple[Adapter, float]],
    base: Base,
    output: str | Path,
    *,
    lossy: bool = False,
    overwrite: bool = False,
) -> ZeroMerge:
    """Write a quantised base with adapters in its zero points; codes and scales stay.

    Parameters
    ----------
    adapters : sequence of (Adapter, float)
        Loaded against this base, each with its strength; their changes add up.
    base : Base
        A folder of torchao integers by groups (exact), or of GPTQ or AWQ (rounded).
    output : str or Path
        A folder; the base's other files are copied.
    lossy : bool
        Write it also where less than the whole change would be in it.
    overwrite : bool

    Returns
    -------
    ZeroMerge

    Raises
    ------
    QuantisedWeight
        A weight has no zero points; or, without ``lossy``, the change would be rounded.
    BadOption, ShapeMismatch, OutputExists, OutputFailed
    """
    output = Path(output)
    check_free(output, overwrite=overwrite)
    if base.path.is_file():
        raise BadOption("The base is a single file.", file=base.path, fix="Give its folder.")
    changed: dict[int, dict[str, Tensor]] = {}
    files: dict[int, TensorFile] = {}
    result = ZeroMerge(str(output), 0, {}, 0.0, 0.0, 0.0)
    whole = off = outside = 0.0
    zeros = ends = 0
    for site, change in _changes(adapters, base):
        weight = base.at(site)
        moved, group = moved_zeros(weight, change)
        change = change.double()
        whole += float(change.square().sum())
        off += float((moved.written[:, group] - change).square().sum())
        means = _means(change, group, moved.written.shape[1])
        outside += float((means[:, group] - change).square().sum())
        zeros, ends = zeros + moved.written.numel(), ends + moved.ends
        file = next(f for f, name in _stored(weight) if name == moved.tensor)
        files[id(file)] = file
        changed.setdefault(id(file), {})[moved.tensor] = moved.zeros
        form = weight.quantised.form if weight.quantised is not None else ""
        result.forms[form] = result.forms.get(form, 0) + 1
        result.sites += 1
    if not whole:
        raise BadOption("The adapters change nothing.", fix="Give one that was trained.")
    result.error, result.outside_groups = math.sqrt(off / whole), math.sqrt(outside / whole)
    result.cut_off = ends / zeros
    _tell(result, lossy)
    _write(base, output, changed, result, overwrite)
    return result


def _stored(weight: Weight) -> Sequence[tuple[TensorFile, str]]:
    assert weight.quantised is not None
    return weight.quantised.stored


def _delta(update: Update, shape: tuple[int, ...]) -> Tensor:
    if not same_matrix(update.shape, shape):
        raise ShapeMismatch(f"An update {update.shape} does not fit a weight {shape}.")
    return delta(update).reshape(shape)


def _changes(adapters: Sequence[tuple[Adapter, float]], base: Base) -> list[tuple[Site, Tensor]]:
    """(site, Σ strength · ΔW) in the base's order."""
    sites = {site for adapter, _ in adapters for site in adapter.updates}
    found = []
    for site in [*base.weights, *(s for s in sites if s not in base.weights)]:
        if site not in sites:
            continue
        if site not in base.weights:
            raise QuantisedWeight(
                f"{site} is no quantised weight of the base.",
                file=base.path,
                fix="Leave out the modules that the base keeps in 16 bits.",
            )
        shape = base.weights[site].shape
        parts = [
            strength * _delta(adapter.updates[site], shape)
            for adapter, strength in adapters
            if site in adapter.updates
        ]
        found.append((site, torch.stack(parts).sum(dim=0)))
    return found


def _tell(result: ZeroMerge, lossy: bool) -> None:
    """Notes on what is lost.

    Raises
    ------
    QuantisedWeight
        Something is, and it was not asked for.
    """
    if result.error <= _EXACT:
        return
    said = f"The merged zero points are off by {100 * result.error:.3g} % of the change"
    causes = []
    if result.outside_groups > _EXACT:
        causes.append(
            f"{100 * result.outside_groups:.3g} % because it differs within groups of inputs"
        )
    if any(not form.startswith("torchao") for form in result.forms):
        causes.append("the rest by rounding, since the zero points are integers")
    if result.cut_off:
        causes.append(f"{100 * result.cut_off:.2g} % of them are at an end of their range")
    text = f"{said} ({'; '.join(causes)})." if causes else f"{said}."
    if not lossy:
        raise QuantisedWeight(
            text,
            file=result.output,
            fix="Merge into the same base quantised to torchao integers in the adapter's groups, "
            "whose zero points can be floats; or allow the loss.",
        )
    result.notes.append(text)


def _write(
    base: Base,
    output: Path,
    changed: Mapping[int, Mapping[str, Tensor]],
    result: ZeroMerge,
    overwrite: bool,
) -> None:
    weights = (*base.weights.values(), *base.others.values())
    held = {id(file): file for weight in weights for file, _ in weight.stored()}
    layout = lay_out(base.path, held.values(), [held[i] for i in changed], whole=False)
    if layout.left_out:
        result.notes.append(f"Not copied, since they are unmerged: {', '.join(layout.left_out)}.")
    with atomic_folder(output, overwrite=overwrite, replaceable=layout.names) as folder:
        for name, file in layout.made.items():
            new = changed[id(file)]
            tensors = {t: new[t] if t in new else file.read(t) for t in file}
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            result.sha256[name] = serialize(folder / name, tensors, file.metadata)
            sync(folder / name)
        for name, path in layout.copied.items():
            copy(path, folder / name)
