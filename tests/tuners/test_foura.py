"""FouRA as a tuner: its equation, its gate, and everything PEFT and diffusers do with it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from regraft.errors import BadData, BadOption
from regraft.tuners.foura import FouRAConfig, FouRALayer, freeze
from tests.factories import llama

TRANSFORMS = ["dct", "dft"]
KINDS = ["linear", "gpt2", "conv1", "conv3"]


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return {
        "linear": lambda: nn.Linear(12, 10),
        "gpt2": lambda: Conv1D(10, 12),
        "conv1": lambda: nn.Conv2d(12, 10, 1),
        "conv3": lambda: nn.Conv2d(12, 10, 3, stride=2, padding=1, padding_mode="circular"),
    }[kind]()


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return (
        torch.randn(2, 12, 5, 5, dtype=dtype) if "conv" in kind else torch.randn(3, 4, 12).to(dtype)
    )


def tuned(kind: str = "linear", **options: object) -> nn.Module:
    """A model of one layer, with B drawn so that the adapter does something."""
    options = {"r": 3, "alpha": 6.0, "init_weights": False, "target_modules": ["0"]} | options
    model = nn.Sequential(base(kind))
    torch.manual_seed(2)
    return peft.get_peft_model(model, FouRAConfig(**options))


def layer_of(model: nn.Module) -> FouRALayer:
    return next(m for m in model.modules() if isinstance(m, FouRALayer))


def with_mask(model: nn.Module) -> nn.Module:
    layer_of(model).foura_mask["default"].copy_(torch.tensor([1.0, 0.25, 0.0]))
    return model


def dct(n: int) -> Tensor:
    k, i = torch.arange(n)[:, None], torch.arange(n)[None]
    found = torch.cos(torch.pi * (2 * i + 1) * k / (2 * n)) * (2 / n) ** 0.5
    found[0] /= 2**0.5
    return found


def there(x: Tensor, transform: str) -> Tensor:
    return x @ dct(x.shape[-1]).mT if transform == "dct" else torch.fft.fft(x, norm="ortho")


def back(x: Tensor, transform: str) -> Tensor:
    return x @ dct(x.shape[-1]) if transform == "dct" else torch.fft.ifft(x, norm="ortho").real


def as_the_paper_says(model: nn.Module, x: Tensor, transform: str) -> Tensor:
    """Base plus s · F⁻¹(B (g ⊙ A F x)), each token or pixel transformed on its own."""
    layer = layer_of(model)
    a, b = layer.foura_A["default"], layer.foura_B["default"]
    plain = layer.base_layer(x)
    if layer.kind == "conv":
        spectrum = there(x.movedim(1, -1), transform).movedim(-1, 1)
        z = layer.base_layer._conv_forward(spectrum, a.to(spectrum.dtype), None).movedim(1, -1)
    else:
        z = there(x, transform) @ a.mT.to(there(x, transform).dtype)
    if "default" in layer.foura_gate:
        seen = torch.cat([z.real, z.imag], -1) if transform == "dft" else z
        z = z * layer.gate_values("default", seen)
    if "default" in layer.foura_mask:
        z = z * layer.foura_mask["default"]
    y = 2 * back(z @ b.mT.to(z.dtype), transform)  # s = alpha / r = 2
    return plain + (y.movedim(-1, 1) if layer.kind == "conv" else y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("gate", ["none", "soft", "hard", "frozen"])
def test_the_forward_pass_is_the_papers(kind: str, transform: str, gate: str) -> None:
    model = tuned(kind, transform=transform, gate=gate)
    if gate == "frozen":
        with_mask(model)
    if gate == "hard":  # else a new gate is open everywhere
        nn.init.normal_(layer_of(model).foura_gate["default"].out, std=9)
    x = inputs(kind)
    assert torch.allclose(model(x), as_the_paper_says(model, x, transform), atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(model(x), as_the_paper_says(model, x, transform), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("gate", ["none", "frozen"])
def test_merging_is_exact_and_can_be_undone(kind: str, transform: str, gate: str) -> None:
    model = tuned(kind, transform=transform, gate=gate)
    if gate == "frozen":
        with_mask(model)
    x, layer = inputs(kind), layer_of(model)
    before, weight = model(x), layer.weight.clone()
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(model(x), before, atol=1e-5)
    change = (layer.weight - weight).flatten(1)
    assert torch.allclose(change, layer.get_delta_weight("default").flatten(1), atol=1e-6)
    directions = (2 if gate == "frozen" else 3) * (2 if transform == "dft" else 1)
    assert torch.linalg.matrix_rank(change, atol=1e-4) == directions
    model.unmerge_adapter()
    assert torch.allclose(layer.weight, weight, atol=1e-6)
    assert torch.allclose(model.merge_and_unload()(x), before, atol=1e-5)


def test_a_new_adapter_changes_nothing() -> None:
    model = tuned(init_weights=True, gate="hard")
    x = inputs("linear")
    assert torch.equal(model(x), layer_of(model).base_layer(x))


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "gpt2", "conv3"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("gate", ["none", "soft", "frozen"])
def test_gradients(kind: str, transform: str, gate: str) -> None:
    layer = layer_of(tuned(kind, transform=transform, gate=gate, r=2)).double()
    trained = {n: p for n, p in layer.named_parameters() if n.startswith("foura_")}
    x = inputs(kind, torch.float64)[:1].requires_grad_()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(trained, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *trained.values()), fast_mode=True)


def test_a_hard_gate_has_the_gradient_of_a_soft_one() -> None:
    """Straight-through: the values are 0 and 1, the slope is the sigmoid's."""
    layer = layer_of(tuned(gate="hard"))
    gate = layer.foura_gate["default"]
    nn.init.normal_(gate.out, std=9)
    z = torch.randn(7, 6)
    g, p = layer.gate_values("default", z), gate(z)
    assert set(g.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(g, (p > 0.5).float())
    (hard,) = torch.autograd.grad(g.sum(), gate.out)
    (soft,) = torch.autograd.grad(p.sum(), gate.out)
    assert torch.equal(hard, soft)
    assert soft.abs().max() > 0


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_hard_gate_can_be_trained_shut(transform: str) -> None:
    """The paper's gate cannot move. Here a change that only does harm ends up closed."""
    model = tuned(gate="hard", transform=transform)
    layer, x = layer_of(model), inputs("linear")
    for factor in (layer.foura_A, layer.foura_B):
        factor.requires_grad_(False)
    goal = layer.base_layer(x).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = (model(x) - goal).square().mean()
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * first


# -- the gate frozen -------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["soft", "hard"])
def test_a_gate_that_sees_the_input_is_not_merged(gate: str) -> None:
    model = tuned(gate=gate)
    weight = layer_of(model).weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(BadOption, match=r"freeze\(model, batches"):
            merge()
    assert torch.equal(layer_of(model).weight, weight)
    assert not model.base_model.supports_lora_conversion()


@pytest.mark.parametrize("kind", ["linear", "conv3"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("binary", [False, True])
def test_freezing_keeps_the_mean_gate(kind: str, transform: str, binary: bool) -> None:
    model = tuned(kind, gate="soft", transform=transform).train()
    layer = layer_of(model)
    nn.init.normal_(layer.foura_gate["default"].out, std=9)
    x, more = inputs(kind), inputs(kind)[:1] * 2
    gates = [layer.gate_values("default", layer.low_rank("default", i)) for i in (x, more)]
    mean = torch.cat([g.detach().flatten(0, -2) for g in gates]).mean(dim=0)
    expected = (mean > 0.5).float() if binary else mean
    masks = freeze(model, [{"input": x}, (more,)], binary=binary)
    assert torch.allclose(masks["base_model.model.0"], expected, atol=1e-6)
    assert torch.allclose(layer.foura_mask["default"], expected, atol=1e-6)
    assert (model.peft_config["default"].gate, model.training) == ("frozen", True)
    assert not any("gate" in key for key in peft.get_peft_model_state_dict(model))
    after = model(x)
    assert torch.allclose(model.merge_and_unload()(x), after, atol=1e-5)


def test_freezing_one_adapter_leaves_another_with_the_same_config() -> None:
    config = FouRAConfig(r=2, gate="soft", target_modules=["0"], init_weights=False)
    model = peft.get_peft_model(nn.Sequential(base("linear")), config)
    model.add_adapter("second", config)
    freeze(model, [inputs("linear")])
    assert model.peft_config["second"].gate == "soft"
    model.set_adapter("second")
    with pytest.raises(BadOption, match="soft gate"):
        model.merge_adapter()


def test_freezing_says_what_is_missing() -> None:
    model = tuned(gate="hard")
    with pytest.raises(BadData, match="nothing was frozen"):
        freeze(model, [])
    assert layer_of(model).gate_of("default") == "hard"
    with model.disable_adapter(), pytest.raises(BadOption, match="no active"):
        freeze(model, [inputs("linear")])
    with pytest.raises(BadOption, match="no active"):
        freeze(tuned(gate="none"), [inputs("linear")])


@pytest.mark.parametrize(
    "options",
    [{"transform": "dwt"}, {"gate": "open"}, {"r": 0}, {"gate_threshold": 1.0}, {"gate_hidden": 0}],
)
def test_settings_without_meaning_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(BadOption):
        FouRAConfig(**options)


def test_layers_without_a_transform_are_refused() -> None:
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.LayerNorm(4)):
        with pytest.raises(BadOption):
            peft.get_peft_model(nn.Sequential(layer), FouRAConfig(target_modules=["0"]))


# -- as PEFT uses it -------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["none", "soft", "hard", "frozen"])
@pytest.mark.parametrize("cheap", [False, True])
def test_save_load_save(gate: str, cheap: bool, tmp_path) -> None:
    def new() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict(
            {"a": nn.Linear(12, 10), "b": nn.Linear(12, 10), "head": nn.Linear(2, 2)}
        )

    config = FouRAConfig(
        r=3, gate=gate, init_weights=False, target_modules=["a", "b"], modules_to_save=["head"]
    )
    model = peft.get_peft_model(new(), config)
    if gate == "frozen":
        with_mask(model)
    model.base_model.model["head"].modules_to_save["default"].weight.data.fill_(3)
    model.save_pretrained(tmp_path / "first")
    again = peft.PeftModel.from_pretrained(new(), tmp_path / "first", low_cpu_mem_usage=cheap)
    again.save_pretrained(tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert one == two, name
    said = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["transform"], said["alpha"]) == ("FOURA", "dft", 8.0)
    x = inputs("linear")
    ours, theirs = (m.base_model.model["a"](x) for m in (model, again))
    assert torch.equal(ours, theirs)
    assert (again.base_model.model["head"].weight == 3).all()


def test_several_adapters_are_switched_weighted_and_summed() -> None:
    model, x = tuned(gate="none"), inputs("linear")
    options = {"r": 2, "init_weights": False, "target_modules": ["0"]}
    model.add_adapter("second", FouRAConfig(gate="soft", transform="dct", **options))
    plain, layer = layer_of(model).base_layer(x), layer_of(model)
    first = model(x) - plain
    model.set_adapter("second")
    second = model(x) - plain
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained
    assert all(".second" in n for n in trained)
    model.base_model.set_adapter(["default", "second"])
    assert torch.allclose(model(x), plain + first + second, atol=1e-5)
    layer.set_scale("second", 0.5)
    assert torch.allclose(model(x), plain + first + 0.5 * second, atol=1e-5)
    model.delete_adapter("second")
    assert torch.allclose(model(x), plain + first, atol=1e-5)
    assert not any(".second" in name for name in layer.state_dict())


@pytest.mark.slow  # test_contract.py runs it in fewer steps
@pytest.mark.parametrize("gate", ["hard", "frozen"])
def test_it_trains_a_language_model_in_bf16_with_gradient_checkpointing(gate: str) -> None:
    """As accelerate runs it: an fp32 adapter on a bf16 base, under autocast."""
    model = llama().to(torch.bfloat16)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model = peft.get_peft_model(model, FouRAConfig(r=2, gate=gate)).train()
    tokens = torch.arange(8)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_peft_converts_a_frozen_one_to_lora() -> None:
    model, x = with_mask(tuned(gate="frozen")), inputs("linear")
    config, tensors = peft.convert_to_lora(model, rank=10)
    lora = peft.get_peft_model(nn.Sequential(base("linear")), config)
    peft.set_peft_model_state_dict(lora, tensors)
    assert torch.allclose(lora(x), model(x), atol=1e-4)


def test_it_can_be_injected() -> None:
    model = nn.Sequential(base("linear"))
    peft.inject_adapter_in_model(FouRAConfig(target_modules=["0"], gate="hard"), model)
    freeze(model, [inputs("linear")])
    assert model.peft_config["default"].gate == "frozen"
