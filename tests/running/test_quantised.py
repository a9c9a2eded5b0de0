"""Quantised models that run: the numbers they compute with are those that their files mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

from regraft.adapters import Adapter, LowRank, Site
from regraft.bases.quantised.bits_and_bytes import unpacked
from regraft.errors import BadOption, CannotRun
from regraft.running.applied import applied
from regraft.running.model import Language
from regraft.running.quantised import FORMS, quantise, settle, storage_of

#: Inputs of layers: whole blocks of 64, less than one, and blocks that cross rows.
WIDTHS = (64, 128, 24, 32, 96)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = {f"from{n}": nn.Linear(n, 48, bias=n != 24) for n in WIDTHS}
    return nn.ModuleDict(layers).to(dtype).requires_grad_(False).eval()


def meant(weight: torch.Tensor, form: str) -> torch.Tensor:
    """What a quantised weight stands for, by the definition of NF4 and of FP4."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type=form, compress_statistics=True)
    return unpacked(codes, state)


@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("training", [False, True])
def test_four_bits_compute_with_the_numbers_of_the_format_on_a_cpu(form, training):
    plain, model = net(), net().train(training)
    storage = quantise(model, form)
    assert storage.forms == {FORMS[form]: len(WIDTHS)}
    assert storage.group is None
    assert storage_of(model) == storage
    for n in WIDTHS:
        layer, before = model[f"from{n}"], plain[f"from{n}"]
        weight = meant(before.weight, form)
        for gradients in (False, True, False):  # a run without gradients changes nothing after it
            x = torch.randn(3, n, requires_grad=gradients)
            wanted = functional.linear(x, weight, before.bias)
            torch.testing.assert_close(layer(x), wanted, atol=1e-6, rtol=1e-5, msg=f"{n}")


def test_blocks_that_cross_rows_are_held_unpacked():
    model = net()
    storage = quantise(model, "nf4")
    held = [n for n in WIDTHS if type(model[f"from{n}"].weight) is nn.Parameter]
    assert storage.held == len(held)
    assert set(held) <= {24, 32, 96}  # of a library that unpacks them, none
    assert all(p.requires_grad is False for p in model.parameters())


@pytest.mark.parametrize("form", ["int8", "int4", "int3", "int2"])
def test_integers_are_in_groups_with_a_zero_point(form):
    plain, model = net(), net()
    storage = quantise(model, form, group=32)
    assert storage.forms == {FORMS[form]: 4}
    assert storage.group == 32
    assert storage.held == 0
    assert type(model["from24"].weight) is nn.Parameter  # not whole groups: as it was
    for n in (64, 128, 32, 96):
        weight, before = model[f"from{n}"].weight, plain[f"from{n}"].weight
        groups = before.unflatten(1, (-1, 32))
        assert weight.scale.shape == weight.zero_point.shape == groups.shape[:2]
        found = weight.dequantize()
        step = (groups.amax(dim=2).clamp(min=0) - groups.amin(dim=2).clamp(max=0)) / (
            2 ** int(form[3:]) - 1
        )
        wide = step.repeat_interleave(32, dim=1)
        assert ((found - before).abs() <= wide * 1.01).all()
        x = torch.randn(3, n)
        wanted = functional.linear(x, found, plain[f"from{n}"].bias)
        torch.testing.assert_close(model[f"from{n}"](x), wanted)


def test_bf16_stays_bf16():
    for form in ("nf4", "int4"):
        model = net(torch.bfloat16)
        quantise(model, form)
        for n in WIDTHS:
            found = model[f"from{n}"](torch.randn(2, n, dtype=torch.bfloat16))
            assert found.dtype == torch.bfloat16, (form, n)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(BadOption, match="no form"):
        quantise(net(), "int5")
    with pytest.raises(BadOption, match=r"groups of 1000"):
        quantise(net(), "int4", group=1000)
    for group in (0, -32):
        with pytest.raises(BadOption, match="Groups of"):
            quantise(net(), "int4", group=group)
    for form in ("nf4", "int4"):
        with pytest.raises(BadOption, match="fp64"):
            quantise(net().double(), form)
    model = net()
    quantise(model, "int4")
    with pytest.raises(BadOption, match="already"):
        quantise(model, "nf4")
    with pytest.raises(BadOption, match="no linear layer"):
        quantise(nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)}), "nf4")


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_held_layer_takes_what_bitsandbytes_layer_takes(dtype, computed):
    """transformers computes in fp32 unless told otherwise, whatever the model is in."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(96, 8, compute_dtype=computed, quant_type="nf4")
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    layer.bias = nn.Parameter(torch.ones(8, dtype=dtype))
    model = nn.ModuleDict({"layer": layer})
    model.dtype = dtype
    settle(model)
    x = torch.randn(2, 96, dtype=dtype)
    wanted = functional.linear(x.float(), meant(weight, "nf4").float(), torch.ones(8))
    found = model["layer"](x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, atol=0.3, rtol=0.03)


def test_layers_that_are_named_stay_as_they_are():
    model = net()
    head = model["from128"]
    quantise(model, "nf4", besides=[head])
    assert model["from128"] is head
    assert type(head.weight) is nn.Parameter
    assert head.weight.is_floating_point()


def test_an_ordinary_model_is_left_alone():
    model = net()
    assert not storage_of(model)
    before = dict(model.named_modules())
    settle(model)
    assert dict(model.named_modules()) == before


def test_a_torchao_model_saved_in_fp32_runs_in_bf16_with_its_zero_points_as_they_were():
    model = net()
    quantise(model, "int4")
    weight = model["from64"].weight
    wanted = weight.dequantize().bfloat16()
    model.dtype = torch.bfloat16
    settle(model)
    found = model["from64"].weight
    assert found.dequantize().equal(wanted)
    assert found.scale.equal(weight.scale)
    assert found.zero_point.equal(weight.zero_point)


@pytest.mark.parametrize("form", ["nf4", "int4"])
def test_an_adapter_is_not_added_to_a_weight_that_is_quantised(form):
    model = net()
    quantise(model, form)
    update = LowRank(torch.ones(48, 1), torch.ones(1, 128), 1.0, (48, 128))
    language = Language("base", model, None, torch.device("cpu"))
    with (
        pytest.raises(CannotRun, match="is quantised"),
        applied(language, Adapter({Site("", "from128"): update})),
    ):
        pass
