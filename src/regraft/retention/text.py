"""Language metrics: held-out loss in nats per byte, exact answers, and negative flips.

A loss per token depends on how a tokenizer cuts the text; per byte of UTF-8 it does not (bits per
byte in Gao et al. 2020, arXiv:2101.00027, section 3.1, times ln 2). So bases with different
tokenizers can be compared, on texts that fit into the contexts of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from regraft.errors import BadOption
from regraft.running import Text

#: A causal language model of transformers, in evaluation mode, and its tokenizer.
CausalModel = Any
Tokenizer = Any


class _Row(NamedTuple):
    """One text as the model sees it."""

    ids: list[int]
    first: int  # place of the first token that is scored
    size: int  # bytes of UTF-8 of the scored tokens


@torch.no_grad()
def held_out_loss(
    model: CausalModel, tokenizer: Tokenizer, texts: Sequence[str | Text], *, batch: int = 16
) -> float:
    """Cross-entropy of the next token, teacher-forced, in nats per byte of UTF-8.

    The sum over all texts of -log p of every scored token, divided by the bytes those tokens stand
    for: long texts weigh more.

    - The start token is put first if the tokenizer has one. If it has none, a text's first token
      is only read, and its bytes are not counted.
    - Of a :class:`Text` with a prompt, only the completion is scored. Prompt and completion are
      tokenized apart, as they are when a model answers.
    - The end of the text is not scored.
    - What does not fit into the context (``max_position_embeddings``) is cut off at its end, and
      the bytes cut off are not counted. A text that is cut inside a character counts its bytes to
      within three.

    Parameters
    ----------
    model : causal language model of transformers
    tokenizer : its tokenizer
    texts : sequence of str or Text
        A str is a Text without a prompt.
    batch : int
        Texts at a time; changes the result by rounding only.

    Returns
    -------
    float
        Nats per byte; lower is better.

    Raises
    ------
    BadOption
        No text has anything to score.
    """
    rows = _rows(model, tokenizer, texts)
    total = 0.0
    for part, logits in _logits(model, tokenizer, rows, batch):
        wanted, scored = _targets(part, logits)
        nats = functional.cross_entropy(logits.transpose(1, 2).float(), wanted, reduction="none")
        total += float(nats[scored].double().sum())
    return total / sum(row.size for row in rows)


@torch.no_grad()
def next_token_hits(
    model: CausalModel, tokenizer: Tokenizer, texts: Sequence[str | Text], *, batch: int = 16
) -> list[bool]:
    """Whether the likeliest next token is the true one, wherever :func:`held_out_loss` scores.

    Texts in order, places in order: two models with one tokenizer answer the same items, so the
    lists can go to :func:`negative_flips`.

    Raises
    ------
    BadOption
        No text has anything to score.
    """
    rows = _rows(model, tokenizer, texts)
    hits: list[bool] = []
    for part, logits in _logits(model, tokenizer, rows, batch):
        wanted, scored = _targets(part, logits)
        hits += (logits.argmax(dim=-1) == wanted)[scored].tolist()
    return hits


@torch.no_grad()
def exact_score(
    model: CausalModel, tokenizer: Tokenizer, items: Sequence[Text], *, batch: int = 64
) -> list[bool]:
    """Whether the greedy answer to each prompt is its completion, to the letter.

    An answer ends at its first newline or at the end token, and is compared with the first line of
    the completion, spaces included. It gets as many tokens as the completion has, and one more so
    that an answer that goes on is wrong.

    Parameters
    ----------
    model, tokenizer
        As in :func:`held_out_loss`.
    items : sequence of Text
        Each with a prompt.
    batch : int
        Prompts at a time.

    Returns
    -------
    list of bool
        One per item, in order; the mean is the exact-match score.

    Raises
    ------
    BadOption
        There are no items, or one has no prompt.
    """
    if not items or not all(item.prompt for item in items):
        raise BadOption(
            "An exact score needs items, each with a prompt.",
            fix='Give lines such as {"prompt": "2 + 2 = ", "completion": "4"}.',
        )
    prompts = [_start(tokenizer) + _encode(tokenizer, item.prompt) for item in items]
    goals = [item.completion.split("\n")[0] for item in items]
    budgets = [len(_encode(tokenizer, goal)) + 1 for goal in goals]
    right = [False] * len(items)
    # prompts of one length at a time: nothing is padded, so no model can mind the padding
    for length in sorted({len(prompt) for prompt in prompts}):
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        for low in range(0, len(alike), batch):
            chosen = alike[low : low + batch]
            ids = torch.tensor([prompts[i] for i in chosen], device=model.device)
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max(budgets[i] for i in chosen),
                do_sample=False,
                num_beams=1,
                pad_token_id=_pad(tokenizer),
            )
            for i, row in zip(chosen, written[:, length:].tolist(), strict=True):
                right[i] = _answer(tokenizer, row) == goals[i]
    return right


def negative_flips(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Share of all items that were right before and are wrong after; in [0, 1].

    The negative flip rate of positive-congruent training (Yan et al. 2021, arXiv:2011.09161,
    equation 1): an upgrade with a better score may still break what worked, and this counts it.
    ``before`` and ``after`` judge the same items in the same order: next tokens
    (:func:`next_token_hits`) or answers (:func:`exact_score`).

    Raises
    ------
    BadOption
        No items, or not as many after as before.
    """
    if not before or len(before) != len(after):
        raise BadOption(
            f"Negative flips compare the same items: {len(before)} before, {len(after)} after.",
            fix="Judge both models on the same items, with the same tokenizer.",
        )
    return sum(b and not a for b, a in zip(before, after, strict=True)) / len(before)


def _rows(model: CausalModel, tokenizer: Tokenizer, texts: Sequence[str | Text]) -> list[_Row]:
    """Every text with something to score, cut to the context."""
    context = _context(model)
    start = _start(tokenizer)
    rows = []
    for given in texts:
        text = Text(given) if isinstance(given, str) else given
        read = start + (_encode(tokenizer, text.prompt, context) if text.prompt else [])
        # one token more than fits, so that a longer text can be told from one that just fits
        said = _encode(tokenizer, text.completion, context + 1)
        first = max(1, len(read))
        ids = (read + said)[:context]
        if len(ids) <= first:
            continue
        size = len(text.completion.encode())
        if len(ids) < len(read) + len(said):
            size = _bytes(tokenizer, ids[len(read) :])
        size -= _bytes(tokenizer, ids[len(read) : first])
        rows.append(_Row(ids, first, size))
    if sum(row.size for row in rows) <= 0:
        raise BadOption(
            f"None of the {len(texts)} text(s) has anything to score within the model's context.",
            fix="Give texts of two tokens or more, and prompts shorter than the context.",
        )
    return rows


def _logits(
    model: CausalModel, tokenizer: Tokenizer, rows: Sequence[_Row], batch: int
) -> Iterator[tuple[Sequence[_Row], Float[Tensor, "rows places vocabulary"]]]:
    """Logits of each next token, some rows at a time; rows are padded at their end."""
    for low in range(0, len(rows), batch):
        part = rows[low : low + batch]
        width = max(len(row.ids) for row in part)
        ids = torch.full((len(part), width), _pad(tokenizer), device=model.device)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(part):
            ids[place, : len(row.ids)] = torch.tensor(row.ids)
            mask[place, : len(row.ids)] = 1
        yield part, model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]


def _targets(
    part: Sequence[_Row], logits: Float[Tensor, "rows places vocabulary"]
) -> tuple[Tensor, Bool[Tensor, "rows places"]]:
    """The true next tokens, and which of them are scored."""
    wanted = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    scored = torch.zeros_like(wanted, dtype=torch.bool)
    for place, row in enumerate(part):
        wanted[place, : len(row.ids) - 1] = torch.tensor(row.ids[1:])
        scored[place, row.first - 1 : len(row.ids) - 1] = True
    return wanted, scored


def _encode(tokenizer: Tokenizer, text: str, limit: int | None = None) -> list[int]:
    options = {} if limit is None else {"truncation": True, "max_length": limit}
    return list(tokenizer(text, add_special_tokens=False, **options)["input_ids"])


def _start(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def _pad(tokenizer: Tokenizer) -> int:
    # padded places are masked, so any token will do
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


def _bytes(tokenizer: Tokenizer, ids: list[int]) -> int:
    return len(_decode(tokenizer, ids).encode()) if ids else 0


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _answer(tokenizer: Tokenizer, ids: list[int]) -> str:
    end = tokenizer.eos_token_id
    return _decode(tokenizer, ids[: ids.index(end)] if end in ids else ids).split("\n")[0]


def _context(model: CausalModel) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31)
