"""Reading inserts: PEFT's own files, every tensor accounted for, checked against the base."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from regraft.adapters import Site
from regraft.bases import open_base
from regraft.dialects import inspect_file, load_adapter
from regraft.dialects.inserted import is_insert
from regraft.errors import (
    FamilyNotYet,
    MalformedFile,
    NonFiniteTensor,
    NotAnAdapter,
    RegraftError,
    ShapeMismatch,
    SitesNotInBase,
    UnknownKeys,
)
from regraft.files import locate
from regraft.inserts.insert import KeysValues
from regraft.inserts.places import attentions, embedding
from regraft.inserts.read import load_insert
from regraft.inserts.tables import of_one_width, prefix_parts, prefix_table, size_of
from tests.inserts import made

ALL = pytest.mark.parametrize("family", made.FAMILIES)


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_prompt_is_its_table(world):
    found = load_insert(world["prompt"], world["base"])
    assert found.family == "prompt"
    (site, part), *rest = found.parts.items()
    assert not rest
    assert site == Site("", "model.embed_tokens", "prompt")
    assert torch.equal(part.vectors, tensors(world["prompt"])["prompt_embeddings"])
    assert len(found.sha256) == 64
    assert found.config["peft_type"] == "PROMPT_TUNING"


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_is_the_cache_that_peft_builds(world, tmp_path, projected):
    options = {"prefix_projection": projected}
    model = made.hosted(world["base"], "prefix", **options)
    folder = made.saved(world["base"], tmp_path / "prefix", "prefix", **options)
    found = load_insert(folder, world["base"])
    cache = model.get_prompt(batch_size=1)
    assert len(found.parts) == len(cache.layers) == 12
    for i, (site, part) in enumerate(found.parts.items()):
        assert site == Site("", f"model.layers.{i}.self_attn", "prefix")
        assert torch.allclose(part.keys, cache.layers[i].keys[0], atol=1e-6)
        assert torch.allclose(part.values, cache.layers[i].values[0], atol=1e-6)


def test_p_tuning_is_the_prompt_that_its_encoder_makes(world, tmp_path):
    folder = made.saved(world["base"], tmp_path / "p", "p-tuning")
    found = load_insert(folder, world["base"])
    (part,) = found.parts.values()
    expected = made.hosted(world["base"], "p-tuning").get_prompt(batch_size=1)[0]
    assert torch.allclose(part.vectors, expected, atol=1e-6)
    assert "encoder" in found.notes[0]


def test_bottlenecks_are_those_of_the_tuner(world):
    from regraft.tuners.bottleneck import bottlenecks

    found = load_insert(world["bottleneck"], world["base"])
    expected = bottlenecks(made.hosted(world["base"], "bottleneck"))
    assert {site.module for site in found.parts} == expected.keys()
    # in the order of layers: 2 before 10
    order = [site.module for site in found.parts]
    assert order.index("model.layers.2.mlp.down_proj") < order.index(
        "model.layers.10.mlp.down_proj"
    )
    h = torch.randn(2, 16)
    for site, part in found.parts.items():
        assert torch.equal(part(h), expected[site.module](h))


@ALL
def test_every_number_of_the_file_is_in_it(world, family):
    found = load_insert(world[family], world["base"])
    held = [t for p in found.parts.values() for t in vars(p).values() if torch.is_tensor(t)]
    assert sum(t.numel() for t in held) == sum(t.numel() for t in tensors(world[family]).values())
    assert not found.refused


def test_fused_projections_and_their_prefix(world, tmp_path):
    base = open_base(world["gpt2"])
    found = attentions(base)
    assert found.modules == ("transformer.h.0.attn", "transformer.h.1.attn")
    assert (found.heads, found.width) == (2, 16)
    assert embedding(base) == Site("", "transformer.wte")
    folder = made.saved(world["gpt2"], tmp_path / "prefix", "prefix")
    part = next(iter(load_insert(folder, base).parts.values()))
    assert part.keys.shape == (2, made.TOKENS, 8)


@pytest.mark.parametrize("family", ["prefix", "bottleneck"])
def test_the_wrong_base_is_refused(world, family):
    with pytest.raises((ShapeMismatch, SitesNotInBase)) as caught:
        load_insert(world[family], world["gpt2"])
    assert caught.value.file.endswith("adapter_model.safetensors")
    assert "base" in caught.value.fix


@ALL
def test_another_width_is_refused(world, family, tmp_path):
    def narrower(held):
        return {k: v[..., : v.shape[-1] - 2] for k, v in held.items()}

    folder = made.rewrite(world[family], tmp_path / "narrow", {}, narrower)
    with pytest.raises(ShapeMismatch) as caught:
        load_insert(folder, world["base"])
    assert caught.value.tensor
    assert caught.value.fix


@ALL
def test_not_a_number_is_refused(world, family, tmp_path):
    def broken(held):
        return {k: v * torch.nan for k, v in held.items()}

    folder = made.rewrite(world[family], tmp_path / "nan", {}, broken)
    with pytest.raises(NonFiniteTensor):
        load_insert(folder, world["base"])
    facts = inspect_file(folder)
    assert len(facts["nonfinite_tensors"]) == len(tensors(folder))


@ALL
def test_an_unknown_tensor_is_an_error_or_recorded(world, family, tmp_path):
    folder = made.rewrite(
        world[family], tmp_path / "more", {}, lambda held: {**held, "strange": torch.ones(2)}
    )
    with pytest.raises(UnknownKeys, match="strange"):
        load_insert(folder, world["base"])
    found = load_insert(folder, world["base"], allow_unknown=True)
    assert found.refused.keys() == {"strange"}
    assert inspect_file(folder)["unknown_keys"] == ["strange"]


def test_a_lost_tensor_is_an_error(world, tmp_path):
    def less(held):
        return dict(sorted(held.items())[1:])

    folder = made.rewrite(world["bottleneck"], tmp_path / "less", {}, less)
    with pytest.raises(MalformedFile) as caught:
        load_insert(folder, world["base"])
    assert "bottleneck_down.bias" in caught.value.tensor
    empty = made.rewrite(world["prompt"], tmp_path / "none", {}, lambda held: {"x": torch.ones(1)})
    with pytest.raises(MalformedFile, match="no tensors"):
        load_insert(empty, world["base"], allow_unknown=True)


@pytest.mark.parametrize(
    ("family", "settings", "error"),
    [
        ("prompt", {"num_virtual_tokens": 4}, MalformedFile),
        ("prompt", {"num_transformer_submodules": 2}, FamilyNotYet),
        ("prefix", {"num_attention_heads": 2}, ShapeMismatch),
        ("bottleneck", {"position": "sideways"}, MalformedFile),
        ("bottleneck", {"activation": None}, MalformedFile),
        ("bottleneck", {"scale": "much"}, MalformedFile),
        ("prompt", {"peft_type": "CPT"}, NotAnAdapter),
        ("prompt", {"peft_type": "MULTITASK_PROMPT_TUNING"}, NotAnAdapter),
    ],
)
def test_settings_that_do_not_hold_are_refused(world, tmp_path, family, settings, error):
    folder = made.rewrite(world[family], tmp_path / "odd", settings)
    with pytest.raises(error) as caught:
        load_insert(folder, world["base"])
    assert caught.value.file
    assert caught.value.fix


@pytest.mark.parametrize("kind", ["CPT", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CARTRIDGE"])
def test_other_prompt_learning_is_refused_by_name(world, tmp_path, kind):
    folder = made.rewrite(world["prompt"], tmp_path / "other", {"peft_type": kind})
    assert not is_insert(locate(folder))
    with pytest.raises(FamilyNotYet, match=kind):
        load_adapter(folder, world["base"])


@ALL
def test_as_a_change_of_weights_it_is_refused_with_the_reason(world, family):
    assert is_insert(locate(world[family]))
    assert is_insert(locate(world[family] / "adapter_model.safetensors"))
    with pytest.raises(FamilyNotYet, match="changes no weight") as caught:
        load_adapter(world[family], world["base"])
    assert "transfer" in caught.value.fix


@ALL
def test_inspect_says_what_it_is(world, family):
    facts = inspect_file(world[family])
    assert facts["family"] == family
    assert facts["readable"]
    assert "no weight" in facts["changes"]
    assert facts["parameters"] == sum(t.numel() for t in tensors(world[family]).values())
    size = facts["width"] == [made.WIDTH] if family == "bottleneck" else facts["virtual_tokens"]
    assert size in (True, made.TOKENS)
    assert len(facts["sha256"]) == 64
    if family == "prefix":
        assert (facts["layers"], facts["key_heads"], facts["key_width"]) == (12, 1, 8)


def test_a_prefix_table_and_its_parts_are_each_others_inverse():
    torch.manual_seed(0)
    parts = [KeysValues(torch.randn(2, 3, 4), torch.randn(2, 3, 4)) for _ in range(5)]
    table = prefix_table(parts)
    assert table.shape == (3, 2 * 5 * 2 * 4)
    for a, b in zip(parts, prefix_parts(table, 5, 2), strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_padding_to_one_width_changes_no_function(world):
    found = load_insert(world["bottleneck"], world["base"])
    parts = {site.module: part for site, part in found.parts.items()}
    first = next(iter(parts))
    narrow = replace(
        parts[first],
        down=parts[first].down[:2],
        down_bias=parts[first].down_bias[:2],
        up=parts[first].up[:, :2],
    )
    same = of_one_width({**parts, first: narrow})
    assert {size_of(part) for part in same.values()} == {made.WIDTH}
    h = torch.randn(5, 16)
    assert torch.allclose(same[first](h), narrow(h), atol=1e-6)


def test_nothing_but_an_error_of_ours_for_a_damaged_folder(world, tmp_path):
    folder = made.rewrite(world["prompt"], tmp_path / "damaged", {})
    (folder / "adapter_config.json").write_text("{")
    for call in (lambda: load_insert(folder, world["base"]), lambda: load_adapter(folder, None)):
        with pytest.raises(RegraftError):
            call()
