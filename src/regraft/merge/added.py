"""W + Σ strength · ΔW in one stored tensor: added in fp32, rounded once, and what rounding took.

Blocks of rows small enough for the processor's cache: every number is fetched once for all that is
done with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.adapters import Dense, Kronecker, Site, Update, delta, matrix_shape
from regraft.adapters.update import Rows
from regraft.errors import NonFiniteTensor, OutputFailed
from regraft.files import TensorFile
from regraft.files.finite import is_finite

#: Numbers in one block.
_BLOCK = 1 << 16
#: (first row, last row, out, add): those rows of strength · ΔW in fp32, put into or added to out.
_Term = Callable[[int, int, Tensor, bool], None]


@dataclass(frozen=True)
class Part:
    """What becomes of one site: ``rows`` of the stored tensor (empty: all) get all ``terms``.

    A term is (strength, update).
    """

    site: Site
    rows: Rows
    terms: tuple[tuple[float, Update], ...]


@dataclass(frozen=True)
class Measured:
    """Squared Frobenius norms at one site: of W, of strength · ΔW, and of stored − exact.

    ``moved`` says whether any stored number differs from W.
    """

    site: Site
    weight: float
    change: float
    lost: float
    moved: bool


def added(
    file: TensorFile, name: str, parts: tuple[Part, ...], dtype: torch.dtype | None = None
) -> tuple[Tensor, list[Measured]]:
    """One stored tensor with the changes of its sites, in ``dtype`` (default: as it is stored).

    Raises
    ------
    NonFiniteTensor
        The base's weight or a change is not finite.
    OutputFailed
        The result is beyond what the dtype can hold.
    """
    stored = file.read(name)
    out = stored if dtype in (None, stored.dtype) else cast(stored, dtype, file, name)
    old, new = (t.reshape(matrix_shape(tuple(t.shape))) for t in (stored, out))
    found = []
    for part in parts:
        measured = _add(old, new, part)
        if not math.isfinite(measured.weight + measured.change + measured.lost):
            raise _not_finite(file, name, part, out.dtype)
        found.append(measured)
    return out, found


def cast(tensor: Tensor, dtype: torch.dtype | None, file: TensorFile, name: str) -> Tensor:
    """A tensor in another dtype; what is not of floating point stays as it is.

    Raises
    ------
    OutputFailed
    """
    if dtype in (None, tensor.dtype) or not tensor.is_floating_point():
        return tensor
    made = tensor.to(dtype)
    if not is_finite(made) and is_finite(tensor):
        raise _overflow(file, name, made.dtype)
    return made


def _add(old: Tensor, new: Tensor, part: Part) -> Measured:
    """Write into ``new``, which may be ``old`` itself."""
    terms = [_term(strength, update) for strength, update in part.terms]
    columns = old.shape[1]
    step = max(1, _BLOCK // max(1, columns))
    work = torch.float64 if old.dtype == torch.float64 else torch.float32
    # Made once: fresh memory for every block costs more than the arithmetic.
    space = [torch.empty(step, columns, dtype=kind) for kind in (work, torch.float32, work)]
    weight = change = lost = 0.0
    moved = False
    done = 0  # rows of the site before this range
    for begin, end in part.rows or ((0, len(old)),):
        for first in range(begin, end, step):
            last = min(first + step, end)
            w, d, exact = (t[: last - first] for t in space)
            w.copy_(old[first:last])
            for i, term in enumerate(terms):
                term(done + first - begin, done + last - begin, d, i > 0)
            torch.add(w, d, out=exact)
            weight += _square(w)
            change += _square(d)
            moved = moved or not torch.equal(exact.to(new.dtype), w.to(new.dtype))
            new[first:last].copy_(exact)
            w.copy_(new[first:last])
            lost += _square(w.sub_(exact))
        done += end - begin
    return Measured(part.site, weight, change, lost, moved)


def _term(strength: float, update: Update) -> _Term:
    """strength · ΔW by rows. Of a product each row is made when it is asked for."""
    if isinstance(update, Kronecker | Dense):
        if isinstance(update, Kronecker):  # as a product, not through its singular values
            whole = torch.kron(update.left.float(), update.right.float()) * update.scale
        else:
            whole = update.matrix()

        def take(first: int, last: int, out: Tensor, add: bool) -> None:
            if add:
                out.add_(whole[first:last], alpha=strength)
            else:
                torch.mul(whole[first:last], strength, out=out)

        return take
    left, right = update.factors()
    left = left * strength

    def multiply(first: int, last: int, out: Tensor, add: bool) -> None:
        torch.addmm(out, left[first:last], right, beta=float(add), out=out)

    return multiply


def _square(tensor: Tensor) -> float:
    flat = tensor.flatten()
    found = float(torch.dot(flat, flat))
    # Squares of large finite numbers can be beyond fp32.
    return found if math.isfinite(found) else float(flat.double().square().sum())


def _not_finite(
    file: TensorFile, name: str, part: Part, dtype: torch.dtype
) -> NonFiniteTensor | OutputFailed:
    if not is_finite(file.read(name)):
        return NonFiniteTensor(
            "A weight of the base holds NaN or infinity.",
            file=file.path,
            tensor=name,
            fix="The checkpoint is damaged; download it again.",
        )
    if not all(is_finite(delta(update)) for _, update in part.terms):
        return NonFiniteTensor(
            f"The change of {part.site} is beyond what fp32 can hold.",
            fix="The adapter is damaged or its training diverged; use an earlier checkpoint.",
        )
    return _overflow(file, name, dtype)


def _overflow(file: TensorFile, name: str, dtype: torch.dtype) -> OutputFailed:
    return OutputFailed(
        f"A merged weight is beyond what {str(dtype).removeprefix('torch.')} can hold.",
        file=file.path,
        tensor=name,
        fix="Merge with a smaller --strength, or write it with --dtype bf16 or fp32.",
    )
