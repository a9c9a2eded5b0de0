"""Inserts on a running base: what PEFT does, read token for token, and nothing left behind."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from regraft.errors import BadData, BadOption, CannotRun, ShapeMismatch, SitesNotInBase
from regraft.inserts.attached import attached, random_insert
from regraft.inserts.read import load_insert
from regraft.inserts.tables import energy, tensors_of
from regraft.retention.measure import measure
from regraft.retention.text import exact_score, held_out_loss
from regraft.running import Text, denoising_losses, open_model
from regraft.tuners.bottleneck.parts import Bottleneck, to_tensors
from tests.inserts import made

ALL = pytest.mark.parametrize("family", made.FAMILIES)
IDS = torch.tensor([[0, 3, 7, 9, 4], [0, 5, 5, 6, 8]])


@pytest.fixture(scope="module")
def model(world):
    return open_model(world["base"])


@pytest.fixture(scope="module")
def adapters(world):
    return {family: load_insert(world[family], world["base"]) for family in made.FAMILIES}


def out(model, ids=IDS):
    with torch.no_grad():
        mask = torch.ones_like(ids)
        return model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def state(model):
    """Every module and attribute by identity, and every weight."""
    modules = [m for root in model.modules.values() for m in root.modules()]
    attributes = [(id(m), m.training, sorted(m.__dict__)) for m in modules]
    weights = {f"{c}.{k}": w for c, m in model.modules.items() for k, w in m.state_dict().items()}
    return attributes, {k: w.clone() for k, w in weights.items()}


def same(before, after):
    (old, weights), (new, others) = before, after
    return old == new and all(torch.equal(w, others[k]) for k, w in weights.items())


@ALL
def test_it_is_what_peft_computes(world, model, adapters, family):
    expected = made.logits(world["base"], world[family], IDS)
    with attached(model, adapters[family]):
        found = out(model)
    assert found.shape == out(model).shape
    assert torch.allclose(found, expected, atol=1e-5)


@ALL
def test_nothing_is_left_behind(model, adapters, family):
    before, bare = state(model), out(model)

    def work():
        with attached(model, adapters[family]):
            out(model)
            model.model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        work()
    assert same(before, state(model))
    assert torch.equal(out(model), bare)


@ALL
def test_answers_are_those_of_one_token_after_the_other(model, adapters, family):
    """Positions and masks of what is generated are those of what is read."""
    with attached(model, adapters[family]):
        answer = model.model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=None,
        )
        ids = IDS
        for _ in range(4):
            ids = torch.cat([ids, out(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, ids)


@ALL
def test_padding_changes_nothing(model, adapters, family):
    padded = torch.cat([IDS, torch.ones(2, 3, dtype=torch.long)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, IDS.shape[1] :] = 0
    with attached(model, adapters[family]), torch.no_grad():
        expected = out(model)
        found = model.model(input_ids=padded, attention_mask=mask).logits[:, : IDS.shape[1]]
    assert torch.allclose(found, expected, atol=1e-5)


@ALL
def test_the_measures_read_it(model, adapters, family):
    items = [Text("3 4", "a b ="), Text("0 1", "c d =")]
    bare = held_out_loss(model.model, model.tokenizer, items)
    with attached(model, adapters[family]):
        loss = held_out_loss(model.model, model.tokenizer, items)
        assert len(exact_score(model.model, model.tokenizer, items)) == 2
    assert loss != pytest.approx(bare)


def test_only_bottlenecks_have_a_strength(model, adapters):
    bare = out(model)
    with attached(model, adapters["bottleneck"], 0.0):
        assert torch.equal(out(model), bare)
    with attached(model, adapters["bottleneck"], 0.5):
        half = out(model)
    with attached(model, adapters["bottleneck"]):
        whole = out(model)
    assert (half - bare).norm() < (whole - bare).norm()
    for family in ("prompt", "prefix"):
        with pytest.raises(BadOption, match="strength"), attached(model, adapters[family], 0.5):
            pass


@ALL
def test_another_base_is_refused_and_left_as_it_was(world, adapters, family):
    other = open_model(world["wide"])
    before = state(other)
    with pytest.raises((ShapeMismatch, SitesNotInBase)), attached(other, adapters[family]):
        pass
    assert same(before, state(other))


@ALL
def test_one_at_a_time(model, adapters, family):
    before = state(model)
    with (
        pytest.raises(CannotRun, match="already"),
        attached(model, adapters[family]),
        attached(model, adapters[family]),
    ):
        pass
    assert same(before, state(model))


def test_learned_positions_end(world, tmp_path):
    folder = made.saved(world["gpt2"], tmp_path / "prompt", "prompt")
    model = open_model(world["gpt2"])
    with attached(model, load_insert(folder, world["gpt2"])):
        out(model, torch.zeros(1, 16 - made.TOKENS, dtype=torch.long))
        with pytest.raises(BadData, match="16 positions"):
            out(model, torch.zeros(1, 16, dtype=torch.long))


@ALL
def test_the_control_is_as_large_and_otherwise_random(adapters, family):
    adapter = adapters[family]
    drawn, again, other = (random_insert(adapter, seed) for seed in (0, 0, 1))
    for site, part in adapter.parts.items():
        assert energy(drawn.parts[site]) == pytest.approx(energy(part), rel=1e-4)
        for name, tensor in tensors_of(drawn.parts[site]).items():
            assert torch.equal(tensor, tensors_of(again.parts[site])[name])
            assert not torch.equal(tensor, tensors_of(other.parts[site])[name])


@ALL
def test_measure_takes_it(world, family, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = ['{"prompt": "a b =", "completion": "3 4"}', '{"prompt": "c d =", "completion": "0 1"}']
    data.write_text("\n".join(lines))
    options = {"data": data, "device": "cpu", "strengths": (0.5, 1.0)}
    found = measure(
        world[family],
        source=world["base"],
        target=world["near"],
        methods=["copy"],
        retrained=world[family],
        report=tmp_path / "page.html",
        **options,
    )
    (way,) = found.ways
    assert way.name == "copy"
    assert way.energy_kept == 1.0
    # the copy is the very adapter that stands for the retrained one
    assert way.loss == found.losses["retrained"] != found.losses["target"]
    assert len(way.curve.strengths) == (2 if family == "bottleneck" else 1)
    assert found.adapter["changes"] == "activations"
    assert (tmp_path / "page.html").read_text().count("changes no weight")
    alone = measure(world[family], target=world["base"], **options)
    assert [way.name for way in alone.ways] == ["as it is"]


def test_bottlenecks_on_a_unet(tmp_path):
    """Read from PEFT's file, put on, and off again."""
    pytest.importorskip("diffusers")
    from tests.running.bases import stable_diffusion_folder
    from tests.running.test_open import noise_pictures

    folder = stable_diffusion_folder(tmp_path / "base")
    model = open_model(folder)
    pictures = noise_pictures(model.size)
    torch.manual_seed(0)
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    width = dict(model.modules["unet"].named_modules())[name].out_features
    settings = {"position": "houlsby", "activation": "swish", "scale": 1.0}
    part = Bottleneck(
        name, **settings, down=torch.randn(2, width), down_bias=torch.randn(2),
        up=torch.randn(width, 2), up_bias=torch.randn(width),
    )  # fmt: skip
    out_folder = tmp_path / "adapter"
    out_folder.mkdir()
    save_file(to_tensors({name: part}), out_folder / "adapter_model.safetensors")
    told = {"peft_type": "BOTTLENECK", "width": 2, **settings}
    (out_folder / "adapter_config.json").write_text(json.dumps(told))
    adapter = load_insert(out_folder, folder)
    assert [str(site) for site in adapter.parts] == [f"unet.{name}.bottleneck"]
    before, bare = state(model), denoising_losses(model, pictures, timesteps=1)
    with attached(model, adapter):
        assert not torch.allclose(denoising_losses(model, pictures, timesteps=1), bare)
    assert same(before, state(model))
    assert torch.equal(denoising_losses(model, pictures, timesteps=1), bare)
