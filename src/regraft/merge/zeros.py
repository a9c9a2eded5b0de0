"""The merge that QA-LoRA is made for: a change put into the zero points of a quantised base.

A base quantised by groups of inputs has W = s (q − z), with a scale s and a zero point z for each
output and group. A change that is the same within each group moves z alone (arXiv 2309.14717):

    z' = z − ΔW / s

What rounding takes away, and what the change has within groups, is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from regraft.adapters import Adapter, Site, Update, delta, same_matrix
from regraft.bases import Base
from regraft.crossing import Progress, silent
from regraft.errors import (
    BadOption,
    NonFiniteTensor,
    NothingCarried,
    QuantisedWeight,
    ShapeMismatch,
)
from regraft.files import atomic_folder
from regraft.files.atomic import check_free
from regraft.merge.added import Measured
from regraft.merge.folder import PROVENANCE, check_space, finish, lay_out, left_out, lost_parts
from regraft.merge.stream import rewrite, size_of
from regraft.merge.zero_points import means_of, moved_zeros

#: ‖written − ΔW‖ / ‖ΔW‖ below which a merge counts as exact.
_EXACT = 1e-5


@dataclass
class ZeroMerge:
    """What a merge into zero points reports.

    Attributes
    ----------
    forms : dict
        Form of the quantised weights → how many.
    error : float
        ‖written − ΔW‖ / ‖ΔW‖ over all sites.
    outside_groups : float
        The part of ``error`` that is there before any rounding, because ΔW differs within groups.
    cut_off : float
        Share of the zero points that are cut off at an end of their range.
    measured : list of Measured
        The sizes of W, of ΔW and of what is lost, by site.
    files : list of str
        Weight files that were made anew, by their path in the output.
    bytes_out : int
        Of the whole output.
    """

    output: str
    forms: dict[str, int] = field(default_factory=dict)
    error: float = 0.0
    outside_groups: float = 0.0
    cut_off: float = 0.0
    measured: list[Measured] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    bytes_out: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def sites(self) -> int:
        return len(self.measured)


def merge_into_zeros(
    adapters: Sequence[tuple[Adapter, float]],
    base: Base,
    output: str | Path,
    *,
    lossy: bool = False,
    overwrite: bool = False,
    beside: Mapping[str, bytes] | None = None,
    progress: Progress = silent,
) -> ZeroMerge:
    """Write a quantised base with adapters in its zero points; codes and scales stay.

    In memory are the adapters, the new zero points, and one weight with its change in fp64.

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
    beside : mapping of str to bytes, optional
        More files of the folder, by their path in it.

    Returns
    -------
    ZeroMerge

    Raises
    ------
    QuantisedWeight
        A weight has no zero points; or, without ``lossy``, the change would be rounded.
    NothingCarried
        Not one zero point would move.
    BadOption, ShapeMismatch, OutputExists, OutputFailed
    """
    output = Path(output)
    check_free(output, overwrite=overwrite)
    if base.path.is_file():
        raise BadOption("The base is a single file.", file=base.path, fix="Give its folder.")
    changed: dict[int, dict[str, Tensor]] = {}
    result = ZeroMerge(str(output))
    outside = 0.0
    zeros = ends = 0
    count = len({site for adapter, _ in adapters for site in adapter.updates})
    for site, change in _changes(adapters, base):
        weight = base.at(site)
        moved, group = moved_zeros(weight, change)
        change = change.double()
        whole = float(change.square().sum())
        lost = float((moved.written[:, group] - change).square().sum())
        if not math.isfinite(whole + lost):
            raise NonFiniteTensor(
                f"The change of {site} is beyond what fp32 can hold.",
                fix="The adapter is damaged or its training diverged; use an earlier checkpoint.",
            )
        means = means_of(change, group, moved.written.shape[1])
        outside += float((means[:, group] - change).square().sum())
        zeros, ends = zeros + moved.written.numel(), ends + moved.ends
        file = next(f for f, name in weight.stored() if name == moved.tensor)
        changed.setdefault(id(file), {})[moved.tensor] = moved.zeros
        form = weight.quantised.form if weight.quantised is not None else ""
        result.forms[form] = result.forms.get(form, 0) + 1
        before = float(base.read(site).double().square().sum())
        result.measured.append(Measured(site, before, whole, lost, moved.differs))
        progress("merging", result.sites, count)
    whole = math.fsum(m.change for m in result.measured)
    if not whole:
        raise NothingCarried("The change is zero at every site, so nothing was written.")
    result.error = math.sqrt(math.fsum(m.lost for m in result.measured) / whole)
    result.outside_groups = math.sqrt(outside / whole)
    result.cut_off = ends / zeros
    _tell(result, lossy)
    if not any(m.moved for m in result.measured):
        raise NothingCarried(
            "Every change is too small for the zero points: not one of them would move. Nothing "
            "was written.",
            fix="Merge into the 16-bit checkpoint it was made from.",
        )
    _write(base, output, changed, result, overwrite, beside or {})
    return result


def _delta(update: Update, shape: tuple[int, ...]) -> Tensor:
    if not same_matrix(update.shape, shape):
        raise ShapeMismatch(f"An update {update.shape} does not fit a weight {shape}.")
    return delta(update).reshape(shape)


def _changes(
    adapters: Sequence[tuple[Adapter, float]], base: Base
) -> Iterator[tuple[Site, Tensor]]:
    """(site, Σ strength · ΔW) in the base's order, one at a time."""
    sites = {site for adapter, _ in adapters for site in adapter.updates}
    for site in sites:
        if site not in base.weights:
            raise QuantisedWeight(
                f"{site} is no quantised weight of the base.",
                file=base.path,
                fix="Leave out the modules that the base keeps in 16 bits.",
            )
    for site, weight in base.weights.items():
        own = [(s, a.updates[site]) for a, s in adapters if site in a.updates]
        if own:
            parts = [strength * _delta(update, weight.shape) for strength, update in own]
            yield site, torch.stack(parts).sum(dim=0)


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
    beside: Mapping[str, bytes],
) -> None:
    weights = (*base.weights.values(), *base.others.values())
    held = {id(file): file for weight in weights for file, _ in weight.stored()}
    layout = lay_out(base.path, held.values(), [held[i] for i in changed], whole=False)
    sizes = [size_of(file, None) for file in layout.made.values()]
    # Zero points in fp32 may need more room than those that they replace.
    new = sum(t.nbytes for tensors in changed.values() for t in tensors.values())
    copied = sum(path.stat().st_size for path in layout.copied.values())
    check_space(output.parent, sum(sizes) + new + copied + (1 << 20))
    result.notes += [*left_out(layout), *lost_parts(base.path)]
    layout.edited |= beside
    names = {*layout.names, PROVENANCE}
    with atomic_folder(output, overwrite=overwrite, replaceable=names) as folder:
        for name, file in layout.made.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            rewrite(file, folder / name, {}, replaced=changed[id(file)])
        result.bytes_out = finish(layout, folder)
    result.files = list(layout.made)
