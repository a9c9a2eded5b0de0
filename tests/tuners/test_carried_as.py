"""Forms that are not simply ΔW: what is carried in their place, and that the result says so."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import regraft
from regraft.adapters.update import delta
from regraft.errors import FamilyNotYet, WrongBase
from regraft.tuners import FouRAConfig, SVDiffConfig
from regraft.tuners.foura import freeze
from tests import factories
from tests.tuners.cases import fill, llama

TARGETS = ["q_proj", "down_proj"]


def tokens() -> torch.Tensor:
    return torch.arange(2, 10)[None]


@pytest.fixture
def base(tmp_path):
    return factories.save(llama(), tmp_path / "base")


def saved(config, folder, *, frozen=False, size=0.2) -> dict[str, torch.Tensor]:
    """An adapter saved as PEFT does; and what merging it adds to each weight."""
    torch.manual_seed(3)
    model = peft.get_peft_model(llama(), config).eval()
    fill(model, size=size)
    if frozen:
        freeze(model, [tokens()])
    model.save_pretrained(folder)
    if getattr(model.peft_config["default"], "gate", "none") in ("soft", "hard"):
        return {}
    before = llama().state_dict()
    merged = model.merge_and_unload().state_dict()
    return {k: merged[k] - w for k, w in before.items() if not torch.equal(merged[k], w)}


def carried(adapter, base, **options) -> regraft.TransferResult:
    return regraft.transfer(
        adapter,
        source=base,
        target=base,
        output=adapter.parent / "out.safetensors",
        report=adapter.parent / "page.html",
        method="copy",
        dialect="diffusers",
        rank="full",
        **options,
    )


FORMS = {
    "dora": (
        lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
        "DoRA: carried as the exact ΔW that it makes on the source",
    ),
    "foura frozen": (
        lambda: FouRAConfig(r=3, gate="hard", target_modules=TARGETS),
        "FouRA: its gate was frozen to a fixed mask before it was saved",
    ),
    "svdiff": (
        lambda: SVDiffConfig(target_modules=TARGETS),
        "SVDiff: carried as the exact ΔW",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_merged_change_is_carried_and_named(name, base, tmp_path) -> None:
    make, says = FORMS[name]
    # 1.0: shifts so large that the ReLU of many singular values bites.
    changes = saved(make(), tmp_path / "adapter", frozen=name == "foura frozen",
                    size=1.0 if name == "svdiff" else 0.2)  # fmt: skip
    result = carried(tmp_path / "adapter", base)
    (note,) = [n for n in result.notes if n.startswith(says)]
    assert note in result.to_dict()["notes"]
    page = (tmp_path / "page.html").read_text()
    assert note.replace("'", "&#39;") in page
    found = regraft.load_adapter(tmp_path / "out.safetensors", base)
    assert len(found.updates) == len(changes) == 4
    for site, update in found.updates.items():
        change = changes[f"{site.module}.weight"]
        assert torch.allclose(delta(update), change, atol=1e-4), site


def test_a_relu_that_bites_is_in_what_is_carried(base, tmp_path) -> None:
    """No singular value of the merged weight is below zero, and linear in δ it is not."""
    saved(SVDiffConfig(target_modules=["q_proj"]), tmp_path / "adapter", size=1.0)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    shifts = load_file(file)
    save_file({k: torch.full_like(t, -1e3) for k, t in shifts.items()}, file)
    found = regraft.load_adapter(tmp_path / "adapter", base)
    for site, update in found.updates.items():
        weight = llama().get_submodule(site.module).weight.detach()
        assert torch.allclose(delta(update), -weight, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shifts_are_read_on_the_weights_they_were_trained_on(dtype, base, tmp_path) -> None:
    """A bf16 copy of a base has other singular vectors; the hashes say that it was one."""
    config = SVDiffConfig(target_modules=["q_proj", "input_layernorm"])
    model = peft.get_peft_model(llama().to(dtype), config)
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    found = regraft.load_adapter(tmp_path / "adapter", base)
    assert len(found.updates) == 4
    for site, update in found.updates.items():
        layer = model.base_model.get_submodule(f"model.{site.module}")
        expected = layer.get_delta_weight("default").detach()
        assert torch.allclose(delta(update), expected, atol=1e-5), site


def test_shifts_of_another_base_are_refused_unless_asked_for(base, tmp_path) -> None:
    saved(SVDiffConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    other = factories.save(factories.llama(seed=5), tmp_path / "other")
    with pytest.raises(WrongBase, match=r"q_proj .*hash differs") as caught:
        regraft.load_adapter(tmp_path / "adapter", other)
    assert "check_base" in caught.value.fix
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"check_base": False}))
    assert len(regraft.load_adapter(tmp_path / "adapter", other).updates) == 2


@pytest.mark.parametrize("gate", ["soft", "hard"])
@pytest.mark.parametrize("how", ["peft", "file"])
def test_a_live_gate_is_refused_with_what_to_do(gate, how, base, tmp_path) -> None:
    saved(FouRAConfig(r=3, gate=gate, target_modules=TARGETS), tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    if how == "file":
        adapter = adapter / "adapter_model.safetensors"
    for run in (
        lambda: regraft.load_adapter(adapter, base),
        lambda: regraft.transfer(adapter, source=base, target=base, allow_unknown=True),
        lambda: regraft.convert(adapter, output=tmp_path / "lora", base=base, dialect="peft"),
    ):
        with pytest.raises(FamilyNotYet, match=r"gated FouRA.*depends on the input") as caught:
            run()
        assert "freeze(" in caught.value.fix
    assert not (tmp_path / "lora").exists()


def test_a_config_that_says_gate_over_a_frozen_file_is_the_file(base, tmp_path) -> None:
    """The mask in the file decides; a mask lost on the way is an error, not an open gate."""
    saved(FouRAConfig(r=3, gate="soft", target_modules=TARGETS), tmp_path / "adapter", frozen=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if "mask" not in k}, file)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["gate"] == "frozen"
    with pytest.raises(regraft.errors.MalformedFile, match="foura_mask"):
        regraft.load_adapter(tmp_path / "adapter", base)


def test_forms_whose_change_is_in_the_file_need_no_note(base, tmp_path) -> None:
    saved(FouRAConfig(r=3, gate="none", target_modules=TARGETS), tmp_path / "adapter")
    assert carried(tmp_path / "adapter", base).notes == []


def test_a_dora_on_convolutions_is_its_merge(tmp_path) -> None:
    targets = [factories.UNET_LINEAR, factories.UNET_1X1, factories.UNET_3X3]
    base = factories.save(factories.unet(), tmp_path / "base")
    model = peft.get_peft_model(
        factories.unet(), peft.LoraConfig(r=4, use_dora=True, target_modules=targets)
    )
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    merged: nn.Module = model.merge_and_unload()
    found = regraft.load_adapter(tmp_path / "adapter", base)
    assert {s.module for s in found.updates} == set(targets)
    for site, update in found.updates.items():
        before = factories.unet().get_submodule(site.module).weight.detach()
        change = merged.get_submodule(site.module).weight.detach() - before
        assert torch.allclose(delta(update).reshape(change.shape), change, atol=1e-5)
