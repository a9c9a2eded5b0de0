"""What a file says instead of holding singular bases: which weight they are of, and their signs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.errors import WrongBase

#: A column's entry at its recorded place may be this much smaller than its largest: rounding.
_SLACK = 1e-3


def weight_hash(weight: Tensor) -> str:
    """SHA-256 of a weight's dtype, shape and bytes: the same as of that tensor in a safetensors
    file, as the subspace cache counts it."""
    digest = hashlib.sha256(f"{weight.dtype}{list(weight.shape)}".encode())
    plain = weight.detach().cpu().contiguous()
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def signs_of(u: Tensor) -> list[int]:
    """For each column of Ũ (m, r) the row of its largest entry, which is positive.

    That fixes the signs of Ũ and Ṽ, also where two entries are equally large.
    """
    found: list[int] = u.abs().argmax(dim=0).tolist()
    return found


def signed(u: Tensor, v: Tensor, signs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Bases (m, r) and (n, r), computed again, with the signs they had when they were recorded.

    ``signs`` are :func:`signs_of` as a config gives them back: unchecked.

    Raises
    ------
    WrongBase
        They are other vectors: some with close singular values came out turned among themselves.
    """
    fit = all(type(row) is int and 0 <= row < len(u) for row in signs)
    if len(signs) != u.shape[1] or not fit:
        raise WrongBase("The recorded signs do not fit the bases.", fix="Restore the config.")
    at = u.gather(0, torch.tensor(signs, device=u.device)[None])[0]
    if not (at.abs() >= u.abs().amax(dim=0) - _SLACK).all():
        raise WrongBase(
            "The singular vectors of the base come out otherwise here than where the adapter was "
            "trained, and its ΔΣ is meaningless between others.",
            fix="Save it with its bases there (store_bases=True), or run it on that kind of "
            "machine.",
        )
    turn = torch.where(at < 0, -1.0, 1.0).to(u.dtype)
    return u * turn, v * turn
