"""What maps are fitted on: inputs that both bases see, and which positions of them correspond.

Without data from the user these are the source's own: texts it writes, half of them with the
insert on it, half without; pictures that are noise at several times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regraft.adapters import Site
from regraft.errors import BadData, CannotRun
from regraft.inserts.insert import Insert
from regraft.running import Diffusion, Language, Pictures, Texts
from regraft.running.model import Condition

#: Own samples: texts, and tokens of each.
TEXTS, TOKENS = 64, 64
#: Of a user's items at most so many texts, tokens of each, and pictures.
MOST_TEXTS, LONGEST, MOST_PICTURES = 256, 256, 32
#: Positions at most that are kept of all texts.
ROWS = 8192
#: Own samples: pictures, and the times at which each is seen.
PICTURES, TIMES = 12, (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Tokens:
    """Texts as one base reads them.

    Attributes
    ----------
    ids : Tensor of shape (n, t)
        Padded on the right.
    mask : Tensor of shape (n, t)
    rows : Tensor of shape (r, 2)
        (text, place) of the positions that correspond, the same texts in the same order for both
        bases.
    """

    ids: Int[Tensor, "n t"]
    mask: Bool[Tensor, "n t"]
    rows: Int[Tensor, "r 2"]


@dataclass(frozen=True)
class Noisy:
    """Pictures with noise, as a denoiser sees them.

    Attributes
    ----------
    x : Tensor of shape (n, c, h, w), fp32
    t : list of float, one per picture
    condition : mapping of str to Tensor
        Of this base's own text encoder.
    """

    x: Float[Tensor, "n c h w"]
    t: list[float]
    condition: Condition


@torch.no_grad()
def own_texts(
    model: Language, parts: Mapping[Site, Insert], count: int, seed: int, room: int = 0
) -> list[str]:
    """Texts that a base writes, sampled at temperature 1.

    Parameters
    ----------
    model : Language
    parts : mapping of Site to Insert
        What is on it; empty for the bare base.
    count : int
    seed : int
        The same seed, the same texts, on one thread.
    room : int
        Places of the context to leave free.
    """
    from regraft.inserts.spaces import written

    draw = torch.Generator().manual_seed(seed)
    start = model.tokenizer.bos_token_id
    if start is None:
        ids = torch.randint(len(model.tokenizer), (count, 1), generator=draw)
    else:
        ids = torch.full((count, 1), start)
    long = min(TOKENS, (context_of(model) or TOKENS) - room)
    ids = written(model, ids, parts, max(1, long - 1), draw)
    found: list[str] = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found


def context_of(model: Language) -> int | None:
    """The positions a model was made for, where it says."""
    config = model.model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def aligned(
    source: Language, target: Language, texts: Sequence[str], room: int = 0
) -> tuple[Tokens, Tokens]:
    """Texts for both bases, and the positions where both have read just as much.

    Of each context ``room`` places are left free.

    Raises
    ------
    BadData
        The bases read nothing alike.
    CannotRun
        A tokenizer does not tell where its tokens end, or the insert fills the context.
    """
    sides = [_encoded(model, texts, room) for model in (source, target)]
    rows: tuple[list[tuple[int, int]], ...] = ([], [])
    for n, (here, there) in enumerate(zip(*sides, strict=True)):
        places = {end: place for place, (_, end) in enumerate(there) if end >= 0}
        for place, (_, end) in enumerate(here):
            if end in places:
                rows[0].append((n, place))
                rows[1].append((n, places[end]))
    if not rows[0]:
        raise BadData("The two bases' tokens of the calibration texts have no end in common.")
    step = -(-len(rows[0]) // ROWS)
    made = [_padded(side, kept[::step]) for side, kept in zip(sides, rows, strict=True)]
    return made[0], made[1]


def _encoded(model: Language, texts: Sequence[str], room: int) -> list[list[tuple[int, int]]]:
    """(token, end) of every token of each text; a start token ends at 0."""
    found = []
    start = model.tokenizer.bos_token_id
    most = min(LONGEST, (context_of(model) or LONGEST) - room)
    if most < 1:
        raise CannotRun(f"The insert's {room} tokens fill the context of {model.ref}.")
    if not model.tokenizer.is_fast:
        raise CannotRun(f"The tokenizer of {model.ref} does not tell where its tokens end.")
    for text in texts:
        told = model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = [end for _, end in told["offset_mapping"]]
        # Of a character's several bytes only the last ends it.
        later = [*ends[1:], None]
        ends = [
            -1 - n if end == after else end
            for n, (end, after) in enumerate(zip(ends, later, strict=True))
        ]
        row = list(zip(told["input_ids"], ends, strict=True))
        row = ([] if start is None else [(start, 0)]) + row
        found.append(row[:most])
    return found


def _padded(side: list[list[tuple[int, int]]], rows: list[tuple[int, int]]) -> Tokens:
    width = max(len(row) for row in side)
    ids = torch.zeros(len(side), width, dtype=torch.long)
    mask = torch.zeros(len(side), width, dtype=torch.bool)
    for n, row in enumerate(side):
        ids[n, : len(row)] = torch.tensor([token for token, _ in row])
        mask[n, : len(row)] = True
    return Tokens(ids, mask, torch.tensor(rows))


def texts_of(given: Texts) -> list[str]:
    """A user's items as plain texts, prompts in front."""
    return [item.prompt + item.completion for item in given.items[:MOST_TEXTS]]


@torch.no_grad()
def noisy(
    source: Diffusion, target: Diffusion, given: Pictures | None, seed: int
) -> tuple[Noisy, Noisy]:
    """Pictures with noise for both bases: the user's, or those the source draws.

    The captions of own pictures are empty or made of words of the source's tokenizer.
    """
    if given is None:
        captions = _captions(source, seed)
        given = Pictures(source.sample(captions, list(range(seed, seed + len(captions)))), captions)
    given = Pictures(given.images[:MOST_PICTURES], list(given.captions)[:MOST_PICTURES])
    made = []
    for model in (source, target):
        clean = model.clean(given)
        draw = torch.Generator().manual_seed(seed)
        xs, ts, told = [], [], []
        for t in TIMES:
            noise = torch.randn(clean.shape, generator=draw)
            xs.append(model.noisy(clean.to(model.device), noise.to(model.device), t)[0].cpu())
            ts += [t] * len(clean)
            told.append(model.condition(list(given.captions)))
        condition = {k: torch.cat([part[k] for part in told]) for k in told[0]}
        made.append(Noisy(torch.cat(xs), ts, condition))
    return made[0], made[1]


def _captions(model: Diffusion, seed: int) -> list[str]:
    tokenizer = getattr(getattr(model, "pipeline", None), "tokenizer", None)
    words = sorted(w for w in (tokenizer.get_vocab() if tokenizer else {}) if w.isalpha())
    if not words:
        return [""] * PICTURES
    draw = torch.Generator().manual_seed(seed)
    found = []
    for n in range(PICTURES):
        chosen = torch.randint(len(words), (n % 3,), generator=draw).tolist()
        found.append(" ".join(words[i] for i in chosen))
    return found
