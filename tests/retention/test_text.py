"""Language metrics against transformers' own loss, hand-made answers and hand-made flips."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regraft.errors import BadOption
from regraft.retention.text import exact_score, held_out_loss, negative_flips, next_token_hits
from regraft.running import Text

CONTEXT = 24
SPECIAL = ["<pad>", "<bos>", "<eos>"]
TEXTS = ["a plain line\n", "café, 2 €\n", "b"]


def make_tokenizer(*merges: tuple[str, str], bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; every merge makes one longer token."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **names)


def make_model(size: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,  # far from uniform, so that every token counts
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def library_nats(model: LlamaForCausalLM, ids: Sequence[int], labels: Sequence[int]) -> float:
    """The sum of -log p by transformers' own loss, one sequence, no padding."""
    row, wanted = torch.tensor([list(ids)]), torch.tensor([list(labels)])
    scored = int((wanted[:, 1:] != -100).sum())
    with torch.no_grad():
        return float(model(input_ids=row, labels=wanted).loss) * scored


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(len(tokenizer))


class Scripted(LlamaForCausalLM):
    """A real Llama whose next token is looked up: at each place, what the script says."""

    script: dict[str, str]
    tokenizer: PreTrainedTokenizerFast

    def forward(self, input_ids: Tensor | None = None, **inputs: object) -> object:
        outputs = super().forward(input_ids=input_ids, **inputs)
        assert input_ids is not None
        logits = torch.zeros_like(outputs.logits)
        for i, row in enumerate(input_ids):
            said = self.tokenizer.decode(row, skip_special_tokens=True)
            (whole,) = [p + a for p, a in self.script.items() if (p + a).startswith(said)]
            rest = self.tokenizer(whole[len(said) :], add_special_tokens=False)["input_ids"]
            logits[i, -1, rest[0] if rest else 2] = 1.0
        outputs.logits = logits
        return outputs


def scripted(tokenizer: PreTrainedTokenizerFast, script: dict[str, str]) -> LlamaForCausalLM:
    model = make_model(len(tokenizer))
    model.__class__ = Scripted
    model.script, model.tokenizer = script, tokenizer
    model.generation_config.use_cache = False  # the script needs the whole text at every step
    return model


class TestHeldOutLoss:
    @pytest.mark.parametrize("batch", [1, 2, 16])
    def test_is_the_librarys_loss_over_bytes(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: int
    ) -> None:
        nats = 0.0
        for text in TEXTS:
            ids = [1, *tokenizer(text)["input_ids"]]
            nats += library_nats(model, ids, ids)
        expected = nats / sum(len(text.encode()) for text in TEXTS)
        assert held_out_loss(model, tokenizer, TEXTS, batch=batch) == pytest.approx(
            expected, rel=1e-5
        )

    def test_scores_the_completion_only(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        read, said = tokenizer("407 = ")["input_ids"], tokenizer("vier\n")["input_ids"]
        expected = library_nats(model, [1, *read, *said], [-100] * (1 + len(read)) + said) / 5
        found = held_out_loss(model, tokenizer, [Text("vier\n", "407 = ")])
        assert found == pytest.approx(expected, rel=1e-5)

    def test_cuts_at_the_context_and_counts_only_the_bytes_left(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        long = "x" * (CONTEXT - 1)
        whole = held_out_loss(model, tokenizer, [long])
        assert held_out_loss(model, tokenizer, [long + "and more"]) == pytest.approx(whole)

    def test_is_per_byte_whatever_the_tokenizer(self) -> None:
        # uniform over its tokens: log(vocabulary) nats per token, each worth its bytes
        single, double = make_tokenizer(), make_tokenizer(("a", "b"))
        for tokenizer, per_byte in ((single, 1.0), (double, 0.5)):
            model = make_model(len(tokenizer))
            torch.nn.init.zeros_(model.lm_head.weight)
            found = held_out_loss(model, tokenizer, ["ababab"])
            assert found == pytest.approx(per_byte * math.log(len(tokenizer)))

    def test_without_a_start_token_the_first_token_is_only_read(
        self, model: LlamaForCausalLM
    ) -> None:
        tokenizer = make_tokenizer(bos=False)
        ids = tokenizer("héllo")["input_ids"]
        found = held_out_loss(model, tokenizer, ["héllo"])
        assert found == pytest.approx(library_nats(model, ids, ids) / 5, rel=1e-5)

    @pytest.mark.parametrize("texts", [[], [""], [Text("answer", "p" * CONTEXT)]])
    def test_nothing_to_score_is_an_error(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        texts: list[str | Text],
    ) -> None:
        with pytest.raises(BadOption, match="anything to score"):
            held_out_loss(model, tokenizer, texts)


class TestNextTokenHits:
    def test_one_per_scored_token_in_order(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        expected = []
        for text in TEXTS:
            ids = torch.tensor([[1, *tokenizer(text)["input_ids"]]])
            with torch.no_grad():
                guesses = model(input_ids=ids).logits[:, :-1].argmax(-1)
            expected += (guesses == ids[:, 1:]).flatten().tolist()
        assert next_token_hits(model, tokenizer, TEXTS, batch=2) == expected


class TestExactScore:
    def test_is_exact_to_the_letter(self, tokenizer: PreTrainedTokenizerFast) -> None:
        script = {
            "1 = ": "one\nand on",  # right: what follows the newline is not the answer
            "2 = ": "two",  # right: ends with the end token
            "3 = ": "threee\n",  # goes on
            "14 = ": "four\n",  # wrong, and of another length
            "5 =": " five \n",  # a space too many
        }
        answers = ("one\n", "two\n", "three\n", "fourteen\n", " five\n")
        items = [Text(answer, prompt) for prompt, answer in zip(script, answers, strict=True)]
        model = scripted(tokenizer, script)
        assert exact_score(model, tokenizer, items) == [True, True, False, False, False]
        assert exact_score(model, tokenizer, items, batch=1) == [True, True, False, False, False]

    @pytest.mark.parametrize("items", [[], [Text("an answer")]])
    def test_needs_prompts(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[Text]
    ) -> None:
        with pytest.raises(BadOption, match="prompt"):
            exact_score(model, tokenizer, items)


class TestNegativeFlips:
    def test_by_hand(self) -> None:
        before = [True, True, True, False, False]
        after = [True, False, False, True, False]
        assert negative_flips(before, after) == pytest.approx(2 / 5)

    @given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
    def test_flips_balance_the_change_in_score(self, pairs: list[tuple[bool, bool]]) -> None:
        before, after = [b for b, _ in pairs], [a for _, a in pairs]
        gained = (sum(after) - sum(before)) / len(pairs)
        assert negative_flips(after, before) - negative_flips(before, after) == pytest.approx(
            gained
        )

    @pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
    def test_needs_the_same_items(self, before: list[bool], after: list[bool]) -> None:
        with pytest.raises(BadOption, match="same items"):
            negative_flips(before, after)
