"""What PEFT and its users ask of any tuner that changes one weight."""

from __future__ import annotations

import json
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn

from regraft.errors import BadOption, MissingDependency, NonFiniteTensor
from regraft.tuners import LoraXConfig, SVDiffConfig, register
from regraft.tuners.layer import DeltaLayer
from tests.tuners.nets import MATRICES, OTHERS, Net, fill, ids

CONFIGS = {
    "lora-x": lambda **k: LoraXConfig(r=4, **{"target_modules": MATRICES, **k}),
    "lora-x full": lambda **k: LoraXConfig(r=3, core="full", **{"target_modules": MATRICES, **k}),
    "lora-x energy": lambda **k: LoraXConfig(r=0.9, **{"target_modules": MATRICES, **k}),
    "lora-x unstored": lambda **k: LoraXConfig(
        r=4, store_bases=False, **{"target_modules": MATRICES, **k}
    ),
    "svdiff": lambda **k: SVDiffConfig(**{"target_modules": MATRICES + OTHERS, **k}),
}
every = pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS.keys())


def close(a, b, tolerance=1e-5):
    return float((a - b).detach().abs().max()) <= tolerance


@every
def test_several_adapters(make, tmp_path):
    model = peft.get_peft_model(Net(), make(), adapter_name="one")
    fill(model, "one", seed=1)
    one = model(ids())
    model.add_adapter("two", make())
    fill(model, "two", seed=2)
    assert torch.equal(model(ids()), one)
    model.set_adapter("two")
    two = model(ids())
    assert not close(one, two, 1e-2)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"two"}
    model.base_model.set_adapter(["one", "two"])
    both = model(ids())
    model.merge_adapter(["one"])
    model.merge_adapter(["two"])
    assert close(model(ids()), both)
    model.unmerge_adapter()
    assert torch.equal(model(ids()), both)
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    model.delete_adapter("two")
    assert close(model(ids()), one)
    model.load_adapter(tmp_path / "two", "back")
    model.set_adapter("back")
    assert close(model(ids()), two)


@every
def test_strength(make):
    model = peft.get_peft_model(Net(), make())
    fill(model)
    full, plain = model(ids()), Net()(ids())
    model.base_model.set_scale("default", 0.0)
    assert close(model(ids()), plain, 1e-6)
    model.base_model.set_scale("default", 0.5)
    half = model(ids())
    assert not close(half, full, 1e-3)
    model.merge_adapter()
    assert close(model(ids()), half)
    model.base_model.set_scale("default", 1.0)  # what was merged at one half comes out as one half
    model.unmerge_adapter()
    assert close(model(ids()), full)
    layer = next(m for m in model.modules() if isinstance(m, DeltaLayer))
    layer.scale_layer(0.5)
    layer.scale_layer(0.5)
    layer.unscale_layer(0.5)
    assert layer.scaling == {"default": 0.5}
    layer.unscale_layer()
    assert layer.scaling == {"default": 1.0}


@every
def test_autocast_and_half_precision_bases(make):
    model = peft.get_peft_model(Net(), make())
    fill(model)
    out = model(ids())
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(ids())
    assert close(cast, out, 0.05 * float(out.detach().abs().max()))
    half = peft.get_peft_model(Net().bfloat16(), make())
    fill(half)
    trained = [p for p in half.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    result = half(ids())
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trained)
    half.merge_adapter()
    assert close(half(ids()), result, 0.1 * float(result.detach().abs().max()))


@every
def test_conversion_to_lora(make, tmp_path):
    model = peft.get_peft_model(Net(), make(target_modules=["linear", "transposed"]))
    fill(model)
    out = model(ids())
    peft.save_as_lora(tmp_path, model, rank=1.0)
    lora = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert close(lora(ids()), out)
    conv = peft.get_peft_model(Net(), make(target_modules=["conv2"]))
    with pytest.raises(TypeError, match="not support LoRA conversion"):
        peft.convert_to_lora(conv, rank=2)


@every
def test_targets_and_exclusions(make):
    model = peft.inject_adapter_in_model(
        make(target_modules=".*(conv.|linear)", exclude_modules=["conv1"]), Net()
    )
    changed = {n for n, m in model.named_modules() if isinstance(m, DeltaLayer)}
    assert changed == {"conv2", "linear"}
    with pytest.raises(BadOption, match="is a Net"):
        peft.get_peft_model(nn.ModuleDict({"inside": Net()}), make(target_modules=["inside"]))


@every
def test_a_merge_that_is_not_finite_leaves_the_weight(make):
    model = peft.get_peft_model(Net(), make(target_modules=["linear"]))
    fill(model)
    layer = model.base_model.model.linear
    with torch.no_grad():
        next(p for n, p in layer.named_parameters() if n.endswith(".default"))[0] = torch.inf
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(NonFiniteTensor):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


@every
def test_a_merged_weight_is_not_taken_for_the_base(make, tmp_path):
    model = peft.get_peft_model(Net(), make())
    fill(model)
    out = model(ids())
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    model.load_adapter(tmp_path, "same")
    model.set_adapter("same")  # unmerges what is merged
    assert torch.equal(model(ids()), out)


@every
def test_a_base_cast_while_merged_stays_cast(make):
    model = peft.get_peft_model(Net(), make(target_modules=["linear"]))
    fill(model)
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    weight = model.base_model.model.linear.get_base_layer().weight
    assert torch.equal(weight, Net().linear.weight.bfloat16())


def test_a_config_may_be_used_for_several_models(tmp_path):
    """Each notes its own base's weights and, where none are given, its own modules."""
    config = SVDiffConfig()
    one = peft.get_peft_model(Net(), config)
    other = nn.Sequential(nn.Linear(4, 4))
    two = peft.get_peft_model(other, config)
    assert config.target_modules is None
    assert config.base_hashes == {}
    assert set(two.peft_config["default"].base_hashes) == {"0"}
    one.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(Net(), tmp_path)


def test_layers_that_share_a_weight_are_not_merged():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight = base[0].weight
    before = base[0].weight.clone()
    model = peft.get_peft_model(base, LoraXConfig(r=2, target_modules=["0", "1"]))
    fill(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(BadOption, match="share one weight"):
            merge()
    assert torch.equal(base[0].get_base_layer().weight, before)


def test_weights_of_other_quantisers_are_not_taken_for_plain_ones():
    quanto = pytest.importorskip("optimum.quanto")
    base = nn.Sequential(nn.Linear(8, 8))
    quanto.quantize(base, weights=quanto.qint8)
    quanto.freeze(base)
    with pytest.raises(BadOption, match="does not change"):
        peft.get_peft_model(base, LoraXConfig(r=2, target_modules=["0"]))


def test_registering_twice_changes_nothing_and_peft_is_as_it_was():
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register("svdiff", SVDiffConfig, before["SVDIFF"], "delta")
    assert before == PEFT_TYPE_TO_TUNER_MAPPING
    assert "SVDIFF" not in peft.PeftType.__members__
    assert SVDiffConfig().peft_type.value == "SVDIFF"
    assert json.dumps(SVDiffConfig().peft_type) == '"SVDIFF"'
    with pytest.raises(MissingDependency, match="of its own"):
        register("lora", SVDiffConfig, before["SVDIFF"], "delta")


def test_without_peft_the_message_says_what_to_install():
    code = "import sys; sys.modules['peft'] = None\nimport regraft.tuners"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingDependency" in done.stderr
    assert "regraft[demo]" in done.stderr
