"""QA-LoRA: its equation, what it merges into, and what its files say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

from regraft.errors import BadOption, QuantisedWeight
from regraft.tuners import QALoraConfig, load_onto
from tests.tuners.nets import fill, same_folders


class Stack(nn.Module):
    """Two linear layers, 64 → 24 → 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 24), nn.Linear(24, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def quantised(bits: int = 4, group: int = 8) -> Stack:
    torchao = pytest.importorskip("torchao.quantization")
    model = Stack()
    config = torchao.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=torchao.PerGroup(group),
        mapping_type=torchao.MappingType.ASYMMETRIC,
    )
    torchao.quantize_(model, config)
    return model


def adapted(model: nn.Module, **options):
    config = QALoraConfig(
        **{"r": 3, "lora_alpha": 6, "qalora_group_size": 8, "target_modules": ["first", "second"]}
        | options
    )
    made = peft.get_peft_model(model, config)
    fill(made)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    return made.eval()


X = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1))
POOLED = {"sum": 1.0, "mean": 1 / 8, "peft": 64 / 64}
BASES = [Stack, quantised]


def test_a_new_adapter_changes_nothing_and_is_what_is_trained():
    model = Stack()
    before = model(X)
    made = peft.get_peft_model(model, QALoraConfig(r=3, target_modules=["first"]))
    assert made(X).equal(before)
    trained = {n: tuple(p.shape) for n, p in made.named_parameters() if p.requires_grad}
    assert sorted(trained.values()) == [(3, 2), (24, 3)]  # groups of 32 by itself


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pool", POOLED)
def test_the_output_is_that_of_the_equation(base, pool):
    plain = base()
    made = adapted(base(), qalora_pool=pool, target_modules=["first"])
    layer = made.base_model.model.first
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wide = torch.kron(a, torch.ones(1, 8))  # A E
    added = X @ (POOLED[pool] * 6 / 3 * b @ wide).T
    torch.testing.assert_close(layer(X), plain.first(X) + added, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 6 / 3 * POOLED[pool] * b @ wide)


def test_peft_pools_as_the_pool_that_is_called_after_it():
    from peft.tuners.lora.variants import QALoraLinearVariant

    made = adapted(Stack(), qalora_pool="peft", target_modules=["first"], qalora_group_size=4)
    layer = made.base_model.model.first
    layer.lora_dropout, layer.in_features = {"default": nn.Identity()}, 64
    layer.qalora_group_size, layer.scaling = {"default": 4}, {"default": 2.0}
    theirs = QALoraLinearVariant.forward(layer, "default", X, layer.base_layer(X))
    layer.scaling = {"default": 1.0}
    torch.testing.assert_close(layer(X), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("length", [8, 24])
def test_merging_moves_the_zero_points_and_nothing_else(bits, length):
    made = adapted(quantised(bits), qalora_group_size=length, target_modules=["second"])
    layer = made.base_model.model.second
    before = layer.base_layer.weight
    with torch.no_grad():
        wanted = made(X)
    merged = made.merge_and_unload()
    after = merged.second.weight
    assert after.qdata.equal(before.qdata)
    assert after.scale.equal(before.scale)
    assert after.zero_point.dtype == torch.float32
    torch.testing.assert_close(merged(X), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_unmerging_puts_everything_back(base):
    made = adapted(base())
    with torch.no_grad():
        wanted, bare = made(X), base()(X)
        made.merge_adapter()
        torch.testing.assert_close(made(X), wanted, atol=1e-5, rtol=1e-5)
        made.unmerge_adapter()
        assert made(X).equal(wanted)
        with made.disable_adapter():
            assert made(X).equal(bare)


def test_two_adapters_add_up_merged_or_not():
    made = adapted(quantised())
    made.add_adapter("other", QALoraConfig(r=2, qalora_group_size=24, target_modules=["second"]))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad or parameter.shape == (2, 1):
                parameter.normal_(0, 0.2)
        nn.init.normal_(made.base_model.model.second.lora_B["other"].weight)
        made.base_model.set_adapter(["default", "other"])
        both = made(X)
        layer = made.base_model.model.second
        parts = [layer.get_delta_weight(n) for n in ("default", "other")]
        torch.testing.assert_close(layer._change(layer.scaling), sum(parts))
        made.merge_adapter()
        torch.testing.assert_close(made(X), both, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", POOLED)
def test_gradients(pool):
    made = adapted(Stack().double(), qalora_pool=pool).double()
    layer = made.base_model.model.second
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)

    def out(x, a, b):
        names = {"lora_A.default.weight": a, "lora_B.default.weight": b}
        return torch.func.functional_call(layer, names, (x,))

    assert torch.autograd.gradcheck(out, (x, a, b))


def test_gradients_reach_the_adapter_through_a_quantised_base():
    made = adapted(quantised()).train()
    made(X).square().mean().backward()
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("base", BASES)
def test_saved_loaded_and_saved_again_is_the_same(base, tmp_path):
    made = adapted(base())
    made.save_pretrained(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    assert loaded(X).equal(made(X))
    loaded.save_pretrained(tmp_path / "b")
    assert same_folders(tmp_path / "a", tmp_path / "b")
    bare = base()
    load_onto(bare, tmp_path / "a")
    assert bare.eval()(X).equal(made(X))


def test_its_tensors_are_called_as_pefts(tmp_path):
    from safetensors import safe_open

    adapted(Stack()).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
    front = "base_model.model."
    assert shapes == {
        f"{front}first.lora_A.weight": [3, 8],
        f"{front}first.lora_B.weight": [24, 3],
        f"{front}second.lora_A.weight": [3, 3],
        f"{front}second.lora_B.weight": [32, 3],
    }


@pytest.mark.parametrize("pool", POOLED)
def test_what_is_read_of_its_file_is_what_it_does(pool, tmp_path):
    from safetensors.torch import save_file

    from regraft.adapters import Site, delta
    from regraft.dialects import load_adapter

    made = adapted(Stack(), qalora_pool=pool)
    made.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(Stack().state_dict(), tmp_path / "base" / "model.safetensors")
    read = load_adapter(tmp_path / "adapter", tmp_path / "base")
    assert read.family == "qa-lora"
    for name in ("first", "second"):
        layer = getattr(made.base_model.model, name)
        found = delta(read.updates[Site("", name)])
        torch.testing.assert_close(found, layer.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"qalora_group_size": 7}, "do not divide"),
        ({"qalora_group_size": 4}, "not whole groups"),
    ],
)
def test_groups_that_do_not_fit_are_refused(options, said):
    with pytest.raises(BadOption, match=said):
        adapted(quantised(), **options)


@pytest.mark.parametrize("options", [{"qalora_pool": "max"}, {"r": 0}, {"use_qalora": False}])
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(BadOption):
        QALoraConfig(**options)


def test_the_group_of_a_quantised_base_is_taken_over():
    made = adapted(quantised(), qalora_group_size=None, target_modules=["second"])
    assert made.base_model.model.second.groups == {"default": 8}


def test_other_families_do_not_merge_into_a_quantised_base():
    from regraft.tuners import LoraXConfig

    made = peft.get_peft_model(quantised(), LoraXConfig(r=4, target_modules=["first"]))
    fill(made)
    with pytest.raises(QuantisedWeight, match="rounded away"):
        made.merge_adapter()
