"""What is learned from: items as tensors, and the loss of a batch of them.

Every draw comes from the generator it is given, so that a step depends on its number only.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from regraft.errors import BadData
from regraft.running import Language, Texts


class Part(NamedTuple):
    """Items that are run at a time.

    Attributes
    ----------
    call : dict
        What the component is called with.
    wanted : Any
        What its output is judged by.
    share : float
        Of the step's loss; those of a step's parts add up to 1.
    """

    call: dict[str, Any]
    wanted: Any
    share: float


class Objective(ABC):
    """The items of one run.

    Attributes
    ----------
    component : str
        The part of the base that is trained.
    count : int
        Items.
    digest : str
        SHA-256 of the items.
    notes : list of str
    terms : tuple of str
        What else than the loss is logged.
    """

    component: str
    count: int
    digest: str
    notes: list[str]
    terms: tuple[str, ...] = ()

    @abstractmethod
    def parts(self, rows: Sequence[int], draw: torch.Generator, size: int) -> Iterator[Part]:
        """A step's items, ``size`` at a time. The draws do not depend on ``size``."""

    @abstractmethod
    def loss(self, module: Any, part: Part) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of a part, a scalar; and its :attr:`terms`."""

    @abstractmethod
    def held_out(self, module: Any, rows: Sequence[int]) -> float:
        """Loss over items, without gradients and with nothing left to chance."""

    @abstractmethod
    def prompts(self, rows: Sequence[int]) -> list[str]:
        """What these items are asked for with; each prompt once, in order."""

    def begin(self, rows: Sequence[int]) -> None:
        """Be told which items are trained on, before the first :meth:`parts`."""
        return

    def watching(self, module: Any) -> AbstractContextManager[None]:
        """What must be in place while the component trains."""
        return nullcontext()


class NextToken(Objective):
    """Cross-entropy of the next token; of a completion only, where there is a prompt.

    A text without a prompt that is too long is cut into several items; a prompt with its completion
    is cut off at its end. The end of a text is not learned.
    """

    component = ""
    #: Of a text without a prompt, so many tokens at most are given as one.
    _START = 16

    def __init__(self, model: Language, texts: Texts, length: int) -> None:
        self.model = model
        self.notes = []
        context = getattr(model.model.config, "max_position_embeddings", None)
        self.length = min(length, context or length)
        self.items = self._items(texts)
        self.count = len(self.items)
        self.digest = hashlib.sha256(repr(self.items).encode()).hexdigest()

    def _items(self, texts: Texts) -> list[tuple[list[int], int]]:
        """(tokens, place of the first that is learned) of each item."""
        tokenizer = self.model.tokenizer
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        found: list[tuple[list[int], int]] = []
        cut = 0
        for text in texts.items:
            if text.prompt:
                before = start + encode(text.prompt)
                ids = before + encode(text.completion)
                cut += len(ids) > self.length
                found.append((ids[: self.length], max(1, len(before))))
            else:
                ids = encode(text.completion)
                room = self.length - len(start)
                found += [(start + ids[i : i + room], 1) for i in range(0, max(1, len(ids)), room)]
        kept = [item for item in found if len(item[0]) > item[1]]
        if cut:
            self.notes.append(f"{cut} items were cut off at {self.length} tokens")
        if len(kept) < len(found):
            self.notes.append(f"{len(found) - len(kept)} items have nothing to learn in them")
        if not kept:
            raise BadData("No text has a token to learn.", fix="Give longer texts, or a length.")
        return kept

    def parts(self, rows: Sequence[int], draw: torch.Generator, size: int) -> Iterator[Part]:
        total = sum(len(ids) - first for ids, first in (self.items[row] for row in rows))
        for low in range(0, len(rows), size):
            call, labels = self._called(rows[low : low + size])
            yield Part(call, labels, int((labels != -100).sum()) / total)

    def _called(self, rows: Sequence[int]) -> tuple[dict[str, Any], Tensor]:
        items = [self.items[i] for i in rows]
        width = max(len(ids) for ids, _ in items)
        tokens = torch.zeros(len(items), width, dtype=torch.long)
        mask, labels = tokens.clone(), torch.full_like(tokens, -100)
        for row, (ids, first) in enumerate(items):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
            labels[row, first : len(ids)] = torch.tensor(ids[first:])
        device = self.model.device
        call = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
        return call, labels.to(device)

    def loss(self, module: Any, part: Part) -> tuple[Tensor, dict[str, float]]:
        summed = self._summed(module(**part.call), part.wanted)
        return summed / (part.wanted != -100).sum(), {}

    @staticmethod
    def _summed(output: Any, labels: Tensor) -> Tensor:
        # Prompt tuning puts outputs of its own in front.
        logits = output.logits[:, -labels.shape[1] :][:, :-1].float()
        return functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="sum"
        )

    @torch.no_grad()
    def held_out(self, module: Any, rows: Sequence[int]) -> float:
        total, count = 0.0, 0
        for i in range(0, len(rows), 16):
            call, labels = self._called(rows[i : i + 16])
            total += float(self._summed(module(**call), labels).double())
            count += int((labels != -100).sum())
        return total / count

    def prompts(self, rows: Sequence[int]) -> list[str]:
        found = []
        for ids, first in (self.items[row] for row in rows):
            asked = ids[: max(first, min(self._START, len(ids) // 2))]
            found.append(self.model.tokenizer.decode(asked, skip_special_tokens=True))
        return list(dict.fromkeys(found))
