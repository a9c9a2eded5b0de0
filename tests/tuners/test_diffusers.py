"""The tuners inside diffusers: its own calls, on a tiny U-Net."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import regraft
from regraft.adapters.update import delta
from regraft.errors import MalformedFile, NotAnAdapter, SitesNotInBase
from regraft.tuners import LoraXConfig, SVDiffConfig, load_onto
from regraft.tuners.layer import DeltaLayer
from tests import factories
from tests.tuners.nets import fill

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]
CONFIGS = {
    "lora-x": lambda: LoraXConfig(r=6, target_modules=TARGETS),
    "lora-x unstored": lambda: LoraXConfig(r=6, store_bases=False, target_modules=TARGETS),
    "svdiff": lambda: SVDiffConfig(),
}
every = pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS.keys())
FILE = "pytorch_lora_weights.safetensors"


def run(unet, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 5, 16, generator=generator)
    return unet(x, 3, context, **options).sample


def close(a, b, tolerance=1e-5):
    return float((a - b).detach().abs().max()) <= tolerance


@every
def test_add_fuse_save_and_load(make, tmp_path):
    unet = factories.unet()
    plain = run(unet)
    unet.add_adapter(make(), "style")
    assert close(run(unet), plain, 0)
    fill(unet, "style")
    out = run(unet)
    assert not close(out, plain, 1e-2)
    unet.fuse_lora()
    assert close(run(unet), out)
    unet.unfuse_lora()
    assert torch.equal(run(unet), out)
    unet.disable_adapters()
    assert torch.equal(run(unet), plain)
    unet.enable_adapters()
    scaled = run(unet, cross_attention_kwargs={"scale": 0.5})
    assert not close(scaled, out, 1e-3)
    assert torch.equal(run(unet), out)
    unet.set_adapters("style", 0.5)
    assert close(run(unet), scaled)
    unet.save_lora_adapter(tmp_path, "style")
    again = factories.unet()
    load_onto(again, tmp_path, "loaded")
    assert torch.equal(run(again), out)
    again.save_lora_adapter(tmp_path / "again", "loaded")
    first, second = load_file(tmp_path / FILE), load_file(tmp_path / "again" / FILE)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    again.delete_adapters("loaded")
    assert torch.equal(run(again), plain)


@every
def test_regraft_reads_what_diffusers_saved(make, tmp_path):
    factories.save(factories.unet(), tmp_path / "base")
    unet = factories.unet()
    unet.add_adapter(make(), "style")
    fill(unet, "style")
    unet.save_lora_adapter(tmp_path, "style")
    if not getattr(make(), "store_bases", True):  # nothing to read it with
        with pytest.raises(MalformedFile):
            regraft.load_adapter(tmp_path / FILE, tmp_path / "base")
        return
    found = regraft.load_adapter(tmp_path / FILE, tmp_path / "base")
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, DeltaLayer)}
    assert {s.module for s in found.updates} == set(layers)
    for site, update in found.updates.items():
        expected = layers[site.module].get_delta_weight("style").detach()
        assert torch.allclose(delta(update).reshape(expected.shape), expected, atol=1e-5)


@every
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trains_under_accelerate_with_gradient_checkpointing(make, precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    unet = factories.unet()
    unet.add_adapter(make(), "style")
    unet.enable_gradient_checkpointing()
    unet.train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    unet, optimiser = accelerator.prepare(unet, torch.optim.AdamW(trained, lr=1e-2))
    losses = []
    for _ in range(3):
        with accelerator.autocast():
            loss = run(unet).float().square().mean()
        optimiser.zero_grad()
        accelerator.backward(loss)
        optimiser.step()
        losses.append(float(loss.detach()))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trained} == {torch.float32}


def test_loading_goes_all_the_way_or_says_why(tmp_path):
    unet = factories.unet()
    unet.add_adapter(LoraXConfig(r=4, target_modules=["to_q"]), "style")
    unet.save_lora_adapter(tmp_path, "style")
    tensors = load_file(tmp_path / FILE)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = file.metadata()

    def changed(tensors, metadata):
        save_file(tensors, tmp_path / "changed.safetensors", metadata)
        load_onto(factories.unet(), tmp_path / "changed.safetensors")

    changed(tensors, metadata)
    key = next(k for k in tensors if k.endswith("_U"))
    with pytest.raises(MalformedFile, match="only some of"):
        changed({k: v for k, v in tensors.items() if k != key}, metadata)
    module = key.rpartition(".")[0]
    with pytest.raises(MalformedFile, match="lacks 3 tensor"):
        changed({k: v for k, v in tensors.items() if not k.startswith(module)}, metadata)
    with pytest.raises(SitesNotInBase, match="no place for 1"):
        changed(tensors | {"elsewhere.lora_x_S": torch.zeros(2)}, metadata)
    with pytest.raises(NotAnAdapter, match="for it"):
        changed(tensors, {})
    with pytest.raises(NotAnAdapter, match="MADE_UP"):
        changed(tensors, {"lora_adapter_metadata": json.dumps({"peft_type": "made_up"})})
    with pytest.raises(MalformedFile, match="JSON"):
        changed(tensors, {"lora_adapter_metadata": "{"})
