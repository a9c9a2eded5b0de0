"""LoRA-X files that leave their bases out: small, and read with the base at hand."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import regraft
from regraft.adapters.update import delta
from regraft.dialects.inspect import inspect_file
from regraft.errors import BadOption, MalformedFile, ShapeMismatch, WrongBase
from regraft.subspaces.reproducible import signed, signs_of
from regraft.tuners import LoraXConfig
from tests import factories
from tests.tuners.nets import Net, fill, ids

TARGETS = [factories.UNET_LINEAR, factories.UNET_1X1, factories.UNET_3X3]
MODELS = {
    "unet": (factories.unet, TARGETS),
    "llama": (factories.llama, ["q_proj", "down_proj"]),
    "gpt2": (factories.gpt2, ["c_attn"]),
}


def trained(make, targets, folder, *, dtype=torch.float32, stored=torch.float32, **options):
    """A base stored in one dtype, and an adapter made on it loaded in another: each one's ΔW."""
    save = make()
    factories.save(save.to(stored), folder / "base")
    options = {"r": 4, "store_bases": False, "target_modules": targets} | options
    model = peft.get_peft_model(make().to(stored).to(dtype), LoraXConfig(**options))
    fill(model)
    model.save_pretrained(folder / "adapter")
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_x_S")
    }
    return {n: m.get_delta_weight("default").detach() for n, m in layers.items()}


def assert_reads(folder, changes: dict[str, Tensor]) -> None:
    found = regraft.load_adapter(folder / "adapter", folder / "base")
    assert (found.family, found.dialect, found.refused) == ("lora-x", "lora-x", {})
    assert {site.module for site in found.updates} == changes.keys()
    for site, update in found.updates.items():
        expected = changes[site.module]
        assert torch.allclose(delta(update).reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("core", ["diagonal", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bases_are_computed_from_the_base(name, core, tmp_path):
    changes = trained(*MODELS[name], tmp_path, core=core)
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in kept.values()) == len(changes) * (4 if core == "diagonal" else 16)
    assert_reads(tmp_path, changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_base_loaded_in_another_precision_is_recognised(dtype, stored, tmp_path):
    """Training on a bf16 copy of an fp32 checkpoint means the singular vectors of that copy."""
    assert_reads(
        tmp_path,
        trained(factories.llama, ["q_proj"], tmp_path, dtype=dtype, stored=stored, r=0.5),
    )


def test_transfer_is_that_of_the_file_with_bases(tmp_path):
    trained(factories.llama, ["q_proj", "down_proj"], tmp_path)
    stored = peft.PeftModel.from_pretrained(factories.llama(), tmp_path / "adapter")
    with torch.no_grad():
        stored(torch.arange(4)[None])  # its bases are computed
    layers = {n: m for n, m in stored.named_modules() if hasattr(m, "lora_x_S")}
    tensors = {}
    for name, layer in layers.items():
        u, v = layer.bases("default")
        parts = {"U": u, "S": layer.lora_x_S["default"].detach(), "V": v.contiguous()}
        tensors |= {f"{name}.lora_x_{part}": t for part, t in parts.items()}
    save_file(tensors, tmp_path / "stored.safetensors")
    factories.save(factories.llama(seed=1), tmp_path / "target")
    results = [
        regraft.transfer(
            adapter,
            source=tmp_path / "base",
            target=tmp_path / "target",
            output=tmp_path / f"{i}.safetensors",
            method="copy",
        )
        for i, adapter in enumerate((tmp_path / "adapter", tmp_path / "stored.safetensors"))
    ]
    one, two = (load_file(tmp_path / f"{i}.safetensors") for i in range(2))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    assert results[0].energy_kept == results[1].energy_kept == 1
    assert any("bases" in note for note in results[0].notes)


def test_a_folder_is_carried_to_a_folder(tmp_path):
    changes = trained(*MODELS["llama"], tmp_path)
    base = tmp_path / "base"
    made = regraft.transfer(tmp_path / "adapter", source=base, target=base, output=tmp_path / "out")
    assert made.dialect == "peft"
    found = regraft.load_adapter(tmp_path / "out", base)
    assert {site.module for site in found.updates} == changes.keys()


def test_another_base_is_refused_with_the_weight(tmp_path):
    trained(factories.llama, ["q_proj"], tmp_path)
    factories.save(factories.llama(seed=1), tmp_path / "other")
    with pytest.raises(WrongBase, match=r"model\.layers\.0\.self_attn\.q_proj .*hash differs"):
        regraft.load_adapter(tmp_path / "adapter", tmp_path / "other")


def test_a_file_without_its_config_is_refused(tmp_path):
    trained(factories.llama, ["q_proj"], tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(MalformedFile, match="nothing says which weight"):
        regraft.load_adapter(tmp_path / "adapter", tmp_path / "base")


def test_check_base_false_takes_the_base_that_is_given(tmp_path):
    changes = trained(factories.llama, ["q_proj"], tmp_path, check_base=False)
    assert_reads(tmp_path, changes)


def test_what_needs_no_base_says_so_or_works(tmp_path):
    trained(factories.llama, ["q_proj"], tmp_path)
    facts = inspect_file(tmp_path / "adapter", spectrum=True)
    assert (facts["family"], facts["ranks"]) == ("lora-x", {"4": 12})
    assert list(facts["spectrum"]["left_out"].values()) == [12]
    with pytest.raises(BadOption, match="needs the base"):
        regraft.convert(tmp_path / "adapter", output=tmp_path / "lora.safetensors")
    regraft.convert(
        tmp_path / "adapter", output=tmp_path / "lora", base=tmp_path / "base", dialect="peft"
    )
    assert regraft.load_adapter(tmp_path / "lora", tmp_path / "base").family == "lora"


def test_more_directions_than_the_weight_has_are_refused(tmp_path):
    trained(factories.llama, ["q_proj"], tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = load_file(file)
    save_file({k: torch.ones(40) for k in kept}, file)
    with pytest.raises(ShapeMismatch, match="16 singular directions, the adapter 40"):
        regraft.load_adapter(tmp_path / "adapter", tmp_path / "base")


# -- signs: a full ΔΣ between other vectors is another change --------------------------------------


def test_signs_are_put_back_and_other_vectors_refused():
    u, v = torch.linalg.qr(torch.randn(9, 3))[0], torch.linalg.qr(torch.randn(7, 3))[0]
    u = u * torch.sign(u.gather(0, u.abs().argmax(0)[None])[0])
    turn = torch.tensor([1.0, -1.0, -1.0])
    again = signed(u * turn, v * turn, signs_of(u))
    assert torch.equal(again[0], u)
    assert torch.equal(again[1], v)
    rotated = u @ torch.linalg.qr(torch.randn(3, 3))[0]
    with pytest.raises(WrongBase, match="otherwise here"):
        signed(rotated, v, signs_of(u))
    for wrong in ([0, 1], [0, 1, 9], [0, "1", 2]):
        with pytest.raises(WrongBase, match="do not fit"):
            signed(u, v, wrong)


def test_a_full_core_is_refused_where_the_vectors_come_out_otherwise(tmp_path, monkeypatch):
    options = {"core": "full", "r": 4, "store_bases": False, "target_modules": ["linear"]}
    model = peft.get_peft_model(Net(), LoraXConfig(**options))
    fill(model)
    model.save_pretrained(tmp_path)
    out = model(ids())
    config = tmp_path / "adapter_config.json"
    assert len(json.loads(config.read_text())["signs"]["linear"]) == 4

    from regraft.tuners.lora_x import layer

    def elsewhere(turn):
        """A machine on which the vectors come out turned."""

        def decompose(*arguments):
            found = real(*arguments)
            return type(found)(turn @ found.ut, turn @ found.vt, found.s, found.engine, 0.0)

        return decompose

    real = layer.decompose
    flips = torch.diag(torch.tensor([1.0, -1, 1, -1]))
    for trainable in (False, True):
        monkeypatch.setattr(layer, "decompose", elsewhere(flips))
        again = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=trainable)
        assert torch.equal(again(ids()), out)
        turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
        monkeypatch.setattr(layer, "decompose", elsewhere(turn))
        with pytest.raises(WrongBase, match="otherwise here"):
            peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=trainable)(ids())
