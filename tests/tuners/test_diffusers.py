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
def test_regraft_reads_what_diffusers_saved(make, tmp_path):
    factories.save(factories.unet(), tmp_path / "base")
    unet = factories.unet()
    unet.add_adapter(make(), "style")
    fill(unet, "style")
    unet.save_lora_adapter(tmp_path, "style")
    found = regraft.load_adapter(tmp_path / FILE, tmp_path / "base")
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, DeltaLayer)}
    assert {s.module for s in found.updates} == set(layers)
    for site, update in found.updates.items():
        expected = layers[site.module].get_delta_weight("style").detach()
        assert torch.allclose(delta(update).reshape(expected.shape), expected, atol=1e-5)


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
