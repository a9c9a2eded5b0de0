"""The main line on small bases: accounting, rank rules, reproducibility, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import regraft
from regraft import errors
from regraft.adapters import Site, delta
from tests.methods.worlds import SHAPES, new_library, save_base


def run(world, **options):
    options = {"source": world / "v1", "target": world / "v2", "device": "cpu", **options}
    options.setdefault("library", new_library(world / "cache"))
    return regraft.transfer(world / "lora.safetensors", **options)


def read_delta(path: Path, base: Path) -> dict[Site, torch.Tensor]:
    adapter = regraft.load_adapter(path, regraft.open_base(base))
    return {site: delta(u) for site, u in adapter.updates.items()}


def test_auto_copies_between_relatives_and_says_why(world):
    result = run(world, output=world / "out.safetensors")
    assert (result.verdict, result.method) == ("copy", "copy")
    assert result.energy_kept == result.energy_kept_by_copy == 1.0
    assert result.sites_carried == len(SHAPES)
    assert result.sha256 == hashlib.sha256((world / "out.safetensors").read_bytes()).hexdigest()
    before = read_delta(world / "lora.safetensors", world / "v1")
    after = read_delta(world / "out.safetensors", world / "v2")
    assert all(torch.equal(before[s], after[s]) for s in before)


def test_auto_refuses_strangers_and_writes_nothing(world):
    with pytest.raises(errors.NotRecommended, match="not related") as caught:
        run(world, target=world / "stranger", output=world / "out.safetensors")
    assert caught.value.exit_code == 1
    assert caught.value.result.verdict == "don't"
    assert not (world / "out.safetensors").exists()


def test_a_named_method_is_the_users_decision(world):
    result = run(world, target=world / "stranger", output=world / "out.safetensors", method="copy")
    assert (result.verdict, result.method) == ("don't", "copy")
    assert (world / "out.safetensors").exists()


@pytest.mark.parametrize("method", ["lora-x", "prolora"])
def test_energy_kept_is_what_the_file_holds(world, method):
    result = run(world, output=world / "o.safetensors", method=method, dimension=6, threshold=0.0)
    before = read_delta(world / "lora.safetensors", world / "v1")
    after = read_delta(world / "o.safetensors", world / "v2")
    held = sum(float(d.square().sum()) for d in after.values())
    whole = sum(float(d.square().sum()) for d in before.values())
    assert result.energy_kept == pytest.approx(held / whole, rel=1e-4)
    assert result.energy_kept < 1
    for entry in result.sites:
        site = Site("", entry.site)
        share = float(after[site].square().sum() / before[site].square().sum())
        assert entry.kept == pytest.approx(share, rel=1e-4)
        assert entry.rank_out <= entry.rank_in


def test_every_site_is_carried_or_refused_with_a_reason(world):
    result = run(
        world,
        output=world / "o.safetensors",
        method="prolora",
        dimension=4,
        threshold=0.93,
        filter_blocks=["conv"],
    )
    carried = {s.site for s in result.sites}
    assert carried | set(result.sites_refused) == set(SHAPES)
    assert not carried & set(result.sites_refused)
    assert "filter" in result.sites_refused["layers.1.conv"]
    written = {k.split(".lora_")[0] for k in load_file(world / "o.safetensors")}
    assert written == carried


def test_a_transfer_that_carries_nothing_is_an_error(world):
    with pytest.raises(errors.NothingCarried, match="filter"):
        run(world, output=world / "o.safetensors", method="copy", filter_blocks=["."])
    assert not (world / "o.safetensors").exists()


def test_an_adapter_of_zeros_is_an_error(world):
    tensors = {k: torch.zeros_like(v) for k, v in load_file(world / "lora.safetensors").items()}
    save_file(tensors, world / "lora.safetensors")
    with pytest.raises(errors.NothingCarried, match="zero"):
        run(world, output=world / "o.safetensors")


@pytest.mark.parametrize(("options", "ranks"), [({"rank": 2}, {2}), ({"rank_energy": 0.6}, {1, 2})])
def test_rank_rules_cut_and_report_what_it_cost(world, options, ranks):
    result = run(world, output=world / "o.safetensors", method="copy", **options)
    assert {s.rank_out for s in result.sites} <= ranks
    assert result.energy_kept < 1 == result.energy_kept_by_copy
    if "rank_energy" in options:
        assert all(s.kept >= 0.6 - 1e-6 for s in result.sites)


def test_rank_full_keeps_prolora_exact(world):
    cut = run(world, method="prolora", dimension=6, threshold=0.0, dry_run=True)
    full = run(world, method="prolora", dimension=6, threshold=0.0, dry_run=True, rank="full")
    assert {s.rank_out for s in full.sites} == {6}
    assert full.energy_kept >= cut.energy_kept


@pytest.mark.parametrize("dialect", ["diffusers", "peft", "lora-x"])
def test_equal_inputs_give_equal_bytes_in_another_process(world, dialect):
    name = "o" if dialect == "peft" else "o.safetensors"
    hashes = set()
    for index in range(2):
        code = textwrap.dedent(f"""
            import regraft
            r = regraft.transfer({str(world / "lora.safetensors")!r}, source={str(world / "v1")!r},
                target={str(world / "v2")!r}, output={str(world / f"{index}{name}")!r},
                method="lora-x", dimension=6, dialect={dialect!r})
            print(r.sha256)
        """)
        env = {**os.environ, "REGRAFT_CACHE": str(world / f"cache{index}")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        hashes.add(done.stdout.strip())
    assert len(hashes) == 1


def test_provenance_tells_how_to_repeat_it(world):
    result = run(world, output=world / "o.safetensors", method="prolora", dimension=6, threshold=0)
    with safe_open(world / "o.safetensors", "pt") as file:
        meta = file.metadata()
    story = json.loads(meta["regraft"])
    assert meta["modelspec.trigger_phrase"] == "inkstyle"
    assert story["method"] == "prolora"
    assert story["parameters"]["dimension"] == "6"
    assert story["adapter"]["sha256"] == result.adapter["sha256"]
    assert len(story["source"]["sha256_of_used_weights"]) == 64
    assert story["source"]["sha256_of_used_weights"] != story["target"]["sha256_of_used_weights"]
    assert set(story["versions"]) == {"regraft", "engine", "torch"}
    assert str(world) not in meta["regraft"]


def test_the_callers_random_state_is_left_alone(world):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run(world, dry_run=True, seed=99)
    assert torch.equal(torch.rand(3), expected)


def test_dry_run_writes_nothing(world):
    result = run(world, output=world / "o.safetensors", report=world / "p.html", dry_run=True)
    assert result.sites_carried == len(SHAPES)
    assert result.output is None
    assert not (world / "o.safetensors").exists()
    assert not (world / "p.html").exists()


def test_existing_outputs_are_kept_unless_overwriting(world):
    (world / "o.safetensors").write_bytes(b"mine")
    with pytest.raises(errors.OutputExists, match="--overwrite"):
        run(world, output=world / "o.safetensors")
    assert (world / "o.safetensors").read_bytes() == b"mine"
    run(world, output=world / "o.safetensors", overwrite=True)
    assert (world / "o.safetensors").read_bytes() != b"mine"


def test_killing_it_leaves_the_old_output_whole(world):
    """SIGKILL while the output is being written: the old file stays, the next run works."""
    out = world / "o.safetensors"
    out.write_bytes(b"old")
    code = textwrap.dedent(f"""
        import os, signal, regraft
        import regraft.dialects.write as write
        real = write.serialize
        def killed(path, tensors, metadata):
            real(path, tensors, metadata)
            os.kill(os.getpid(), signal.SIGKILL)
        write.serialize = killed
        regraft.transfer({str(world / "lora.safetensors")!r}, source={str(world / "v1")!r},
            target={str(world / "v2")!r}, output={str(out)!r}, overwrite=True)
    """)
    env = {**os.environ, "REGRAFT_CACHE": str(world / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert out.read_bytes() == b"old"
    assert run(world, output=out, overwrite=True).sha256


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_output_dtype(world, dtype):
    run(world, output=world / "o.safetensors", dtype=dtype)
    want = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert {t.dtype for t in load_file(world / "o.safetensors").values()} == {want}


def test_values_that_do_not_fit_fp16_are_an_error(world):
    tensors = load_file(world / "lora.safetensors")
    tensors["layers.0.square.lora_B.weight"] *= 1e6
    save_file(tensors, world / "lora.safetensors")
    with pytest.raises(errors.OutputFailed, match="bf16"):
        run(world, output=world / "o.safetensors", dtype="fp16")
    assert not (world / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "magic"}, errors.UnknownMethod),
        ({"dialect": "latin"}, errors.BadOption),
        ({"rank": 0}, errors.BadOption),
        ({"rank": 2, "rank_energy": 0.5}, errors.BadOption),
        ({"rank_energy": 1.5}, errors.BadOption),
        ({"dtype": "int3"}, errors.BadOption),
        ({"dimension": "many"}, errors.BadOption),
        ({"threshold": 2.0}, errors.BadOption),
        ({"method": "copy", "threshold": 0.5}, errors.BadOption),
        ({"method": "lora-x", "cross_terms": True}, errors.BadOption),
        ({"method": "prolora", "align": "rank-order"}, errors.BadOption),
        ({"dialect": "peft"}, errors.BadOption),
        ({"filter_blocks": ["("]}, errors.BadOption),
        ({"device": "abacus"}, errors.BadOption),
        ({"pairing": "dice", "method": "copy"}, errors.BadOption),
        ({"source": "nowhere"}, errors.InputNotFound),
    ],
)
def test_bad_options_are_named(world, options, error):
    options.setdefault("library", None)
    with pytest.raises(error):
        run(world, output=world / "o.safetensors", **options)
    assert not (world / "o.safetensors").exists()


def test_a_pruned_target_is_carried_by_similarity(tmp_path):
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(20, 20, generator=g) for _ in range(4)]
    save_base(tmp_path / "v1", {f"blocks.{i}.q": w for i, w in enumerate(weights)})
    save_base(tmp_path / "v2", {"blocks.0.q": weights[0], "blocks.1.q": 1.01 * weights[3]})
    tensors = {}
    for i in range(4):
        tensors[f"blocks.{i}.q.lora_A.weight"] = torch.randn(2, 20, generator=g)
        tensors[f"blocks.{i}.q.lora_B.weight"] = torch.randn(20, 2, generator=g)
    save_file(tensors, tmp_path / "lora.safetensors")
    result = regraft.transfer(
        tmp_path / "lora.safetensors",
        source=tmp_path / "v1",
        target=tmp_path / "v2",
        output=tmp_path / "o.safetensors",
    )
    # Half of the adapter's blocks have no place on the target: say so, and carry the rest.
    assert result.verdict == "carry"
    assert {s.site: s.source for s in result.sites} == {
        "blocks.0.q": "blocks.0.q",
        "blocks.1.q": "blocks.3.q",
    }
    assert set(result.sites_refused) == {"blocks.1.q", "blocks.2.q"}


def test_a_quantised_target_is_named_with_its_cost(world, tmp_path):
    tensors = {}
    for name, weight in load_file(world / "v2" / "model.safetensors").items():
        scale = weight.abs().max() / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".scale_weight")] = scale.float()
    save_file({**tensors, "scaled_fp8": torch.zeros(2)}, tmp_path / "fp8.safetensors")
    result = run(world, target=tmp_path / "fp8.safetensors", method="lora-x", dimension=8)
    assert result.target["quantised"] == {"scaled fp8": len(SHAPES)}
    assert any("scaled fp8" in note and "16-bit" in note for note in result.notes)
    plain = run(world, method="lora-x", dimension=8)
    assert plain.target["quantised"] == {}
    assert not any("quantised" in note for note in plain.notes)
    assert result.energy_kept == pytest.approx(plain.energy_kept, abs=0.05)
    found = regraft.compare(world / "v1", tmp_path / "fp8.safetensors", subspaces=False)
    assert any("scaled fp8" in note for note in found.notes)
