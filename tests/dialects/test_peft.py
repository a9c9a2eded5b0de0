"""PEFT folders: ΔW as PEFT itself computes it, in both directions."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from regraft.adapters import Adapter, delta
from regraft.bases import open_base
from regraft.dialects import load_adapter
from regraft.dialects.scale import pattern_value
from regraft.errors import BadOption, MalformedFile, ShapeMismatch
from tests.dialects.loaders import (
    assert_same,
    deltas_in,
    deltas_of,
    judge_peft,
    random_adapter,
    with_deltas,
    write,
)
from tests.factories import UNET_1X1, UNET_3X3, UNET_LINEAR, clip, save

#: PEFT 0.21 reads a property that transformers 5 deprecates, and says what it saves besides.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]
IDS = torch.tensor([[1, 2, 3, 4]])


def trained(model, folder, **config):
    """Save a PEFT folder with random factors; return ΔW by PEFT's own merge rule."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **config})
    tuned = get_peft_model(copy.deepcopy(model), config)
    tuned.save_pretrained(str(folder))
    return deltas_in(tuned.base_model.model)


LLAMA = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "every linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding, rslora": {"target_modules": ["embed_tokens"], "use_rslora": True},
    "output head": {"target_modules": ["lm_head"]},
    "rank pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}},
    "alpha pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"layers.1.self_attn.q_proj": 20, "v_proj": 1.5},
    },
    "both patterns, rslora, expressions": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {r"layers\.(0|2)\..*": 3, "^model.layers.1.mlp.up_proj": 5},
        "alpha_pattern": {r".*v_proj": 2, "q_proj": 9},
        "use_rslora": True,
    },
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
}


@pytest.mark.parametrize("kind", LLAMA)
def test_llama_there_and_back(kind, llama_model, llama_base, tmp_path):
    wanted = trained(llama_model, tmp_path / "in", **LLAMA[kind])
    adapter = load_adapter(tmp_path / "in", llama_base)
    assert (adapter.dialect, adapter.family, adapter.name) == ("peft", "lora", "in")
    # PEFT saves the base's own embedding beside an adapter on it.
    assert all("copy of the base's own embedding" in why for why in adapter.refused.values())
    assert bool(adapter.refused) == (kind.startswith("embedding") or kind == "output head")
    assert_same(deltas_of(adapter), wanted)
    write(adapter, llama_base, tmp_path / "out", "peft")
    assert_same(judge_peft(llama_model, tmp_path / "out"), wanted)
    again = load_adapter(tmp_path / "out", llama_base)
    assert_same(deltas_of(again), wanted)
    assert {str(s): u.rank for s, u in again.updates.items()} == {
        str(s): u.rank for s, u in adapter.updates.items()
    }


GPT2 = {
    "all three shapes": ["c_attn", "c_proj", "c_fc"],  # attn.c_proj is square
    "only the square one": [r"attn.c_proj"],
    "with linear and embedding": ["c_attn", "attn.c_proj", "lm_head", "wte"],
}


@pytest.mark.parametrize("kind", GPT2)
@pytest.mark.parametrize("flag", [True, False])
def test_gpt2_conv1d(kind, flag, gpt2_model, gpt2_base, tmp_path):
    wanted = trained(gpt2_model, tmp_path / "in", target_modules=GPT2[kind], fan_in_fan_out=flag)
    # Whatever flag was saved last, the layers decide.
    path = tmp_path / "in/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "fan_in_fan_out": flag}))
    adapter = load_adapter(tmp_path / "in", gpt2_base)
    assert_same(deltas_of(adapter), wanted)
    write(adapter, gpt2_base, tmp_path / "out", "peft")
    assert_same(judge_peft(gpt2_model, tmp_path / "out"), wanted)


def test_gpt2_lora_x_keeps_the_orientation(gpt2_model, gpt2_base, tmp_path):
    layouts = dict.fromkeys(["transformer.h.0.attn.c_proj"], "transposed")
    adapter = random_adapter(gpt2_base, {"transformer.h.0.attn.c_proj": 3}, layouts=layouts)
    write(adapter, gpt2_base, tmp_path / "peft", "peft")
    assert_same(judge_peft(gpt2_model, tmp_path / "peft"), deltas_of(adapter))


@pytest.mark.parametrize("module", [UNET_LINEAR, UNET_1X1, UNET_3X3, "conv_in"])
@pytest.mark.parametrize("rslora", [True, False])
def test_unet_layers(module, rslora, sd_models, sd, tmp_path):
    wanted = trained(sd_models[0], tmp_path / "in", target_modules=[module], use_rslora=rslora)
    adapter = load_adapter(tmp_path / "in", sd)
    assert_same(deltas_of(adapter, component=False), wanted)
    write(adapter, sd, tmp_path / "out", "peft")
    assert_same(judge_peft(sd_models[0], tmp_path / "out"), wanted)


def test_a_bare_text_encoder(tmp_path):
    model = clip()
    base = open_base(save(model, tmp_path / "clip"))
    wanted = trained(model, tmp_path / "in", target_modules=["q_proj", "fc1"])
    adapter = load_adapter(tmp_path / "in", base)
    assert_same(deltas_of(adapter), wanted)
    write(adapter, base, tmp_path / "out", "peft")
    assert_same(judge_peft(model, tmp_path / "out"), wanted)


@torch.no_grad()
def test_the_forward_pass_changes_by_exactly_the_reported_update(llama_model, llama_base, tmp_path):
    trained(llama_model, tmp_path / "in", target_modules=["q_proj", "embed_tokens", "down_proj"])
    adapter = load_adapter(tmp_path / "in", llama_base)
    write(adapter, llama_base, tmp_path / "out", "peft")
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama_model), str(tmp_path / "out"))
    told = with_deltas(llama_model, deltas_of(adapter))(IDS).logits
    assert torch.allclose(loaded(IDS).logits, told, atol=1e-5)
    assert not torch.allclose(llama_model(IDS).logits, told, atol=1e-2)


def test_a_name_that_ends_another_name_is_meant_alone(tmp_path):
    # PEFT matches listed names against the end of module names, patterns too.
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return self.proj(x)

    class Net(Block):
        def __init__(self):
            super().__init__()
            self.block = Block()
            self.config = {"model_type": "custom"}

    torch.manual_seed(0)
    model = Net()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    base = open_base(tmp_path / "model.safetensors")
    one = random_adapter(base, {"proj": 2})
    write(one, base, tmp_path / "one", "peft")
    assert_same(judge_peft(model, tmp_path / "one"), deltas_of(one))
    both = random_adapter(base, {"proj": 2, "block.proj": 3})
    write(both, base, tmp_path / "both", "peft")
    assert_same(judge_peft(model, tmp_path / "both"), deltas_of(both))


def test_patterns_follow_pefts_own_rule():
    from peft.utils.other import get_pattern_key

    patterns = {"q": 1, "layers.1.q": 2, r"layers\.1\d\.q": 3, "^a.layers.2.v": 4, "x(": 0}
    patterns.pop("x(")
    for module in ("q", "a.q", "aq", "a.layers.1.q", "a.layers.11.q", "b.a.layers.2.v", "v"):
        theirs = patterns.get(get_pattern_key(patterns.keys(), module), "default")
        assert pattern_value(patterns, module, "default") == theirs


def test_what_peft_saves_whole_is_carried_or_refused_by_name(llama_model, llama_base, tmp_path):
    trained(
        llama_model, tmp_path / "in", target_modules=["q_proj"], modules_to_save=["lm_head"],
        bias="all",
    )  # fmt: skip
    path = tmp_path / "in/adapter_model.safetensors"
    inside = "base_model.model.model.layers.0.self_attn.q_proj"
    state = load_file(path)
    state["base_model.model.lm_head.weight"] += 0.5
    state |= {f"{inside}.bias": torch.ones(16), "base_model.model.score.weight": torch.ones(2, 16)}
    save_file(state, path)
    edit(tmp_path / "in", modules_to_save=["lm_head", "score"])
    adapter = load_adapter(tmp_path / "in", llama_base)
    assert adapter.family == "lora + whole"
    found = deltas_of(adapter)
    assert torch.allclose(found["lm_head"], torch.full_like(found["lm_head"], 0.5), atol=1e-6)
    assert set(adapter.refused) == {f"{inside}.bias", "base_model.model.score"}
    assert "bias" in adapter.refused[f"{inside}.bias"]
    assert "does not have" in adapter.refused["base_model.model.score"]


def test_a_bias_that_peft_saves_three_times_is_the_trained_one(llama_model, llama_base, tmp_path):
    trained(llama_model, tmp_path / "in", target_modules=["q_proj"])
    edit(tmp_path / "in", bias="all", modules_to_save=["norm"])
    path = tmp_path / "in/adapter_model.safetensors"
    norm = "base_model.model.model.norm"
    named = {f"{norm}.modules_to_save.weight": 2.0, f"{norm}.original_module.weight": 1.0}
    state = {**load_file(path), **{name: torch.full((16,), x) for name, x in named.items()}}
    save_file({**state, f"{norm}.weight": torch.full((16,), 2.0)}, path)
    adapter = load_adapter(tmp_path / "in", llama_base)
    assert torch.allclose(deltas_of(adapter)["model.norm"], torch.ones(16))
    assert len(adapter.refused) == 2
    assert "the base's own" in adapter.refused[f"{norm}.original_module.weight"]
    save_file({**state, f"{norm}.weight": torch.full((16,), 3.0)}, path)
    with pytest.raises(MalformedFile, match="they differ"):
        load_adapter(tmp_path / "in", llama_base)


def test_a_bias_on_the_factors_of_a_layer_without_one(llama_model, llama_base, tmp_path):
    trained(llama_model, tmp_path / "in", target_modules=["q_proj"])
    path = tmp_path / "in/adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    save_file({**load_file(path), key: torch.ones(16)}, path)
    assert set(load_adapter(tmp_path / "in", llama_base).refused) == {key}


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [{"r": 3}, {"r": "four"}, {"lora_alpha": None}, {"lora_alpha": float("nan")},
     {"rank_pattern": {"(": 4}}, {"rank_pattern": 5}, {"rank_pattern": {"q_proj": 1}},
     {"lora_alpha": 10**400}],
)  # fmt: skip
def test_a_config_that_does_not_fit(changes, llama_model, llama_base, tmp_path):
    trained(llama_model, tmp_path / "in", target_modules=["q_proj"])
    edit(tmp_path / "in", **changes)
    with pytest.raises(MalformedFile) as caught:
        load_adapter(tmp_path / "in", llama_base)
    assert "q_proj" in str(caught.value)
    assert caught.value.file.endswith("adapter_config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "{" * 100_000])
def test_a_config_that_is_no_json(text, llama_model, llama_base, tmp_path):
    trained(llama_model, tmp_path / "in", target_modules=["q_proj"])
    path = tmp_path / "in/adapter_config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(MalformedFile) as caught:
        load_adapter(tmp_path / "in", llama_base)
    assert caught.value.file == str(path)


def test_the_file_inside_the_folder_is_enough(llama_model, llama_base, tmp_path):
    wanted = trained(llama_model, tmp_path / "in", target_modules=["q_proj"])
    adapter = load_adapter(tmp_path / "in/adapter_model.safetensors", llama_base)
    assert_same(deltas_of(adapter), wanted)


def test_without_its_config_the_scale_is_one_and_a_note_says_so(llama_model, llama_base, tmp_path):
    wanted = trained(llama_model, tmp_path / "in", target_modules=["q_proj"], lora_alpha=4)
    (tmp_path / "in/adapter_config.json").unlink()
    adapter = load_adapter(tmp_path / "in", llama_base)
    assert_same(deltas_of(adapter), wanted)
    assert "adapter_config.json" in adapter.notes[0]


def test_a_wrong_shape_names_the_file_and_the_tensor(llama_model, llama_base, tmp_path):
    trained(llama_model, tmp_path / "in", target_modules=["q_proj"])
    path = tmp_path / "in/adapter_model.safetensors"
    state = load_file(path)
    key = next(k for k in state if k.endswith("lora_A.weight"))
    state[key] = torch.ones(4, 15)
    save_file(state, path)
    with pytest.raises(ShapeMismatch) as caught:
        load_adapter(tmp_path / "in", llama_base)
    assert caught.value.file == str(path)
    assert caught.value.tensor == key
    assert "(16, 16)" in caught.value.fix


def test_one_folder_holds_one_model(sd, tmp_path):
    adapter = random_adapter(
        sd, {f"unet.{UNET_LINEAR}": 2, "text_encoder.text_model.encoder.layers.0.mlp.fc1": 2}
    )
    with pytest.raises(BadOption, match="text_encoder"):
        write(adapter, sd, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_the_model_card_and_config_name_the_target_and_the_source(
    llama_model, llama_base, tmp_path
):
    trained(llama_model, tmp_path / "in", target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter: Adapter = load_adapter(tmp_path / "in", llama_base)
    adapter.metadata = {"modelspec.trigger_phrase": "a\nphoto of zzz"}
    write(adapter, llama_base, tmp_path / "out", "peft")
    card = (tmp_path / "out/README.md").read_text()
    front = card.split("---")[1]
    assert 'base_model: "llama"' in front
    assert "base_model_relation: adapter" in front
    assert "org/source" in card
    assert "ab" * 32 in card
    assert "a photo of zzz" in card
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "llama"
    assert config["task_type"] == "CAUSAL_LM"
    assert str(tmp_path) not in card + json.dumps(config)
    assert delta(next(iter(adapter.updates.values()))).shape == (16, 16)
