"""Prompt vectors in another base's embedding space (Lester et al. 2021, arXiv:2104.08691).

With E_s and E_t the embeddings of the tokens that both tokenizers have, row by row, the ridge map
A, a = argmin Σ ‖A e_s + a − e_t‖² + λ‖A‖² takes each vector there: p_t = A p_s + a. Of a large
vocabulary a random part is enough (``_MOST``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.errors import CannotRun
from regraft.inserts.maps import energy_kept, ridge
from regraft.running import Language

#: Shared tokens below which there is no map.
_FEWEST = 8
#: Shared tokens that a map is fitted on, at most: so many, or so many per number of a vector.
_MOST, _MOST_EACH = 2**14, 8


def shared_tokens(source: Language, target: Language) -> tuple[Tensor, Tensor]:
    """The ids of the tokens that both tokenizers have, in each, (n,)."""
    here, there = (model.tokenizer.get_vocab() for model in (source, target))
    both = sorted(here.keys() & there.keys(), key=lambda token: here[token])
    return torch.tensor([here[t] for t in both]), torch.tensor([there[t] for t in both])


def shared_embeddings(source: Language, target: Language) -> tuple[Tensor, Tensor]:
    """The embeddings of tokens that both have, in random order, (n, d_s) and (n, d_t), fp32.

    Raises
    ------
    CannotRun
        Hardly any.
    """
    ids = shared_tokens(source, target)
    if len(ids[0]) < _FEWEST:
        raise CannotRun(f"The two tokenizers share {len(ids[0])} tokens, too few for a map.")
    tables = [model.model.get_input_embeddings().weight for model in (source, target)]
    # Neighbours in a vocabulary are alike, and the last rows judge the map.
    order = torch.randperm(len(ids[0]), generator=torch.Generator().manual_seed(0))
    order = order[: max(_MOST, _MOST_EACH * max(table.shape[1] for table in tables))]
    x, y = (t[i[order].to(t.device)].float().cpu() for t, i in zip(tables, ids, strict=True))
    return x, y


@dataclass(frozen=True)
class Found:
    """The vectors in every form, and the evidence of the map."""

    forms: dict[str, Tensor]
    fit: float
    kept: float


def carry(vectors: Tensor, source: Language, target: Language) -> Found:
    """Prompt vectors (l, d_s) in every form for the target, (l, d_t)."""
    x, y = shared_embeddings(source, target)
    there, back = ridge(x, y), ridge(y, x)
    moved = there(vectors)
    forms = {"as it is": vectors} if x.shape[1] == y.shape[1] else {}
    forms["mapped"] = moved.to(vectors.dtype)
    return Found(forms, there.fit, energy_kept(vectors, back(moved)))
