"""SVDiff as trained: its equation, its files, and those of svdiff-pytorch."""

from __future__ import annotations

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import regraft
from regraft.adapters.update import delta
from regraft.errors import BadOption, NotAnAdapter, ShapeMismatch, SitesNotInBase, WrongBase
from regraft.tuners import SVDiffConfig, load_spectral_shifts, write_spectral_shifts
from regraft.tuners.svdiff.layer import SVDiffLayer
from tests import factories
from tests.tuners.nets import MATRICES, OTHERS, Net, fill, ids


def svdiff_layers(model):
    return {
        n.removeprefix("base_model.model."): m
        for n, m in model.named_modules()
        if isinstance(m, SVDiffLayer)
    }


def test_without_targets_every_weight_is_shifted():
    model = peft.get_peft_model(Net(), SVDiffConfig())
    found = svdiff_layers(model)
    assert set(found) == {*MATRICES, *OTHERS, "head"}
    sizes = {n: m.delta["default"].numel() for n, m in found.items()}
    assert sizes["layer_norm"] == sizes["group_norm"] == 1
    assert sizes["conv2"] == 4
    assert sizes["table"] == 12
    model.add_adapter("second", SVDiffConfig())
    assert set(svdiff_layers(model)) == set(found)


def test_all_leaves_out_shared_weights_and_those_trained_whole():
    net = Net()
    net.tied = nn.Linear(12, 16)
    net.tied.weight = net.linear.weight
    net.attention = nn.MultiheadAttention(4, 2)
    model = peft.get_peft_model(net, SVDiffConfig(modules_to_save=["head"]))
    assert set(svdiff_layers(model)) == {*MATRICES, *OTHERS} - {"linear"}
    model.add_adapter("second", SVDiffConfig(modules_to_save=["head"]))


def test_what_is_computed_late_is_the_same_in_every_mode(tmp_path):
    model = peft.get_peft_model(Net(), SVDiffConfig())
    fill(model)
    model.save_pretrained(tmp_path)
    late = peft.PeftModel.from_pretrained(Net(), tmp_path)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        late(ids())
    assert torch.equal(late(ids()), model(ids()))
    late.set_requires_grad("default")
    late(ids()).sum().backward()


@pytest.mark.parametrize("name", [*MATRICES, *OTHERS])
def test_merged_is_u_relu_of_shifted_v(name):
    model = peft.get_peft_model(Net(), SVDiffConfig(target_modules=[name]))
    layer = svdiff_layers(model)[name]
    weight = layer.get_base_layer().weight.detach().clone()
    flat = weight.reshape(1, -1) if weight.ndim == 1 else weight.reshape(weight.shape[0], -1)
    u, s, vh = torch.linalg.svd(flat.double(), full_matrices=False)
    shift = torch.linspace(-2.0, 0.5, s.numel())  # the first go below −σ
    with torch.no_grad():
        layer.delta["default"].copy_(shift)
    layer.set_scale("default", 0.8)
    layer.merge()
    expected = (u * torch.relu(s + 0.8 * shift)) @ vh
    got = layer.get_base_layer().weight.detach().reshape(flat.shape)
    assert torch.allclose(got.double(), expected, atol=1e-5)


def test_regraft_reads_the_same_change(tmp_path):
    factories.save(factories.unet(), tmp_path / "base")
    model = peft.get_peft_model(factories.unet(), SVDiffConfig())
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    found = regraft.load_adapter(tmp_path / "adapter", tmp_path / "base")
    layers = svdiff_layers(model)
    assert (found.family, found.refused) == ("svdiff", {})
    assert {s.module for s in found.updates} == set(layers)
    assert "conv_norm_out" in layers
    before = {n: m.get_base_layer().weight.detach().clone() for n, m in layers.items()}
    model.merge_adapter()
    for site, update in found.updates.items():
        merged = layers[site.module].get_base_layer().weight.detach()
        change = merged - before[site.module]
        assert torch.allclose(delta(update).reshape(change.shape), change, atol=1e-5), site


def test_gradient_in_double_precision():
    """Where no singular value is at the corner of the ReLU."""
    torch.manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(5, 4, dtype=torch.float64), full_matrices=False)
    layer = SVDiffLayer(nn.Linear(4, 5).double(), "default")
    x = torch.randn(3, 4, dtype=torch.float64)
    shift = torch.tensor([0.5, -0.1, -9.0, 0.2], dtype=torch.float64, requires_grad=True)

    def run(shift):
        return layer._through(x, u * torch.maximum(shift, -s), vh)

    assert torch.autograd.gradcheck(run, (shift,))
    assert run(shift).sum().backward() is None
    assert shift.grad[2] == 0  # ReLU is off


@settings(max_examples=20, deadline=None)
@given(st.floats(-2, 2), st.floats(-2, 2), st.booleans())
def test_adapters_add_inside_the_relu(a, b, merge):
    """Two active adapters, one combined from them, and merging them one by one are all the same."""
    model = peft.get_peft_model(Net(), SVDiffConfig(target_modules=["linear", "layer_norm"]), "one")
    model.add_adapter("two", SVDiffConfig(target_modules=["linear", "layer_norm"]))
    fill(model, "one", seed=1, size=1.0)
    fill(model, "two", seed=2, size=1.0)
    model.base_model.add_weighted_adapter(["one", "two"], [a, b], "sum")
    model.base_model.set_adapter("sum")
    expected = model(ids())
    model.base_model.set_adapter(["one", "two"])
    model.base_model.set_scale("one", a)
    model.base_model.set_scale("two", b)
    if merge:
        for layer in svdiff_layers(model).values():
            layer.merge(adapter_names=["two"])
            layer.merge(adapter_names=["one"])
    assert torch.allclose(model(ids()), expected, atol=1e-5)


def test_combining_says_what_is_wrong():
    model = peft.get_peft_model(Net(), SVDiffConfig(target_modules=["linear"]), "one")
    combine = model.base_model.add_weighted_adapter
    with pytest.raises(BadOption, match="two is not loaded"):
        combine(["one", "two"], [1, 1], "new")
    with pytest.raises(BadOption, match="2 weights"):
        combine(["one"], [1, 1], "new")
    with pytest.raises(BadOption, match="already"):
        combine(["one"], [1], "one")
    model.add_adapter("two", SVDiffConfig(target_modules=["conv1"]))
    with pytest.raises(BadOption, match="different modules"):
        combine(["one", "two"], [1, 1], "new")


def test_another_base_is_refused_unless_asked_for(tmp_path):
    model = peft.get_peft_model(Net(), SVDiffConfig())
    fill(model)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 9
    with pytest.raises(WrongBase, match="check_base=False"):
        peft.PeftModel.from_pretrained(Net().bfloat16(), tmp_path)
    config = SVDiffConfig.from_pretrained(tmp_path)
    config.check_base = False
    near = peft.PeftModel.from_pretrained(Net().bfloat16(), tmp_path, config=config)
    out = model(ids()).detach()
    assert float((near(ids()) - out).detach().norm() / out.norm()) < 0.05


@pytest.mark.parametrize("part", ["unet", "text"])
def test_files_of_svdiff_pytorch(part, tmp_path):
    """Read, written again: the same bytes; and Regraft's own reader finds the same change."""
    make, name, front = {
        "unet": (factories.unet, "spectral_shifts.safetensors", ""),
        "text": (factories.clip, "spectral_shifts_te.safetensors", "text_model."),
    }[part]
    generator = torch.Generator().manual_seed(0)
    shifts = {}
    for key, weight in make().state_dict().items():
        module, _, kind = key.rpartition(".")
        if kind == "weight":
            size = 1 if weight.ndim == 1 else min(weight.shape[0], weight[0].numel())
            shifts[f"{front}{module.removeprefix(front)}.delta"] = 0.1 * torch.randn(
                size, generator=generator
            )
    (tmp_path / "a").mkdir()
    save_file(shifts, tmp_path / "a" / name)
    model = make()
    load_spectral_shifts(model, tmp_path / "a" / name)
    assert len(svdiff_layers(model)) == len(shifts)
    (tmp_path / "b").mkdir()
    write_spectral_shifts(model, tmp_path / "b" / name)
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    again = load_file(tmp_path / "b" / name)
    assert again.keys() == shifts.keys()
    assert all(torch.equal(again[k], shifts[k]) for k in shifts)
    plain = dict(make().named_parameters())
    for module, layer in svdiff_layers(model).items():
        layer.merge()
        weight = plain[f"{module}.weight"].detach()
        flat = weight.reshape(1 if weight.ndim == 1 else weight.shape[0], -1)
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
        shift = next(v for k, v in shifts.items() if k.removeprefix(front) == f"{module}.delta")
        expected = (u * torch.relu(s + shift)) @ vh
        got = layer.get_base_layer().weight.detach().reshape(flat.shape)
        assert torch.allclose(got, expected, atol=1e-5)


def test_wrong_files_say_so(tmp_path):
    def load(**tensors):
        save_file(tensors, tmp_path / "f.safetensors")
        load_spectral_shifts(Net(), tmp_path / "f.safetensors")

    with pytest.raises(NotAnAdapter, match="other than spectral"):
        load(**{"linear.weight": torch.zeros(2)})
    with pytest.raises(SitesNotInBase, match="no module mystery"):
        load(**{"mystery.delta": torch.zeros(2)})
    with pytest.raises(ShapeMismatch, match="3 shifts for 12"):
        load(**{"linear.delta": torch.zeros(3)})
    with pytest.raises(BadOption, match="called default"):
        write_spectral_shifts(Net(), tmp_path / "g.safetensors")
