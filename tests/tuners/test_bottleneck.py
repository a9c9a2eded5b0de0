"""Bottleneck adapters as a tuner: where they sit, what they compute, and that they never merge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from regraft.errors import BadOption, MalformedFile
from regraft.tuners.bottleneck import (
    BottleneckConfig,
    BottleneckLayer,
    bottlenecks,
    from_tensors,
    to_tensors,
)
from tests.factories import gpt2, llama, unet

POSITIONS = ["houlsby", "pfeiffer", "parallel"]
_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**_SMALL)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    gated = "gated-gelu"
    config = transformers.T5Config(**sizes, vocab_size=40, feed_forward_proj=gated)
    return transformers.T5ForConditionalGeneration(config).eval()


def tokens() -> Tensor:
    return torch.arange(2, 10)[None]


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    kind = model.config.model_type
    more = {"decoder_input_ids": tokens()} if kind == "t5" else {}
    return model(tokens(), **more)[0]


def tuned(base: nn.Module | None = None, **options: object) -> nn.Module:
    options = {"width": 3, "init_weights": False} | options
    base = llama() if base is None else base
    torch.manual_seed(1)
    return peft.get_peft_model(base, BottleneckConfig(**options))


# -- where they sit --------------------------------------------------------------------------------

SITES = {
    (llama, "houlsby"): {"model.layers.N.self_attn.o_proj", "model.layers.N.mlp.down_proj"},
    (llama, "pfeiffer"): {"model.layers.N.mlp.down_proj"},
    (llama, "parallel"): {"model.layers.N.mlp"},
    (gpt2, "houlsby"): {"transformer.h.N.attn.c_proj", "transformer.h.N.mlp.c_proj"},
    (gpt2, "pfeiffer"): {"transformer.h.N.mlp.c_proj"},
    (gpt2, "parallel"): {"transformer.h.N.mlp"},
    (bert, "houlsby"): {"encoder.layer.N.attention.output.dense", "encoder.layer.N.output.dense"},
    (bert, "pfeiffer"): {"encoder.layer.N.output.dense"},
    (t5, "houlsby"): {
        "encoder.block.N.layer.0.SelfAttention.o",
        "encoder.block.N.layer.1.DenseReluDense.wo",
        "decoder.block.N.layer.0.SelfAttention.o",
        "decoder.block.N.layer.1.EncDecAttention.o",
        "decoder.block.N.layer.2.DenseReluDense.wo",
    },
    (t5, "pfeiffer"): {
        "encoder.block.N.layer.1.DenseReluDense.wo",
        "decoder.block.N.layer.2.DenseReluDense.wo",
    },
    (t5, "parallel"): {
        "encoder.block.N.layer.1.DenseReluDense",
        "decoder.block.N.layer.2.DenseReluDense",
    },
}


@pytest.mark.parametrize(("base", "position"), SITES)
def test_they_sit_where_the_papers_put_them(base: Callable[[], nn.Module], position: str) -> None:
    plain = base()
    before = run(plain)
    model = tuned(plain, position=position)
    found = [re.sub(r"\.\d+\.", ".N.", module, count=1) for module in bottlenecks(model)]
    layers = {llama: 12, gpt2: 2, bert: 2, t5: 2}[base]
    assert set(found) == SITES[base, position]
    assert len(found) == layers * len(SITES[base, position])
    assert not torch.allclose(run(model), before, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(run(model), before)
    assert torch.equal(run(model.unload()), before)


@pytest.mark.parametrize(
    ("position", "ends"),
    [
        ("houlsby", {"attn1.to_out.0", "attn2.to_out.0", "ff.net.2"}),
        ("pfeiffer", {"ff.net.2"}),
        ("parallel", {"ff"}),
    ],
)
def test_they_sit_in_a_unet_as_in_a_language_model(position: str, ends: set[str]) -> None:
    model = unet()
    blocks = {n for n, m in model.named_modules() if type(m).__name__ == "BasicTransformerBlock"}
    model.add_adapter(BottleneckConfig(position=position))
    assert set(bottlenecks(model)) == {f"{block}.{end}" for block in blocks for end in ends}


def test_an_unknown_place_is_asked_for() -> None:
    with pytest.raises(BadOption, match="target_modules"):
        tuned(bert(), position="parallel")
    with pytest.raises(BadOption, match="target_modules"):
        tuned(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("block", [nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.ReLU())])
def test_modules_of_unknown_size_are_refused(block: nn.Module) -> None:
    with pytest.raises(BadOption, match="cannot sit"):
        tuned(nn.ModuleDict({"a": block}), target_modules=["a"])


@pytest.mark.parametrize("position", POSITIONS)
def test_a_new_adapter_changes_nothing(position: str) -> None:
    base = gpt2()
    before = run(base)
    assert torch.equal(run(tuned(base, position=position, init_weights=True, norm=True)), before)


# -- what they compute -----------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["houlsby", "parallel"])
@pytest.mark.parametrize("activation", ["swish", "relu", "gelu"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_equation(position: str, activation: str, norm: bool) -> None:
    """h + s (W_up f(W_down h + b) + b), written out; and the adapter as data says the same."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    model = tuned(
        nn.ModuleDict({"ff": block}), position=position, activation=activation, norm=norm,
        scale=1.5, target_modules=["ff"],
    )  # fmt: skip
    layer = model.base_model.model["ff"]
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 8)
    y = layer.base_layer(x)
    h = y if position == "houlsby" else x
    p = {n.split(".")[0] + "." + n.split(".")[-1]: v for n, v in layer.named_parameters()}
    inner = h
    if norm:
        inner = (h - h.mean(-1, keepdim=True)) / (
            h.var(-1, keepdim=True, correction=0) + 1e-5
        ).sqrt()
        inner = inner * p["bottleneck_norm.weight"] + p["bottleneck_norm.bias"]
    inner = inner @ p["bottleneck_down.weight"].mT + p["bottleneck_down.bias"]
    inner = {
        "swish": inner * inner.sigmoid(),
        "relu": inner.clamp(min=0),
        "gelu": inner * 0.5 * (1 + torch.erf(inner / 2**0.5)),
    }[activation]
    added = 1.5 * (inner @ p["bottleneck_up.weight"].mT + p["bottleneck_up.bias"])
    assert torch.allclose(layer(x), y + added, atol=1e-4)
    assert torch.allclose(bottlenecks(model)["ff"](h), added, atol=1e-4)


@pytest.mark.parametrize(
    ("position", "usual"),
    [
        ("houlsby", ("swish", 4, 1.0)),
        ("pfeiffer", ("relu", 4, 1.0)),
        ("parallel", ("relu", 32, 4.0)),
    ],
)
def test_the_usual_settings_are_the_papers(position: str, usual: tuple[str, int, float]) -> None:
    config = BottleneckConfig(position=position)
    assert (config.activation, config.width_of(64), config.scale) == usual
    assert config.width_of(8) >= 1


@pytest.mark.parametrize(
    "options",
    [
        {"position": "above"}, {"activation": "sine"}, {"width": 0}, {"reduction": -1.0},
        {"width": 4, "reduction": 2.0},
    ],
)  # fmt: skip
def test_settings_without_meaning_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(BadOption):
        BottleneckConfig(**options)


@pytest.mark.parametrize("position", ["houlsby", "parallel"])
@pytest.mark.parametrize("activation", ["swish", "gelu"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients(position: str, activation: str, norm: bool) -> None:
    model = tuned(
        nn.ModuleDict({"a": nn.Linear(6, 6)}), position=position, activation=activation,
        norm=norm, target_modules=["a"],
    )  # fmt: skip
    layer = model.base_model.model["a"].double()
    trained = {n: p for n, p in layer.named_parameters() if n.startswith("bottleneck_")}
    assert all(p.requires_grad for p in trained.values())
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(trained, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *trained.values()))


# -- merging ---------------------------------------------------------------------------------------


def test_merging_is_refused_with_the_reason() -> None:
    model = tuned()
    before = run(model)
    layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer))
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(BadOption, match="not linear"):
            merge()
    assert torch.equal(run(model), before)
    assert not model.base_model.supports_lora_conversion()


# -- as PEFT and diffusers use it ------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cheap", [False, True])
def test_save_load_save(position: str, norm: bool, cheap: bool, tmp_path) -> None:
    model = tuned(position=position, norm=norm, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "first")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "first", low_cpu_mem_usage=cheap)
    again.save_pretrained(tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert one == two, name
    assert torch.equal(run(again), run(model))
    # and as data, with no model
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "BOTTLENECK"
    read, live = from_tensors(tensors, settings), bottlenecks(model)
    assert read.keys() == live.keys()
    h = torch.randn(4, 16)
    assert all(torch.equal(read[m](h), live[m](h)) for m in live)
    written = to_tensors(read)
    assert written.keys() == {k for k in tensors if "bottleneck_" in k}
    assert all(torch.equal(written[k], tensors[k]) for k in written)


def test_a_file_that_is_not_whole_is_an_error() -> None:
    model = tuned(width=2)
    tensors = dict(peft.get_peft_model_state_dict(model))
    settings = model.peft_config["default"].to_dict()
    with pytest.raises(MalformedFile, match="scale"):
        from_tensors(tensors, settings | {"scale": None})
    del tensors[next(k for k in tensors if k.endswith("up.bias"))]
    with pytest.raises(MalformedFile, match="not whole"):
        from_tensors(tensors, settings)


def test_several_adapters_are_switched_and_summed() -> None:
    torch.manual_seed(0)
    model = tuned(nn.ModuleDict({"a": nn.Linear(6, 6)}), target_modules=["a"])
    options = {"target_modules": ["a"], "init_weights": False, "width": 2}
    model.add_adapter("second", BottleneckConfig(position="parallel", **options))
    layer, x = model.base_model.model["a"], torch.randn(4, 6)
    plain, first = layer.base_layer(x), layer(x) - layer.base_layer(x)
    model.set_adapter("second")
    second = layer(x) - plain
    trained = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert trained
    assert all(".second." in n for n in trained)
    model.base_model.set_adapter(["default", "second"])
    assert torch.allclose(layer(x), plain + first + second, atol=1e-6)
    layer.set_scale("second", 0.5)
    assert torch.allclose(layer(x), plain + first + 0.5 * second, atol=1e-6)
    model.delete_adapter("second")
    assert torch.allclose(layer(x), plain + first, atol=1e-6)
    assert bottlenecks(model, "second") == {}


@pytest.mark.parametrize("position", POSITIONS)
def test_it_trains_a_language_model_in_bf16_with_gradient_checkpointing(position: str) -> None:
    """As accelerate runs it: fp32 adapters on a bf16 base, under autocast."""
    base = gpt2().to(torch.bfloat16)
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    model = tuned(base, position=position, init_weights=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("position", "targets"), [("houlsby", ["to_out.0", "net.2"]), ("parallel", ["ff"])]
)
def test_diffusers_adds_switches_and_saves_them(
    position: str, targets: list[str], tmp_path
) -> None:
    model = unet()
    inputs = (torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 16))
    plain = model(*inputs).sample
    options = {"position": position, "width": 3, "init_weights": False, "target_modules": targets}
    model.add_adapter(BottleneckConfig(**options), "style")
    full = model(*inputs).sample
    assert not torch.allclose(full, plain, atol=1e-4)
    model.set_adapters(["style"], [0.0])
    assert torch.allclose(model(*inputs).sample, plain, atol=1e-5)
    model.set_adapters(["style"], [1.0])
    with pytest.raises(BadOption, match="not linear"):
        model.fuse_lora()
    assert torch.equal(model(*inputs).sample, full)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    tensors = load_file(next(tmp_path.iterdir()))
    again = unet()
    again.add_adapter(BottleneckConfig(**options))
    result = peft.set_peft_model_state_dict(again, tensors)
    assert not result.unexpected_keys
    assert torch.equal(again(*inputs).sample, full)
