"""What a merge leaves as it was, what it writes, and how much of the change rounding took."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import regraft
from regraft.adapters import Site, delta
from regraft.errors import InputNotFound, OutputExists
from regraft.files import Located, TensorFile
from regraft.merge import run
from tests import factories
from tests.convert.files import lora
from tests.merge.models import noise, state, write

Q = "model.layers.{}.self_attn.q_proj"


def raw(path: Path) -> dict[str, bytes]:
    file = TensorFile(path)
    return {name: bytes(file.read_bytes(name)) for name in file}


def language(folder: Path, **options) -> Path:
    return factories.save(factories.llama(), folder, **options)


def adapter(path: Path, layers=(0, 5), size: float = 1.0, rank: int = 2) -> Path:
    """A LoRA of some layers' queries, under diffusers' names."""
    tensors = {}
    for i in layers:
        own = lora("x", 16, 16, rank, rank, seed=i)
        tensors[f"{Q.format(i)}.lora_A.weight"] = own["x.lora_down.weight"] * size
        tensors[f"{Q.format(i)}.lora_B.weight"] = own["x.lora_up.weight"]
    return write(path, tensors)


def change(path: Path, layer: int) -> torch.Tensor:
    tensors = load_file(path)
    name = Q.format(layer)
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


def test_only_shards_that_hold_a_change_are_written_anew(tmp_path):
    base = language(tmp_path / "base", max_shard_size="20kB")
    (base / "notes.md").write_text("mine")
    before = state(base)
    write(base / "model.fp16.safetensors", {"x": torch.ones(2)})
    shards = sorted(base.glob("model-*.safetensors"))
    file = adapter(tmp_path / "a.safetensors")
    result = regraft.merge(file, base=base, output=tmp_path / "out")
    assert 1 <= len(result.files) < len(shards)
    for path in [*shards, base / "model.safetensors.index.json", base / "notes.md"]:
        same = (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert same == (path.name not in result.files)
    assert not (tmp_path / "out" / "model.fp16.safetensors").exists()
    assert any("model.fp16.safetensors" in note for note in result.notes)
    after = state(tmp_path / "out")
    for i in (0, 5):
        key = f"{Q.format(i)}.weight"
        assert torch.allclose(after.pop(key), before.pop(key) + change(file, i), atol=1e-6)
    assert all(torch.equal(after[k], before[k]) for k in before)
    from transformers import LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[k], after[k]) for k in after)


def test_a_file_keeps_names_order_metadata_and_the_bytes_of_the_rest(tmp_path):
    tensors = {k: v.half() for k, v in factories.llama().state_dict().items()}
    names = list(tensors)
    random.Random(1).shuffle(names)
    tensors = {n: tensors[n] for n in names} | {"counts": torch.arange(3)}
    said = {"format": "pt", "modelspec.title": "Ink", "modelspec.hash_sha256": "0xstale"}
    said["sshs_model_hash"] = "stale"
    base = write(tmp_path / "base.safetensors", tensors, said)
    file = adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    result = regraft.merge(file, base=base, output=out)
    old, new = TensorFile(base), TensorFile(out)
    assert list(new) == list(old)
    places = [[(i.dtype, i.shape, i.end - i.start) for i in f.values()] for f in (old, new)]
    assert places[0] == places[1]
    before, after = raw(base), raw(out)
    moved = {n for n in before if before[n] != after[n]}
    assert moved == {f"{Q.format(i)}.weight" for i in (0, 5)}
    kept = {k: v for k, v in new.metadata.items() if k != "regraft"}
    assert kept == {"format": "pt", "modelspec.title": "Ink"}
    story = json.loads(new.metadata["regraft"])
    assert story["operation"] == "merge"
    assert story["adapters"][0]["sha256"] == regraft.load_adapter(file, base).sha256
    assert story["base"]["sha256_of_used_weights"] == result.base["sha256_of_used_weights"]
    assert str(tmp_path) not in new.metadata["regraft"]
    with safe_open(out, "pt") as opened:  # the library reads it as well
        assert set(opened.keys()) == set(before)


def test_the_same_bytes_twice_and_a_second_merge_remembers_the_first(tmp_path):
    base = write(tmp_path / "base.safetensors", factories.llama().state_dict())
    file = adapter(tmp_path / "a.safetensors")
    for name in "xy":
        regraft.merge(file, base=base, output=tmp_path / f"{name}.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    back = tmp_path / "back.safetensors"
    regraft.merge(file, base=tmp_path / "x.safetensors", output=back, strength=-1)
    story = json.loads(TensorFile(back).metadata["regraft"])
    assert story["adapters"][0]["strength"] == -1
    assert story["before"]["adapters"][0]["strength"] == 1
    found, wanted = load_file(back), load_file(base)
    assert all(torch.allclose(found[k], wanted[k], atol=2e-6) for k in wanted)


def test_an_original_checkpoint_with_fused_rows(tmp_path):
    """A text encoder's value projection lies in the last third of ``in_proj_weight``."""
    base = factories.ldm_file(tmp_path / "xl.safetensors", factories.TINY_XL)
    layer = "text_model.encoder.layers.1.self_attn"
    text = f"lora_te2_{layer.replace('.', '_')}"
    unet = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = lora(f"{text}_v_proj", 16, 16, 2, 2) | lora(f"{text}_k_proj", 16, 16, 2, 2, seed=4)
    tensors |= lora(unet, 32, 32, 3, 1.5)
    file = write(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "out.safetensors"
    result = regraft.merge(file, base=base, output=out)
    before, after = load_file(base), load_file(out)
    fused = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert fused in moved
    assert len(moved) == 2
    updates = regraft.load_adapter(file, base).updates
    ours = {p: delta(updates[Site("text_encoder_2", f"{layer}.{p}_proj")]) for p in "kv"}
    rows = torch.cat([torch.zeros(16, 16), ours["k"], ours["v"]])
    assert torch.allclose(after[fused], before[fused] + rows, atol=1e-6)
    assert torch.equal(after[fused][:16], before[fused][:16])
    assert {s.site for s in result.sites} == set(map(str, updates))


def test_code_that_is_not_there_is_told(tmp_path):
    """From the hub it never comes along; beside a local base it is copied like any other file."""
    base = language(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.C", "AutoModel": "org/x--modeling_far.M"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    file = adapter(tmp_path / "a.safetensors")
    result = regraft.merge(file, base=base, output=tmp_path / "out")
    (note,) = result.notes
    assert "configuration_own.py" in note
    assert "modeling_far" not in note
    (base / "configuration_own.py").write_text("raise SystemExit")
    assert regraft.merge(file, base=base, output=tmp_path / "two").notes == []
    assert (tmp_path / "two" / "configuration_own.py").read_text() == "raise SystemExit"


def test_a_pipeline_keeps_its_other_parts(tmp_path):
    base = factories.pipeline_folder(tmp_path / "base")
    (base / "vae").mkdir()
    (base / "vae" / "config.json").write_text("{}")
    write(base / "vae" / "diffusion_pytorch_model.safetensors", {"w": torch.ones(2)})
    write(base / "whole.safetensors", {"w": torch.ones(2)})
    (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    (base / ".cache").mkdir()
    (base / ".cache" / "junk").write_text("no part of it")
    (base / "model_index.json").write_text(
        json.dumps({"_class_name": "X", "unet": ["a", "b"], "scheduler": ["a", "b"]})
    )
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    file = write(tmp_path / "a.safetensors", lora(name, 32, 32, 2, 2))
    result = regraft.merge(file, base=base, output=tmp_path / "out")
    assert result.files == ["unet/diffusion_pytorch_model.safetensors"]
    gone = {"whole.safetensors", "unet/diffusion_pytorch_model.bin", ".cache/junk"}
    files = {p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file()}
    made = {
        p.relative_to(tmp_path / "out").as_posix()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert made == (files - gone) | {"regraft.json"}
    for path in made - {"regraft.json", *result.files}:
        assert (tmp_path / "out" / path).read_bytes() == (base / path).read_bytes()
    assert any("scheduler" in note for note in result.notes)
    from diffusers import UNet2DConditionModel

    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    assert not torch.equal(loaded(*noise()).sample, factories.unet()(*noise()).sample)


@pytest.mark.parametrize(("dtype", "told"), [(torch.float16, False), (torch.bfloat16, True)])
def test_what_rounding_takes_is_measured_and_told(dtype, told, tmp_path):
    weights = {k: v.to(dtype) for k, v in factories.llama().state_dict().items()}
    base = write(tmp_path / "base.safetensors", weights)
    file = adapter(tmp_path / "a.safetensors", (0,), size=0.002)
    result = regraft.merge(file, base=base, output=tmp_path / "out.safetensors")
    key = f"{Q.format(0)}.weight"
    stored = load_file(tmp_path / "out.safetensors")[key]
    exact = weights[key].double() + change(file, 0).double()
    lost = float((stored.double() - exact).norm() / change(file, 0).double().norm())
    (site,) = result.sites
    assert site.lost_to_rounding == pytest.approx(lost, rel=1e-3)
    relative = float(change(file, 0).norm() / weights[key].float().norm())
    assert result.relative_change == pytest.approx(relative, rel=1e-4)
    assert site.dtype == str(dtype).removeprefix("torch.")
    assert any("lost to rounding" in note for note in result.notes) == told


def test_another_dtype_for_all_of_it(tmp_path):
    base = language(tmp_path / "base", max_shard_size="20kB")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    file = adapter(tmp_path / "a.safetensors", (0,))
    result = regraft.merge(file, base=base, output=tmp_path / "out", dtype="bf16")
    found, before = state(tmp_path / "out"), state(base)
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert len(result.files) == len(list(base.glob("*.safetensors")))
    key = f"{Q.format(0)}.weight"
    exact = before.pop(key) + change(file, 0)
    assert torch.equal(found[key], exact.bfloat16())
    assert result.sites[0].dtype == "bfloat16"
    assert all(torch.equal(found[k], before[k].bfloat16()) for k in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in found.values())
    from transformers import LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.state_dict()[key], found[key])


def test_mixed_widths_stay_aligned_in_another_dtype(tmp_path):
    weights = factories.llama().state_dict()
    weights |= {"odd": torch.ones(3), "ids": torch.arange(2), "flags": torch.ones(3) > 0}
    base = write(tmp_path / "base.safetensors", weights)
    out = tmp_path / "out.safetensors"
    regraft.merge(adapter(tmp_path / "a.safetensors"), base=base, output=out, dtype="fp16")
    found = load_file(out)
    assert found["odd"].dtype == torch.float16
    assert torch.equal(found["ids"], torch.arange(2))
    assert list(TensorFile(out)) == list(TensorFile(base))


def test_links_become_files_and_subfolders_of_links_are_followed(tmp_path):
    """As the hub's cache keeps a snapshot."""
    real = factories.pipeline_folder(tmp_path / "real")
    base = tmp_path / "base"
    base.mkdir()
    os.symlink(real / "unet", base / "unet")
    (base / "text_encoder").mkdir()
    for path in (real / "text_encoder").iterdir():
        os.symlink(path, base / "text_encoder" / path.name)
    os.symlink(base, base / "text_encoder" / "loop")
    (real / "same").mkdir()
    (real / "same" / "vocab.txt").write_text("a")
    for twice in ("tokenizer", "tokenizer_2"):
        os.symlink(real / "same", base / twice)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    file = write(tmp_path / "a.safetensors", lora(name, 32, 32, 2, 2))
    os.symlink(tmp_path / "gone", base / "notes.txt")
    with pytest.raises(InputNotFound, match="leads nowhere"):
        regraft.merge(file, base=base, output=tmp_path / "out")
    (base / "notes.txt").unlink()
    regraft.merge(file, base=base, output=tmp_path / "out")
    shutil.rmtree(real)
    for twice in ("tokenizer", "tokenizer_2"):
        assert (tmp_path / "out" / twice / "vocab.txt").read_text() == "a"
    made = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not any(p.is_symlink() for p in made)
    assert len(regraft.open_base(tmp_path / "out").components) == 2


@settings(max_examples=10, deadline=None)
@given(
    strength=st.floats(-4, 4).filter(lambda s: abs(s) > 1e-3),
    rank=st.integers(1, 16),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_merging_and_taking_away_again_gives_the_base_within_rounding(
    tmp_path_factory, strength, rank, seed, dtype
):
    folder = tmp_path_factory.mktemp("merge")
    generator = torch.Generator().manual_seed(seed)
    key = f"{Q.format(0)}.weight"
    weights = {k: v.to(dtype) for k, v in factories.llama().state_dict().items() if ".0." in k}
    weights[key] = torch.randn(16, 16, generator=generator, dtype=torch.float64).to(dtype)
    base = write(folder / "base.safetensors", weights)
    file = adapter(folder / "a.safetensors", (0,), rank=rank)
    regraft.merge(file, base=base, output=folder / "m.safetensors", strength=strength)
    merged = load_file(folder / "m.safetensors")[key]
    exact = weights[key].double() + strength * change(file, 0).double()
    half = 0.5 * torch.finfo(dtype).eps
    # One rounding of the sum, beside fp32 arithmetic.
    arithmetic = 1e-5 * strength * change(file, 0).abs().max() + 1e-6
    assert ((merged.double() - exact).abs() <= half * exact.abs() + abs(arithmetic)).all()
    regraft.merge(
        file,
        base=folder / "m.safetensors",
        output=folder / "back.safetensors",
        strength=-strength,
    )
    back = load_file(folder / "back.safetensors")[key].double()
    bound = half * (exact.abs() + weights[key].double().abs()) * 1.01 + 2 * abs(arithmetic)
    assert ((back - weights[key].double()).abs() <= bound).all()


def test_a_base_from_the_hub_is_called_by_its_id(tmp_path, monkeypatch):
    snapshot = language(tmp_path / "cache" / ("a" * 40))
    found = Located("org/base", snapshot, "org/base", "a" * 40)
    real = run.locate
    monkeypatch.setattr(
        run, "locate", lambda ref, **options: found if ref == "org/base" else real(ref)
    )
    file = adapter(tmp_path / "a.safetensors")
    result = regraft.merge(file, base="org/base", output=tmp_path / "out")
    assert (result.base["ref"], result.base["name"]) == ("org/base", "org/base")
    story = json.loads((tmp_path / "out" / "regraft.json").read_text())
    assert (story["base"]["name"], story["base"]["revision"]) == ("org/base", "a" * 40)


def test_a_pipeline_that_was_merged_can_be_merged_over_again(tmp_path):
    base = factories.pipeline_folder(tmp_path / "base")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    file = write(tmp_path / "a.safetensors", lora(name, 32, 32, 2, 2))
    out = tmp_path / "out"
    for strength in (1, 2):
        result = regraft.merge(file, base=base, output=out, strength=strength, overwrite=True)
    assert result.adapters[0]["strength"] == 2
    (out / "unet" / "mine.txt").write_text("not regraft's")
    with pytest.raises(OutputExists):
        regraft.merge(file, base=base, output=out, overwrite=True)
