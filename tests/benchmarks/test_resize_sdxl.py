"""The resizing benchmark on tiny shapes: its error figures, its scaling, and every way it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import resizing
from benchmarks.resize_inputs import FAMILIES, delta, factors, read, read_weight, write_inputs
from benchmarks.resize_sdxl import OURS, jobs, measure, sample, scaled, tables

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
SHAPES = {
    f"{BLOCK}.attn1.to_q.weight": (32, 32),
    f"{BLOCK}.attn1.to_k.weight": (32, 32),
    f"{BLOCK}.attn2.to_k.weight": (32, 48),
    f"{BLOCK}.ff.net.0.proj.weight": (128, 32),
    "mid_block.attentions.0.proj_in.weight": (32, 32),
    "add_embedding.linear_1.weight": (32, 48),
}
CONFIG = {"_class_name": "UNet2DConditionModel"}
RANKS = {"lora": 4, "loha": 12, "lokr": 12, "dora": 12}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("resize")
    return folder, write_inputs(folder, SHAPES, SHAPES, CONFIG, rank=16)


def run(inputs: tuple[Path, dict], family: str, ways: dict) -> dict:
    """The errors of some ways on one family."""
    folder, plan = inputs
    names = {name: module for name, (module, _) in plan[family].items()}
    base = str(folder / "base") if family == "dora" else None
    adapter, rank = str(folder / f"{family}.safetensors"), RANKS[family]
    outputs = {label: str(folder / f"{family}-{label}.safetensors") for label in ways}
    for label, way in ways.items():
        more = {} if way is resizing.regraft_way else {"names": names}
        found = way(adapter, outputs[label], rank, base=base, **more)
        if more:
            assert set(found["seconds"]) == set(names)
    return resizing.errors(adapter, outputs, names, rank, base)


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_is_the_exact_cut(inputs: tuple[Path, dict], family: str) -> None:
    found = run(inputs, family, {"ours": resizing.regraft_way})
    # where ΔW has full rank, singular values lie close and the cut itself is less sharp
    assert found["ours"]["error"] <= (1e-5 if family == "dora" else 1e-6)
    assert found["ours"]["lost"] == pytest.approx(found["the exact cut"]["lost"], rel=1e-5)


def test_clamping_loses_percents_where_the_full_svd_does_not(inputs: tuple[Path, dict]) -> None:
    ways = {"resize": resizing.sd_resize, "extract": resizing.sd_extract}
    found = run(inputs, "lora", ways)
    assert found["resize"]["error"] < 1e-5
    assert found["extract"]["error"] > 0.01
    assert found["extract"]["worst"] >= found["extract"]["error"]
    assert found["extract"]["lost"] > found["the exact cut"]["lost"]


def test_a_sketch_of_twice_the_rank_is_close_but_not_exact(inputs: tuple[Path, dict]) -> None:
    found = run(inputs, "lora", {"lowrank": resizing.sd_lowrank})
    assert 1e-3 < found["lowrank"]["error"] < 1
    assert found["lowrank"]["lost"] > found["the exact cut"]["lost"]


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_is_right_except_for_dora(inputs: tuple[Path, dict], family: str) -> None:
    pytest.importorskip("peft")
    error = run(inputs, family, {"peft": resizing.peft})["peft"]["error"]
    assert error > 0.01 if family == "dora" else error < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_the_full_matrices(inputs: tuple[Path, dict], family: str) -> None:
    folder, plan = inputs
    name, (module, shape) = next(iter(plan[family].items()))
    path = folder / f"{family}.safetensors"
    t = {k: v.double() for k, v in read(path, name).items()}
    exact = delta(t, read_weight(folder / "base", module).double())
    assert tuple(exact.shape) == tuple(shape)
    if family == "lora":
        assert torch.allclose(exact, factors(t)[0] @ factors(t)[1])
    u, s, vh = torch.linalg.svd(exact)
    up, down = u[:, :5] * s[:5], vh[:5]
    down[0] *= 1.1
    out = folder / f"{family}-by-hand.safetensors"
    resizing.save_file(resizing.written(name, up, down), out)
    base = str(folder / "base") if family == "dora" else None
    found = resizing.errors(str(path), {"x": str(out)}, {name: module}, 5, base)
    assert found["x"]["error"] == pytest.approx(0.1 * float(s[0] / s[:5].norm()), rel=1e-3)
    kept = float((exact - up @ down).norm() / s.norm())
    assert found["x"]["lost"] == pytest.approx(kept, rel=1e-3)
    assert found["the exact cut"]["lost"] == pytest.approx(float(s[5:].norm() / s.norm()))


def test_the_sample_has_every_shape_and_seconds_scale_by_shape() -> None:
    modules = {f"a{i}": (f"m{i}", (8, 8)) for i in range(9)} | {"b": ("mb", (8, 16))}
    names = sample(modules, 2)
    assert names == sample(modules, 2)
    assert sorted(modules[name][1] for name in names) == [(8, 8), (8, 8), (8, 16)]
    assert all(modules[name][0] == module for name, module in names.items())
    seconds = dict(zip(sorted(names), (1.0, 3.0, 5.0), strict=True))
    assert scaled(seconds, modules) == 9 * 2.0 + 5.0


@pytest.mark.slow
def test_the_small_scale_runs(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    found = measure("small", tmp_path, Console(quiet=True), threads=(1,))
    assert [row["job"] for row in found["jobs"]] == [job.what for job in jobs(64)]
    for row in found["jobs"]:
        assert row["ways"][OURS]["threads"]["1"]["ratio"] == 1
        assert row["ways"][OURS]["error"] < 1e-5
        assert row["ways"][OURS]["modules"] == row["modules"]
    assert len(tables(found)) == 4
