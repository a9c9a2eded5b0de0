"""Bases that maps cannot be fitted on, and work that must not grow with a vocabulary."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from regraft.adapters import Site
from regraft.bases import open_base
from regraft.errors import BadOption, CannotRun, NothingCarried
from regraft.inserts import prompt, spaces
from regraft.inserts import transfer as line
from regraft.inserts.calibration import aligned, own_texts
from regraft.inserts.carry import Carried, _best, followed
from regraft.inserts.hooks import Watch, attached
from regraft.inserts.insert import Bottleneck
from regraft.inserts.places import attentions, embedding
from regraft.inserts.spaces import Side
from regraft.retention.measure import measure
from regraft.running import Language
from regraft.transfer import transfer
from tests import factories
from tests.inserts import made
from tests.inserts.test_carry import insert, llama

TEXTS = ["a b 1 2 + 3 = 4", "c d", "e 0 0 1 a a", "b", "= = 2 c d e"]


def nothing() -> Watch:
    return Watch(set(), set(), set())


def test_an_attention_that_caps_its_scores_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, vocab_size=15, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()  # fmt: skip
    ids, before = torch.tensor([[0, 3, 4]]), model.config._attn_implementation
    bare = model(ids).logits
    part = next(iter(insert("prefix").parts.values()))
    there = {Site("", "model.layers.0.self_attn", "prefix"): part}
    with pytest.raises(CannotRun, match="caps its scores"), attached(model, there, nothing()):
        model(ids)
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, bare)


def test_no_model_is_kept_alive():
    model = llama().model
    gone = weakref.ref(model)
    with attached(model, insert("prefix").parts, nothing()):
        pass
    del model
    gc.collect()
    assert gone() is None


def test_a_bottleneck_on_a_module_with_several_results_keeps_the_others():
    class Two(nn.Module):
        def forward(self, x):
            return x, "other"

    root = nn.Sequential(Two())
    part = Bottleneck(
        module="0", position="houlsby", activation="relu", scale=1.0, down=torch.ones(1, 2),
        down_bias=torch.zeros(1), up=torch.ones(2, 1), up_bias=torch.zeros(2),
    )  # fmt: skip
    with attached(root, {Site("", "0", "bottleneck"): part}, nothing()):
        found = root(torch.ones(1, 3, 2))
    assert torch.equal(found[0], torch.full((1, 3, 2), 3.0))
    assert found[1] == "other"


@pytest.mark.parametrize("family", ["prompt", "prefix"])
def test_a_wide_vocabulary_is_read_in_smaller_batches_with_the_same_result(family, monkeypatch):
    source, target = llama(), llama(1)
    sides = [Side(m, t) for m, t in zip((source, target), aligned(source, target, TEXTS),
                                        strict=True)]  # fmt: skip
    parts = insert(family).parts
    whole = [side.said(parts) for side in sides]
    monkeypatch.setattr(spaces, "_LOGITS", 1)
    for side, before in zip(sides, whole, strict=True):
        assert torch.allclose(side.said(parts), before, atol=1e-4)


def test_logits_are_kept_at_the_same_positions_of_both_bases(monkeypatch):
    monkeypatch.setattr(spaces, "_SAID", 4)
    source, target = llama(), llama(1, vocab_size=25)
    sides = [Side(m, t) for m, t in zip((source, target), aligned(source, target, TEXTS),
                                        strict=True)]  # fmt: skip
    monkeypatch.setattr(spaces, "_LOGITS", 18 * 15)  # two texts of the one base, one of the other
    whole = sides[0].said({}), sides[1].said({})
    monkeypatch.undo()
    step = len(sides[0].items.rows) // 4
    for side, found in zip(sides, whole, strict=True):
        assert torch.allclose(found, side.said({})[::step], atol=1e-4)


def test_a_map_of_embeddings_needs_no_whole_vocabulary(monkeypatch):
    monkeypatch.setattr(prompt, "_MOST", 9)
    monkeypatch.setattr(prompt, "_MOST_EACH", 1)
    found = prompt.shared_embeddings(llama(), llama(1))
    assert [len(table) for table in found] == [9, 9]
    assert torch.equal(found[0], prompt.shared_embeddings(llama(), llama(1))[0])


def test_a_tokenizer_that_does_not_tell_where_tokens_end_is_refused():
    from transformers import ByT5Tokenizer

    source = llama()
    slow = Language("slow", source.model, ByT5Tokenizer(), torch.device("cpu"))
    with pytest.raises(CannotRun, match="where its tokens end"):
        aligned(source, slow, TEXTS)


def test_an_insert_as_long_as_the_context_is_refused():
    with pytest.raises(CannotRun, match="fill the context"):
        aligned(llama(), llama(), TEXTS, room=16)


def test_a_base_that_computes_nan_is_refused():
    sound, broken = llama(), llama()
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(CannotRun, match="not finite"):
        own_texts(broken, {}, 2, 0)
    sides = [Side(m, t) for m, t in zip((sound, broken), aligned(sound, broken, TEXTS),
                                        strict=True)]  # fmt: skip
    parts = insert("bottleneck").parts
    with pytest.raises(CannotRun, match="not finite"):
        followed(parts, {"mapped": parts}, *sides)


def test_where_the_change_cannot_be_told_the_map_is_taken_not_the_copy():
    forms = {"as it is": {}, "mapped": {}, "followed": {}}
    assert _best(forms, {}) == "mapped"
    assert _best(forms, {"as it is": 0.5, "mapped": 0.51, "followed": 0.4}) == "as it is"
    assert _best(forms, {"as it is": -0.5, "mapped": -0.4, "followed": -0.1}) == "followed"


def test_calibration_data_for_a_copy_are_an_error(world, tmp_path):
    bases = {"source": world["base"], "target": world["near"]}
    data = tmp_path / "data.txt"
    data.write_text("a b c")
    with pytest.raises(BadOption, match="copying fits nothing"):
        transfer(world["prompt"], **bases, method="copy", calibration=data)
    found = transfer(world["prompt"], **bases, calibration=data)
    assert found.method == "copy"
    assert any("were not used" in note for note in found.notes)
    assert found.parameters["calibration"] is None


def test_what_a_map_carries_is_not_called_refused(world, monkeypatch):
    def carry(adapter, source, target, **_):
        # The layers that weights pair with none of the target's do feed one here.
        own = [s for s in adapter.parts if int(s.module.split(".")[2]) >= 12 - len(made.KEPT)]
        names = [s.module.split(".") for s in own]
        shift = 12 - len(made.KEPT)
        there = [".".join((*n[:2], str(int(n[2]) - shift), *n[3:])) for n in names]
        sources = {replace(s, module=name): s for s, name in zip(own, there, strict=True)}
        parts = {t: replace(adapter.parts[s], module=t.module) for t, s in sources.items()}
        even = dict.fromkeys(sources, 0.9)
        left = {str(s): "no partner" for s in adapter.parts if s not in own}
        return Carried(parts, sources, even, even, left, form="mapped", followed={"mapped": 0.9})

    monkeypatch.setattr(line, "carry", carry)
    found = transfer(
        world["bottleneck"], source=world["base"], target=world["short"], method="activation-map"
    )
    assert not {site.source for site in found.sites} & found.sites_refused.keys()
    assert len(found.sites) + len(found.sites_refused) == 24
    assert found.pairing == "similarity of activations"


def test_an_insert_of_zeros_is_not_measured(world, tmp_path):
    zeros = made.rewrite(
        world["prompt"], tmp_path / "zeros", {}, lambda held: {k: v * 0 for k, v in held.items()}
    )
    (tmp_path / "data.txt").write_text("a b c")
    with pytest.raises(NothingCarried, match="zero"):
        measure(
            zeros, source=world["base"], target=world["near"], data=tmp_path / "data.txt",
            device="cpu",
        )  # fmt: skip


def test_an_encoder_with_a_decoder_is_no_place_for_an_insert(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=15, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
            decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
            bos_token_id=0, pad_token_id=1, eos_token_id=1, decoder_start_token_id=0,
            forced_eos_token_id=1, tie_word_embeddings=False,
        )
    )  # fmt: skip
    base = open_base(factories.save(model, tmp_path / "bart"))
    assert any(site.module.endswith("embed_tokens") for site in base.weights)
    assert embedding(base) is None
    assert not attentions(base).modules
