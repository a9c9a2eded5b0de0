"""Inserts on another base: exact where the other base is the same one in other coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from regraft.adapters import Site
from regraft.errors import BadOption, CannotRun
from regraft.inserts import calibration
from regraft.inserts import carry as line
from regraft.inserts.calibration import aligned, own_texts
from regraft.inserts.carry import carry
from regraft.inserts.hooks import Watch, attached
from regraft.inserts.insert import Bottleneck, InsertAdapter, KeysValues, Prompt
from regraft.inserts.layers import counterparts
from regraft.inserts.spaces import _read, length_of, prompt_of
from regraft.running import Diffusion, Language, Pictures, Text, Texts
from tests.running.bases import WORDS, tokenizer

D, LAYERS, HEADS, WIDTH = 8, 2, 2, 6


def llama(seed: int = 0, **told):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    usual = {"hidden_size": D, "intermediate_size": 20, "num_hidden_layers": LAYERS}
    usual |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": 15}
    usual |= {"head_dim": WIDTH}
    usual |= {"max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig(**{**usual, "tie_word_embeddings": False, **told})
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)  # so that attention has something to choose
    return Language("tiny", model, tokenizer(16), torch.device("cpu"))


def turned(seed: int = 0):
    """The same base with its residual stream and the values of its heads in other coordinates."""
    made = llama(seed)
    draw = torch.Generator().manual_seed(99)
    q = torch.linalg.qr(torch.randn(D, D, generator=draw))[0]
    with torch.no_grad():
        model = made.model
        for table in (model.model.embed_tokens, model.lm_head):
            table.weight.copy_(table.weight @ q)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            reads = (
                attention.q_proj,
                attention.k_proj,
                attention.v_proj,
                mlp.gate_proj,
                mlp.up_proj,
            )
            for part in reads:
                part.weight.copy_(part.weight @ q)
            for part in (attention.o_proj, mlp.down_proj):
                part.weight.copy_(q.mT @ part.weight)
            r = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw))[0]
            whole = torch.block_diag(*[r] * HEADS)
            attention.v_proj.weight.copy_(whole @ attention.v_proj.weight)
            attention.o_proj.weight.copy_(attention.o_proj.weight @ whole.mT)
    return made


def insert(family: str, seed: int = 0, **told) -> InsertAdapter:
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    if family == "prompt":
        parts = {Site("", "model.embed_tokens", "prompt"): Prompt(some(3, D))}
    elif family == "prefix":
        parts = {
            Site("", f"model.layers.{i}.self_attn", "prefix"): KeysValues(
                some(HEADS, 3, WIDTH), some(HEADS, 3, WIDTH)
            )
            for i in range(LAYERS)
        }
    else:
        parts = {}
        for i in range(LAYERS):
            for own in ("self_attn.o_proj", "mlp.down_proj"):
                name = f"model.layers.{i}.{own}"
                parts[Site("", name, "bottleneck")] = Bottleneck(
                    module=name, position="houlsby", activation="swish", scale=1.0,
                    down=some(4, D), down_bias=some(4), up=some(D, 4), up_bias=some(D), **told,
                )  # fmt: skip
    return InsertAdapter(family, parts)


def said(model: Language, parts) -> torch.Tensor:
    ids = torch.tensor([[0, 3, 5, 7, 9, 4], [0, 12, 11, 6, 3, 8]])
    with torch.no_grad(), attached(model.model, parts, Watch(set(), set(), set())):
        found = _read(model.model, ids, torch.ones_like(ids), prompt_of(parts), length_of(parts))
    return found[:, -ids.shape[1] :]


FAMILIES = ("prompt", "prefix", "bottleneck")


@pytest.fixture(scope="module")
def results():
    """Every family carried to the same base in other coordinates."""
    source, target = llama(), turned()
    return source, target, {f: carry(insert(f), source, target) for f in FAMILIES}


def test_the_turned_base_is_the_same_base():
    assert torch.allclose(said(llama(), {}), said(turned(), {}), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_other_coordinates_an_insert_does_what_it_did(results, family):
    source, target, carried = results
    made = carried[family]
    bare, wanted = said(source, {}), said(source, insert(family).parts)
    copied = said(target, insert(family).parts)
    left = float((said(target, made.parts) - wanted).norm() / (wanted - bare).norm())
    assert left < 0.15
    assert left < 0.2 * float((copied - wanted).norm() / (wanted - bare).norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_says_so(results, family):
    made = results[2][family]
    assert made.form != "as it is"
    assert made.followed[made.form] > 0.9
    assert made.followed["as it is"] < made.followed[made.form]
    assert made.parts.keys() == made.sources.keys() == made.fit.keys() == made.kept.keys()
    assert all(fit > 0.9 for fit in made.fit.values())
    assert all(kept > 0.9 for kept in made.kept.values())
    assert not made.refused


@pytest.mark.parametrize("family", FAMILIES)
def test_on_its_own_base_an_insert_is_as_it_was(family):
    source, adapter = llama(), insert(family)
    made = carry(adapter, source, source)
    assert made.form == "as it is"
    assert made.followed["as it is"] == pytest.approx(1, abs=1e-4)
    assert torch.equal(said(source, made.parts), said(source, adapter.parts))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wider_deeper_base_with_shared_key_heads_gets_a_whole_insert(family):
    target = llama(
        1,
        hidden_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    made = carry(insert(family), llama(), target)
    if family == "prompt":
        assert [p.vectors.shape for p in made.parts.values()] == [(3, 20)]
    elif family == "prefix":
        assert [s.module for s in made.parts] == [f"model.layers.{i}.self_attn" for i in range(3)]
        assert all(p.keys.shape == p.values.shape == (2, 3, 6) for p in made.parts.values())
    else:
        assert all(p.down.shape == (4, 20) and p.up.shape == (20, 4) for p in made.parts.values())
        assert len(made.parts) == 6
        assert all(site.module == part.module for site, part in made.parts.items())
    assert torch.isfinite(said(target, made.parts)).all()
    assert "as it is" not in made.followed


def test_the_same_seed_gives_the_same_bytes():
    found = [carry(insert("bottleneck"), llama(), llama(1), seed=3) for _ in range(2)]
    for one, other in zip(*(f.parts.values() for f in found), strict=True):
        assert torch.equal(one.up, other.up)
        assert torch.equal(one.down, other.down)
    assert found[0].followed == found[1].followed


def test_items_of_the_users_own_are_what_is_read(monkeypatch):
    def refuse(*_):
        raise AssertionError("sampled, though items were given")

    monkeypatch.setattr(line, "own_texts", refuse)
    items = Texts(tuple(Text(" ".join(WORDS[i:] + WORDS[:i])) for i in range(12)))
    made = carry(insert("bottleneck"), llama(), turned(), calibration=items)
    assert "given items" in made.notes[-1]


def test_a_layer_norm_inside_is_refused():
    adapter = insert("bottleneck", norm=torch.ones(D), norm_bias=torch.zeros(D))
    with pytest.raises(BadOption, match="layer norm"):
        carry(adapter, llama(), turned())


def test_nothing_stays_on_the_models():
    source, target = llama(), llama(1)
    before = said(target, {}), target.model.config._attn_implementation
    for family in FAMILIES:
        carry(insert(family), source, target)
    assert torch.equal(said(target, {}), before[0])
    assert target.model.config._attn_implementation == before[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.model.modules())


def test_positions_of_two_tokenizers_are_those_that_end_alike(monkeypatch):
    source, target = llama(), llama()
    target.tokenizer = letters()
    here, there = aligned(source, target, ["a 12 b", "1 2"])
    told = [
        [model.tokenizer.convert_ids_to_tokens(int(side.ids[n, i])) for n, i in side.rows.tolist()]
        for model, side in ((source, here), (target, there))
    ]
    assert told[0] == ["[BOS]", "a", "[UNK]", "b", "[BOS]", "1", "2"]
    assert told[1] == ["[BOS]", "a", "2", "b", "[BOS]", "1", "2"]


def test_layers_pair_by_likeness_but_never_backwards():
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(200, 6, generator=draw) for _ in range(3)]
    here = {f"layers.{i}.out": state for i, state in enumerate(states)}
    pruned = {
        "layers.0.out": states[0] * 2,
        "layers.1.out": states[2] @ torch.randn(6, 9, generator=draw),
    }
    pairs = {name: like for name, (like, _) in counterparts(here, pruned).items()}
    assert pairs == {"layers.0.out": "layers.0.out", "layers.1.out": "layers.2.out"}
    order = [states[0], states[2] + states[1], states[1], states[2]]
    deeper = counterparts(here, {f"layers.{i}.out": state for i, state in enumerate(order)})
    assert [like for like, _ in deeper.values()] == [f"layers.{i}.out" for i in (0, 1, 1, 2)]


def letters():
    """A tokenizer of single letters, without spaces."""
    from tokenizers import Regex, pre_tokenizers

    made = tokenizer(16)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    return made


def test_own_samples_leave_room_for_the_virtual_tokens(monkeypatch):
    model = llama()
    monkeypatch.setattr(calibration, "TOKENS", 64)
    texts = own_texts(model, insert("prefix").parts, 4, 0, room=3)
    assert all(len(text.split()) <= 16 - 3 for text in texts)
    assert texts == own_texts(model, insert("prefix").parts, 4, 0, room=3)
    assert texts != own_texts(model, {}, 4, 0, room=3)


def test_bases_of_two_kinds_are_refused():
    other = llama()
    other.kind = "diffusion"  # type: ignore[misc]
    with pytest.raises(CannotRun, match="kind"):
        carry(insert("prefix"), llama(), other)


@pytest.mark.parametrize("family", ["prefix", "bottleneck"])
def test_layers_that_a_shorter_base_lacks_are_refused_by_name(family):
    made = carry(insert(family), llama(), llama(1, num_hidden_layers=1))
    assert {site.module for site in made.parts} == {site.module for site in made.sources}
    left = {str(site) for site in insert(family).parts} - {str(s) for s in made.sources.values()}
    assert made.refused.keys() == left
    assert len(left) == len(made.parts)


class Painter(Diffusion):
    """A denoiser of two blocks on the places of 4-pixel pictures; q: its stream's coordinates."""

    size = 4

    def __init__(self, q: torch.Tensor) -> None:
        torch.manual_seed(0)
        root = nn.Module()
        root.first, root.last = nn.Linear(3, D), nn.Linear(D, 3)
        root.blocks = nn.ModuleList(Painted() for _ in range(2))
        super().__init__("painter", {"unet": root}, torch.device("cpu"))
        with torch.no_grad():
            for part in (root.last, *(b.reads for b in root.blocks)):
                part.weight.copy_(part.weight @ q)
            for part in (root.first, *(b.gives for b in root.blocks)):
                part.weight.copy_(q.mT @ part.weight)
                part.bias.copy_(q.mT @ part.bias)

    def clean(self, pictures):
        return torch.from_numpy(pictures.images).permute(0, 3, 1, 2).float() / 127.5 - 1

    def condition(self, captions):
        return {"hidden": torch.zeros(len(captions), 1, 1)}

    def noisy(self, x0, noise, t):
        return (1 - t) * x0 + t * noise, noise - x0

    def predict(self, x, t, condition):
        root = self.modules["unet"]
        h = root.first(x.flatten(2).mT)
        for block in root.blocks:
            h = block(h)
        return root.last(h).mT.reshape(x.shape)

    def sample(self, captions, seeds=0):
        draw = np.random.default_rng(seeds)
        return draw.integers(0, 256, (len(captions), 4, 4, 3), dtype=np.uint8)


class Painted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reads, self.gives = nn.Linear(D, 6), nn.Linear(6, D)

    def forward(self, h):
        return h + self.gives(self.reads(h).tanh())


def test_pictures_carry_bottlenecks_by_place():
    draw = torch.Generator().manual_seed(1)
    source = Painter(torch.eye(D))
    target = Painter(torch.linalg.qr(torch.randn(D, D, generator=draw))[0])
    parts = {
        Site("unet", f"blocks.{i}.gives", "bottleneck"): Bottleneck(
            module=f"blocks.{i}.gives",
            position="houlsby",
            activation="relu",
            scale=1.0,
            down=torch.randn(4, D, generator=draw),
            down_bias=torch.zeros(4),
            up=torch.randn(D, 4, generator=draw),
            up_bias=torch.zeros(D),
        )
        for i in range(2)
    }
    adapter = InsertAdapter("bottleneck", parts)
    made = carry(adapter, source, target)
    assert made.followed[made.form] > 0.95 > 0.5 > made.followed["as it is"]
    given = Pictures(source.sample([""] * 9, 5), [""] * 9)
    assert carry(adapter, source, target, calibration=given).followed[made.form] > 0.95
    with pytest.raises(CannotRun, match="pictures"):
        carry(adapter, source, target, calibration=Texts((Text("a"),)))
