"""The language family: held-out loss, exact answers, negative flips."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.retention.family import Family
from regraft.activations import gather
from regraft.retention.text import (
    exact_score,
    held_out_loss,
    negative_flips,
    next_token_hits,
)
from regraft.running import Language as LanguageModel
from regraft.running import Model, Text

EXACT = "spell"
FLIPS = "negative flips"
INPUTS = 32  # for hidden states


class Language(Family):
    """Llama-class models on bytes."""

    kind = "language"
    upgrades = ("fine-tune", "continued", "pruned", "bigger", "other-seed", "other-tokenizer")
    tasks = ("bible", "timezones", EXACT)
    higher_is_better = ("exact answers",)
    margins = {"exact answers": 0.05}  # noqa: RUF012
    # shares of items that change have no retrained figure to be measured against
    without_reference = (FLIPS,)

    def adapter(self, base: str, task: str, rank: int, seed: int) -> Path:
        return self.assets / "adapters" / base / f"{task}-r{rank}-s{seed}"

    @property
    def data(self) -> list[Path]:
        return [self.assets / "data" / f"{task}.jsonl" for task in self.tasks]

    @cached_property
    def texts(self) -> dict[str, list[Text]]:
        """Held-out items by task."""
        found = {}
        for task, path in zip(self.tasks, self.data, strict=True):
            items = [json.loads(line) for line in path.read_text().splitlines()]
            texts = [Text(i.get("completion", i.get("text")), i.get("prompt", "")) for i in items]
            found[task] = texts[:12] if self.quick else texts
        return found

    def scores(self, model: Model, task: str) -> dict[str, float]:
        assert isinstance(model, LanguageModel)
        loss = held_out_loss(model.model, model.tokenizer, self.texts[task])
        return {"held-out loss": loss}

    def main_of(self, record: dict[str, Any]) -> dict[str, float]:
        return {"held-out loss": record["adapted"]["heldout_loss"]}

    def costly_scores(self, model: Model, task: str) -> dict[str, float]:
        assert isinstance(model, LanguageModel)
        if task != EXACT:
            return {}
        right = exact_score(model.model, model.tokenizer, self.texts[task])
        return {"exact answers": sum(right) / len(right)}

    def hits(self, model: Model, task: str) -> Sequence[bool]:
        assert isinstance(model, LanguageModel)
        return next_token_hits(model.model, model.tokenizer, self.texts[task])

    def against_bare(self, bare: Sequence[bool], adapted: Sequence[bool]) -> dict[str, float]:
        return {FLIPS: negative_flips(bare, adapted)}

    def states(self, base: str) -> dict[str, Tensor]:
        model = self.model(base)
        assert isinstance(model, LanguageModel)
        texts = [text.prompt + text.completion for text in self.texts[self.tasks[0]][:INPUTS]]

        def run(_: object) -> None:
            # one at a time: padding would count in the means
            for text in texts:
                ids = model.tokenizer(text, return_tensors="pt", truncation=True)["input_ids"]
                model.model(input_ids=ids, use_cache=False)

        return gather(model.model, run)
