"""FouRA in diffusers, and its files read back: ΔW from the file is the ΔW that merging adds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import regraft
from regraft.adapters import Site
from regraft.adapters.update import delta
from regraft.errors import BadOption, RegraftError
from regraft.tuners.foura import FouRAConfig, freeze
from tests.factories import gpt2, llama, save, unet

TRANSFORMS = ["dct", "dft"]


def tokens() -> Tensor:
    return torch.arange(8)[None]


def noise() -> tuple[Tensor, int, Tensor]:
    torch.manual_seed(3)
    return torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 16)


def config(targets: list[str], **options: object) -> FouRAConfig:
    torch.manual_seed(1)
    return FouRAConfig(r=3, alpha=5.0, init_weights=False, target_modules=targets, **options)


def assert_file_is_the_merge(
    path: Path, base: Path, before: dict[str, Tensor], after: Callable[[str], Tensor], count: int
) -> None:
    adapter = regraft.load_adapter(path, base)
    assert (adapter.family, adapter.refused, len(adapter.updates)) == ("foura", {}, count)
    for site, update in adapter.updates.items():
        change = after(site.module) - before[f"{site.module}.weight"]
        assert torch.allclose(delta(update), change, atol=1e-5), site


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("model", "targets", "count"),
    [(llama, ["q_proj", "down_proj"], 24), (gpt2, ["c_attn", "mlp.c_proj"], 4)],
)
def test_the_file_holds_the_frozen_change(
    model: Callable[[], nn.Module], targets: list[str], count: int, transform: str, tmp_path: Path
) -> None:
    base = save(model(), tmp_path / "base")
    tuned = peft.get_peft_model(model(), config(targets, transform=transform, gate="soft"))
    for parameter in (p for n, p in tuned.named_parameters() if "foura_gate.default.out" in n):
        nn.init.normal_(parameter)
    masks = freeze(tuned, [tokens()])
    assert len({round(float(m[0]), 4) for m in masks.values()}) > 1
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload()
    assert_file_is_the_merge(
        tmp_path / "adapter", base, model().state_dict(),
        lambda name: merged.get_submodule(name).weight, count,
    )  # fmt: skip


def test_a_file_with_a_gate_that_sees_the_input_is_not_read(tmp_path: Path) -> None:
    base = save(gpt2(), tmp_path / "base")
    tuned = peft.get_peft_model(gpt2(), config(["c_attn"], gate="hard"))
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RegraftError):
        regraft.load_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kernel", ["linear and 1x1", "3x3"])
def test_diffusers_adds_fuses_and_saves_it(transform: str, kernel: str, tmp_path: Path) -> None:
    targets, count = (["to_q", "proj_in"], 12) if kernel != "3x3" else (["conv1"], 8)
    base, model = save(unet(), tmp_path / "base"), unet()
    model.add_adapter(config(targets, transform=transform, gate="hard"), "style")
    with torch.no_grad(), pytest.raises(BadOption, match=r"freeze\(model"):
        model.fuse_lora()
    freeze(model, [noise()], adapter_name="style")
    with torch.no_grad():
        full = model(*noise()).sample
        model.set_adapters(["style"], [0.5])
        half = model(*noise()).sample
        model.disable_adapters()
        plain = model(*noise()).sample
        model.enable_adapters()
        model.set_adapters(["style"], [1.0])
        assert not torch.allclose(full, plain, atol=1e-3)
        assert not torch.allclose(full, half, atol=1e-4)
        model.save_lora_adapter(tmp_path / "file", adapter_name="style")
        model.fuse_lora()
        assert torch.allclose(model(*noise()).sample, full, atol=1e-4)
        assert_file_is_the_merge(
            tmp_path / "file", base, unet().state_dict(),
            lambda name: model.get_submodule(name).weight, count,
        )  # fmt: skip
        model.unfuse_lora()
        assert torch.allclose(model(*noise()).sample, full, atol=1e-4)


def test_the_file_of_diffusers_goes_back_on(tmp_path: Path) -> None:
    from regraft.tuners.saved import load_onto

    model = unet()
    model.add_adapter(config(["to_q"], gate="soft"))
    model.save_lora_adapter(tmp_path)
    again = unet()
    load_onto(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(*noise()).sample, model(*noise()).sample)
    site = Site("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    layer = again.get_submodule(site.module)
    assert layer.gate_of("default") == "soft"
