"""The language half of the lab: its texts, its tokenizers, and its steps on a tiny base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from lab import language, language_plan, text
from lab.steps import Shop, Step, run_steps
from regraft.dialects import load_adapter

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SAMPLE = "".join(f"line {i} of a text\n" for i in range(60))
BASES: dict[str, dict[str, Any]] = {
    "v1": {"shape": TINY},
    "pruned": {"start": "v1", "layers": (1,)},
    "other-tokenizer": {"shape": TINY, "tokens": 280},
}
RECIPE = {"mix": {"sample": 1.0}, "batch": 2, "steps": 2, "lr": 1e-3, "seed": 1}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """A shop of tiny bases, and adapters of two steps on two items."""
    torch.set_num_threads(1)
    items = text.spell()
    monkeypatch.setattr(text, "corpus", lambda name: SAMPLE)
    monkeypatch.setattr(text, "task", lambda name: (items[0][:4], items[1][:2]))
    monkeypatch.setattr(language_plan, "BASES", {k: RECIPE | v for k, v in BASES.items()})
    quick = {"steps": 2, "batch": 2, "lr": 1e-3, "dropout": 0.0}
    monkeypatch.setattr(language_plan, "ADAPTER", {"spell": quick})
    monkeypatch.setattr(text, "TASKS", ("spell",))
    return Shop("language", tmp_path / "assets", tmp_path / "runs")


def steps() -> list[Step]:
    data = Step("data", Path("data/spell.jsonl"), {}, language_plan.write_data)
    return [data, *map(language_plan.base_step, BASES)]


@pytest.mark.parametrize("task", text.TASKS)
def test_no_item_is_both_trained_on_and_held_out(task: str) -> None:
    trained, held_out = text.task(task)
    assert len(trained) > 2 * len(held_out) > 0
    assert not {tuple(i.values()) for i in trained} & {tuple(i.values()) for i in held_out}
    assert text.task(task) == (trained, held_out)


def test_the_shipped_held_out_items_are_those_of_the_task(tmp_path: Path) -> None:
    for task in text.TASKS:
        text.write_held_out(task, tmp_path / task)
        shipped = Path(text.__file__).parent / "assets" / "language" / "data" / f"{task}.jsonl"
        assert shipped.read_bytes() == (tmp_path / task).read_bytes()


def test_spell_items_say_their_digits() -> None:
    for item in [*text.spell()[0], *text.spell()[1]]:
        words = item["completion"].split()
        assert [str(text.DIGITS.index(word)) for word in words] == list(item["prompt"][:3])


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokenizers_give_back_every_text(kind: str) -> None:
    byte = kind == "byte"
    tokenizer = language.byte_tokenizer() if byte else language.bpe_tokenizer([SAMPLE], 280)
    for said in ("def f(x):\n    return x  # é\n", "  two  spaces\t\n\n"):
        ids = tokenizer(said)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == said
    assert len(tokenizer) == (259 if byte else 280)
    assert len(tokenizer("a line of a text")["input_ids"]) < 17 or byte


def test_item_batches_score_completions_only() -> None:
    tokenizer = language.byte_tokenizer()
    items = [{"prompt": "1 = ", "completion": "one\n"}, {"text": "a longer text"}]
    ids, labels = language.item_batches(tokenizer, items, 8)(torch.Generator().manual_seed(0))
    said = {tokenizer.decode(row[row >= 0]) for row in labels}
    assert said == {"one\n", "a longer text"}
    assert torch.equal(ids[labels >= 0], labels[labels >= 0])


def test_stream_batches_start_at_lines_of_the_texts_asked_for() -> None:
    tokenizer = language.byte_tokenizer()
    texts = [SAMPLE, SAMPLE.upper()]
    draw = language.stream_batches(tokenizer, texts, 8, 20, [0.0, 1.0])
    ids, _ = draw(torch.Generator().manual_seed(0))
    assert all(tokenizer.decode(row).startswith("<bos>LINE ") for row in ids)


def test_the_steps_leave_bases_adapters_and_records(shop: Shop) -> None:
    made = [
        *steps(),
        language_plan.adapter_step("pruned", "spell", 8, 0),
        language_plan.adapter_step("pruned", "spell", 8, 1),
    ]
    assert run_steps(shop, made) == [step.name for step in made]
    assert run_steps(shop, made) == []

    pruned, _ = language.open_base(shop.assets / "bases" / "pruned")
    assert pruned.config.num_hidden_layers == 1
    other, tokenizer = language.open_base(shop.assets / "bases" / "other-tokenizer")
    assert other.config.vocab_size == len(tokenizer) == 280

    adapter = load_adapter(shop.assets / made[-2].output, shop.assets / "bases" / "pruned")
    assert len(adapter.updates) == len(language.LORA_TARGETS)
    assert not (shop.assets / "adapters" / made[-1].name).exists()
    for step in made[-2:]:
        record = json.loads(shop.record(step).read_text())
        assert record["adapted"]["heldout_loss"] != record["bare"]["heldout_loss"]
        assert record["recipe"]["kept"] is (step is made[-2])
    for path in shop.assets.rglob("*.json"):
        assert str(shop.assets) not in path.read_text()
        assert path.stat().st_mode & 0o777 == 0o644


def test_a_rebuild_gives_the_same_bytes(shop: Shop, tmp_path: Path) -> None:
    again = Shop("language", tmp_path / "assets-2", tmp_path / "runs-2")
    made = [*steps()[:2], language_plan.adapter_step("v1", "spell", 8, 0)]
    made = [replace(step, needs=()) for step in made]
    for where in (shop, again):
        run_steps(where, made)
    files = sorted(p.relative_to(shop.assets) for p in shop.assets.rglob("*") if p.is_file())
    assert len(files) >= 6
    for file in files:
        assert (shop.assets / file).read_bytes() == (again.assets / file).read_bytes()
