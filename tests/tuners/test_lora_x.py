"""LoRA-X as trained: its equation, its files, and what Regraft reads of them."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import regraft
from regraft.adapters import Site
from regraft.adapters.update import delta
from regraft.errors import BadOption, ShapeMismatch, WrongBase
from regraft.files import TensorFile
from regraft.subspaces.cache import Cache
from regraft.tuners import LoraXConfig
from regraft.tuners.model import weight_hash
from tests import factories
from tests.tuners.nets import MATRICES, Net, fill, ids


def layer_of(model, name):
    return model.get_submodule(f"base_model.model.{name}")


@pytest.mark.parametrize("core", ["diagonal", "full"])
@pytest.mark.parametrize("name", MATRICES)
def test_delta_is_u_core_v_in_the_bases_own_subspace(name, core):
    """Eq. 1 and 2: ΔW = Ũ ΔΣ Ṽᵀ, and projecting on the top-r subspaces leaves it as it is."""
    r = 3
    model = peft.get_peft_model(Net(), LoraXConfig(r=r, core=core, target_modules=[name]))
    fill(model)
    weight = Net().get_submodule(name).weight.detach()
    m = weight.shape[0]
    u, _, vh = torch.linalg.svd(weight.reshape(m, -1), full_matrices=False)
    got = layer_of(model, name).get_delta_weight("default").detach()
    assert got.shape == weight.shape
    flat = got.reshape(m, -1)
    assert torch.allclose(u[:, :r] @ (u[:, :r].mT @ flat @ vh[:r].mT) @ vh[:r], flat, atol=1e-5)
    kept = layer_of(model, name)
    core_ = kept.lora_x_S["default"].detach()
    square = core_.diag() if core == "diagonal" else core_
    assert torch.allclose(
        kept.lora_x_U["default"] @ square @ kept.lora_x_V["default"].mT, flat, atol=1e-6
    )
    assert (
        kept.lora_x_U["default"].gather(0, kept.lora_x_U["default"].abs().argmax(0)[None]) > 0
    ).all()


def test_gradient_in_double_precision():
    model = peft.get_peft_model(Net(), LoraXConfig(r=2, core="full", target_modules=["conv2"]))
    layer = layer_of(model, "conv2").double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    start = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    u, v = layer.lora_x_U["default"], layer.lora_x_V["default"]

    def run(core):
        return layer._through(x, u @ core, v.mT)

    assert torch.autograd.gradcheck(run, (start,))


def test_the_rank_is_a_number_or_a_share_of_energy():
    model = peft.get_peft_model(Net(), LoraXConfig(target_modules=MATRICES))  # the paper's 320
    ranks = {n: layer_of(model, n).lora_x_S["default"].shape[0] for n in MATRICES}
    assert ranks == {"linear": 12, "transposed": 8, "conv1": 8, "conv2": 4, "grouped": 6}
    model = peft.get_peft_model(Net(), LoraXConfig(r=0.5, target_modules=["linear"]))
    s = torch.linalg.svdvals(Net().linear.weight) ** 2
    r = layer_of(model, "linear").lora_x_S["default"].shape[0]
    assert s[: r - 1].sum() < 0.5 * s.sum() <= s[:r].sum()
    with pytest.raises(BadOption):
        LoraXConfig(r=-1)
    with pytest.raises(BadOption, match="form of ΔΣ"):
        LoraXConfig(core="round")


@pytest.mark.parametrize("core", ["diagonal", "full"])
def test_regraft_reads_the_folder_as_lora_x(core, tmp_path):
    targets = [factories.UNET_LINEAR, factories.UNET_1X1, factories.UNET_3X3]
    factories.save(factories.unet(), tmp_path / "base")
    model = peft.get_peft_model(
        factories.unet(), LoraXConfig(r=4, core=core, target_modules=targets)
    )
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    found = regraft.load_adapter(tmp_path / "adapter", tmp_path / "base")
    assert (found.family, found.dialect, found.refused) == ("lora-x", "lora-x", {})
    assert {site.module for site in found.updates} == set(targets)
    for site, update in found.updates.items():
        assert update.rank == 4
        expected = layer_of(model, site.module).get_delta_weight("default")
        assert torch.equal(delta(update), expected.detach()) or torch.allclose(
            delta(update), expected.detach(), atol=1e-6
        )


def test_regraft_reads_conv1d_as_stored(tmp_path):
    factories.save(factories.gpt2(), tmp_path / "base")
    model = peft.get_peft_model(factories.gpt2(), LoraXConfig(r=4, target_modules=["c_attn"]))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    found = regraft.load_adapter(tmp_path / "adapter", tmp_path / "base")
    site = Site("", "transformer.h.0.attn.c_attn")
    expected = layer_of(model, site.module).get_delta_weight("default").detach()
    assert torch.allclose(delta(found.updates[site]), expected, atol=1e-6)


def test_without_bases_only_the_very_weights_will_do(tmp_path):
    config = LoraXConfig(r=4, store_bases=False, target_modules=MATRICES)
    model = peft.get_peft_model(Net(), config)
    fill(model)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in keys} == {"lora_x_S"}
    again = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.equal(again(ids()), model(ids()))
    for other in (Net(seed=1), Net().bfloat16()):
        with pytest.raises(WrongBase, match="linear"):
            peft.PeftModel.from_pretrained(other, tmp_path)
    # The same config on another base is a new adapter, not a loaded one.
    peft.get_peft_model(Net(seed=1), config)


def test_the_hash_is_the_files(tmp_path):
    save_file({"a.weight": Net().linear.weight.detach()}, tmp_path / "a.safetensors")
    of_file = Cache(tmp_path / "cache").content_hash(
        TensorFile(tmp_path / "a.safetensors"), "a.weight"
    )
    assert of_file == weight_hash(Net().linear.weight)


def test_bases_of_another_weight_are_refused(tmp_path):
    model = peft.get_peft_model(Net(), LoraXConfig(r=4, target_modules=["linear"]))
    model.save_pretrained(tmp_path)
    other = Net()
    other.linear = torch.nn.Linear(12, 18)
    with pytest.raises(ShapeMismatch, match="do not fit a weight"):
        peft.PeftModel.from_pretrained(other, tmp_path)


def test_s_is_saved_in_fp32_and_bases_come_from_the_file(tmp_path):
    """A file's bases win over the base's own, so that it means the same everywhere."""
    model = peft.get_peft_model(Net().bfloat16(), LoraXConfig(r=4, target_modules=["linear"]))
    fill(model)
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float32}
    again = peft.PeftModel.from_pretrained(Net(seed=3), tmp_path)
    assert torch.equal(
        layer_of(again, "linear").get_delta_weight("default"),
        layer_of(model, "linear").get_delta_weight("default"),
    )
    assert not layer_of(again, "linear").pending


def test_bases_computed_late_are_the_same_in_every_mode(tmp_path):
    config = LoraXConfig(r=4, store_bases=False, target_modules=MATRICES)
    model = peft.get_peft_model(Net(), config)
    fill(model)
    model.save_pretrained(tmp_path)
    late = peft.PeftModel.from_pretrained(Net(), tmp_path)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        late(ids())
    assert torch.equal(late(ids()), model(ids()))
    late.set_requires_grad("default")
    late(ids()).sum().backward()


def test_language_models_have_targets_by_default(tmp_path):
    model = peft.get_peft_model(factories.llama(), LoraXConfig(r=4))
    names = {n.rpartition(".lora_x_S")[0].rpartition(".")[2] for n, _ in model.named_parameters()}
    assert names - {""} == {"q_proj", "v_proj"}
    all_of_them = peft.get_peft_model(
        factories.llama(), LoraXConfig(r=4, target_modules="all-linear")
    )
    assert "mlp.down_proj.lora_x_S" in str([n for n, _ in all_of_them.named_parameters()])


def test_transformers_own_integration():
    model = factories.llama()
    tokens = torch.tensor([[3, 4, 5]])
    plain = model(tokens).logits
    model.add_adapter(LoraXConfig(r=4, target_modules=["q_proj", "down_proj"]), "mine")
    fill(model, "mine")
    assert not torch.allclose(model(tokens).logits, plain, atol=1e-3)
    model.disable_adapters()
    assert torch.equal(model(tokens).logits, plain)


def test_export_to_lora_by_regraft(tmp_path):
    targets = [factories.UNET_LINEAR, factories.UNET_3X3]
    factories.save(factories.unet(), tmp_path / "base")
    model = peft.get_peft_model(factories.unet(), LoraXConfig(r=4, target_modules=targets))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    regraft.convert(
        tmp_path / "adapter",
        output=tmp_path / "lora.safetensors",
        base=tmp_path / "base",
        dialect="diffusers",
    )
    again = regraft.load_adapter(tmp_path / "lora.safetensors", tmp_path / "base")
    assert again.family == "lora"
    for site, update in again.updates.items():
        expected = layer_of(model, site.module).get_delta_weight("default").detach()
        assert torch.allclose(delta(update), expected, atol=1e-5)
