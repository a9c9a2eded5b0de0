"""From updates to the numbers files hold: two factors, or ΔW itself, one site at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import floor, log2

import torch
from torch import Tensor

from regraft.adapters import LowRank, RankRule, Rows, Site, Spectral, Update, cut, delta
from regraft.bases import Base

#: Last names of the modules that are embedding tables in transformers' models.
_TABLES = (
    "embed_tokens",
    "embed_positions",
    "token_embedding",
    "position_embedding",
    "word_embeddings",
    "position_embeddings",
    "tok_embeddings",
    "shared",
    "wte",
    "wpe",
)
#: The alpha of a file whose updates have none of their own, as trainers often set it.
_USUAL_RANK = 16
#: What the largest number of A is divided down to at most: 32 times the smallest normal fp16.
_LARGE_ENOUGH = 2.0**-9


def held_in_factors(update: Update) -> bool:
    """Whether its factors are there and need no decomposition."""
    return isinstance(update, LowRank | Spectral)


def plain(update: Update) -> LowRank:
    """The update as a LoRA: every direction above rounding noise."""
    exact = update if held_in_factors(update) else cut(update, RankRule("exact"))
    return exact.low_rank()


def is_table(site: Site, update: Update) -> bool:
    """Whether the site is an embedding table, which PEFT treats as a layer of its own kind."""
    named = site.module.rpartition(".")[2] in _TABLES and site.parameter == "weight"
    return update.layout == "embedding" or (named and len(update.shape) == 2)


def is_matrix(site: Site, base: Base) -> bool:
    """Whether the site is the weight, of two or more dimensions, of a module."""
    return site in base.weights


def is_layer_bias(site: Site, base: Base) -> bool:
    """Whether the site is the bias of a module whose weight is a matrix or kernel."""
    return site.parameter == "bias" and site.with_parameter("weight") in base.weights


def is_norm(site: Site, base: Base) -> bool:
    """Whether the site is the weight or bias of a normalisation: a module of one dimension."""
    return site.parameter in ("weight", "bias") and site.with_parameter("weight") in base.others


def alpha_of(update: LowRank) -> float:
    """alpha = scale · rank, without the last bits that the division by the rank left behind."""
    return float(f"{update.scale * update.rank:.12g}")


def file_alpha(updates: Iterable[LowRank], bounds: Iterable[int]) -> float:
    """The one alpha of a file: the most frequent; where no update has its own, a usual rank.

    diffusers loses the alpha of attention layers unless the whole file has the same one. ``bounds``
    are the largest ranks that the updates can have.
    """
    alphas = Counter(alpha_of(u) for u in updates if u.scale)
    if alphas:
        return alphas.most_common(1)[0][0]
    # Near the ranks files have, so that fp16 holds what is folded into B.
    return float(min(_USUAL_RANK, max(bounds, default=1)))


def with_alpha(update: LowRank, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A, B) in ``dtype`` such that alpha / rank · B A is ΔW; B takes up the difference."""
    a, b = pair(update)
    return scaled(a, b, alpha_of(update) / alpha if alpha else 1.0, dtype)


def folded(update: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(A, B) in ``dtype`` with the scale in B."""
    return scaled(*pair(update), update.scale, dtype)


def scaled(a: Tensor, b: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and factor · B in ``dtype``; A as it is, unless B might become too small for fp16.

    Below 6e-5 fp16 has fewer digits: 1/128 folded into a B of about 1e-3 costs 0.2 % of ΔW. So A
    takes over a power of two, which changes none of its digits. It depends on A and the factor
    only: parts of a fused layer that share their A go on sharing it.
    """
    if factor == 1:
        return a.to(dtype), b.to(dtype)
    largest = float(a.float().abs().max()) if a.numel() else 0.0
    if dtype == torch.float16 and largest > _LARGE_ENOUGH and 0 < abs(factor) < 1:
        shift = 2.0 ** floor(log2(min(1 / abs(factor), largest / _LARGE_ENOUGH)))
        a, factor = a.float() / shift, factor * shift
    return a.to(dtype), (b.float() * factor).to(dtype)


def pair(update: LowRank, *, table: bool = False) -> tuple[Tensor, Tensor]:
    """(A, B) in the shape files use for this layout, before any cast.

    ``table`` says that the weight is an embedding table, whatever the layout says.
    """
    if len(update.shape) > 2:
        # Whatever the source was: a linear update may have come to a 1×1 convolution.
        ones = [1] * (len(update.shape) - 2)
        a = update.down.reshape(update.rank, *update.shape[1:])
        return a, update.up.reshape(*update.up.shape, *ones)
    if table or update.layout in ("transposed", "embedding"):
        return update.up.mT.contiguous(), update.down.mT.contiguous()
    return update.down, update.up


def stored(update: LowRank) -> LowRank:
    """The same, its factors multiplying to the weight as the base stores it."""
    return LowRank(update.up, update.down, update.scale, update.shape)


def row_numbers(rows: Rows) -> Tensor:
    """The row numbers that ranges of rows stand for, in their order."""
    return torch.cat([torch.arange(first, last) for first, last in rows])


def joined(parts: Iterable[tuple[LowRank, Rows]], shape: tuple[int, ...]) -> LowRank:
    """One LoRA of a fused weight from those of its parts. Exact.

    A direction of A that several parts share is kept once, and B is stacked; directions that they
    do not share are stacked in A, and B is zero between them. So a fused LoRA that was split comes
    back as it was. Rows that no part covers are zero.

    Parameters
    ----------
    parts : (LowRank, Rows) pairs
        Each part, and its rows of the fused weight.
    shape : tuple of int
        Of the fused weight.
    """
    parts = list(parts)
    kinds = {u.down.dtype for u, _ in parts} | {u.up.dtype for u, _ in parts}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    scale = Counter(u.scale for u, _ in parts).most_common(1)[0][0] or 1.0
    rows_of_a: list[Tensor] = []
    found: dict[bytes, list[int]] = {}
    places: list[list[int]] = []
    for update, _ in parts:
        own: list[int] = []
        for row in update.down.to(dtype):
            key = row.contiguous().view(torch.uint8).numpy().tobytes()
            known = [i for i in found.setdefault(key, []) if i not in own]
            if not known:
                known = [len(rows_of_a)]
                found[key] += known
                rows_of_a.append(row)
            own.append(known[0])
        places.append(own)
    up = torch.zeros(shape[0], len(rows_of_a), dtype=dtype)
    for (update, rows), own in zip(parts, places, strict=True):
        same = update.scale == scale
        b = update.up.to(dtype) if same else (update.up.float() * (update.scale / scale)).to(dtype)
        up[row_numbers(rows)[:, None], torch.tensor(own)] = b
    return LowRank(up, torch.stack(rows_of_a), scale, shape)


def whole(parts: Iterable[tuple[Update, Rows]], shape: tuple[int, ...]) -> Tensor:
    """ΔW of a fused parameter from those of its parts, fp32, in ``shape``; the rest is zero."""
    change = torch.zeros(shape)
    for update, rows in parts:
        change[row_numbers(rows)] = delta(update)
    return change
