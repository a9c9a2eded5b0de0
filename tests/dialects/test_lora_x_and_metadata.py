"""LoRA-X files, metadata, and equal bytes for equal input."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.adapters import Spectral
from regraft.dialects import load_adapter
from regraft.errors import (
    FamilyNotYet,
    MalformedFile,
)
from tests.dialects.loaders import (
    UNET,
    assert_same,
    deltas_of,
    judge_diffusers,
    pipeline,
    random_adapter,
    sites_of,
    write,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


# ---------------------------------------------------------------- LoRA-X


@pytest.mark.parametrize("full", [True, False])
def test_lora_x_files_round_trip(full, sd, sd_models, tmp_path):
    adapter = random_adapter(sd, sites_of(sd, UNET, "text_encoder"))
    for site, update in list(adapter.updates.items()):
        u, _ = torch.linalg.qr(update.up)
        v, _ = torch.linalg.qr(update.down.mT)
        r = update.rank
        core = torch.randn(r, r) if full else torch.randn(r)
        adapter.updates[site] = Spectral(u, core, v, update.shape, update.layout)
    path = tmp_path / "x.safetensors"
    write(adapter, sd, path, "lora-x")
    back = load_adapter(path, sd)
    assert (back.dialect, back.family) == ("lora-x", "lora-x")
    assert back.metadata["regraft.format"] == "lora-x/1"
    for site, update in adapter.updates.items():
        again = back.updates[site]
        assert isinstance(again, Spectral)
        assert again.diagonal is not full
        for a, b in ((again.u, update.u), (again.core, update.core), (again.v, update.v)):
            assert a.equal(b)
    assert {k.rpartition(".")[2] for k in load_file(path)} == {"lora_x_U", "lora_x_S", "lora_x_V"}
    # And as a plain LoRA it is the same change.
    for dialect in ("kohya", "diffusers"):
        write(back, sd, tmp_path / f"{dialect}.safetensors", dialect)
        theirs = judge_diffusers(pipeline(*sd_models), tmp_path / f"{dialect}.safetensors")
        assert_same(theirs, deltas_of(adapter))


def test_a_plain_lora_as_lora_x_is_the_same_change(sd, tmp_path):
    adapter = random_adapter(sd, sites_of(sd, UNET))
    write(adapter, sd, tmp_path / "x.safetensors", "lora-x")
    assert_same(deltas_of(load_adapter(tmp_path / "x.safetensors", sd)), deltas_of(adapter))
    assert "regraft.format" in load_adapter(tmp_path / "x.safetensors", sd).metadata


def test_a_lora_x_file_of_a_later_version_is_refused(sd, tmp_path):
    write(random_adapter(sd, sites_of(sd, UNET)), sd, tmp_path / "x.safetensors", "lora-x")
    later = {"regraft.format": "lora-x/2"}
    save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "y.safetensors", later)
    with pytest.raises(FamilyNotYet, match="lora-x/2"):
        load_adapter(tmp_path / "y.safetensors", sd)


def test_an_alpha_beside_lora_x_is_not_ignored(sd, tmp_path):
    write(random_adapter(sd, sites_of(sd, UNET)), sd, tmp_path / "x.safetensors", "lora-x")
    tensors = load_file(tmp_path / "x.safetensors")
    name = next(iter(tensors)).rpartition(".")[0]
    save_file({**tensors, f"{name}.alpha": torch.tensor(4.0)}, tmp_path / "y.safetensors")
    with pytest.raises(MalformedFile, match="alpha"):
        load_adapter(tmp_path / "y.safetensors", sd)


# ---------------------------------------------------------------- metadata and bytes


def test_trigger_words_tags_and_settings_survive(sd, tmp_path):
    tags = json.dumps({"img": {"zzz dog": 12, "Ünïcode": 1}}, ensure_ascii=False)
    adapter = random_adapter(sd, sites_of(sd, UNET), dialect="kohya")
    adapter.metadata = {
        "modelspec.trigger_phrase": "zzz dog",
        "modelspec.title": "My style",
        "modelspec.hash_sha256": "0xold",
        "ss_tag_frequency": tags,
        "ss_network_dim": "99",
        "ss_sd_model_name": "old.safetensors",
        "ss_sd_model_hash": "old",
        "sshs_model_hash": "old",
        "lora_adapter_metadata": '{"r": 99}',
        "odd": "kept",
    }
    write(adapter, sd, tmp_path / "a.safetensors", "kohya")
    meta = load_adapter(tmp_path / "a.safetensors", sd).metadata
    assert meta["modelspec.trigger_phrase"] == "zzz dog"
    assert meta["modelspec.title"] == "My style"
    assert meta["ss_tag_frequency"] == tags
    assert meta["odd"] == "kept"
    assert meta["ss_network_dim"] == "3"
    assert meta["ss_network_module"] == "networks.lora"
    assert meta["ss_sd_model_name"] == "sd"
    assert "old" not in {v for k, v in meta.items() if k != "regraft"}
    assert "lora_adapter_metadata" not in meta
    assert len(meta["sshs_model_hash"]) == 64
    assert meta["modelspec.hash_sha256"] == "0x" + meta["sshs_model_hash"]
    assert json.loads(meta["regraft"])["method"] == "copy"
    assert str(tmp_path) not in json.dumps(meta)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "lora-x", "peft"])
def test_the_same_input_gives_the_same_bytes(dialect, sd, tmp_path):
    contents, shas = set(), set()
    for name in ("a", "b"):
        out = tmp_path / name / ("out" if dialect == "peft" else "out.safetensors")
        adapter = random_adapter(sd, sites_of(sd, UNET))
        adapter.metadata = {f"k{i}": "v" for i in range(9)}
        shas.add(write(adapter, sd, out, dialect).sha256)
        files = sorted(out.iterdir()) if out.is_dir() else [out]
        contents.add(tuple((f.name, f.read_bytes()) for f in files))
    assert len(shas) == len(contents) == 1
