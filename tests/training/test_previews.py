"""What a run shows of itself: grids of pictures, completions, curves; and the whole, resumed."""

from __future__ import annotations

import builtins
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from regraft.errors import BadOption, InputNotFound, MissingDependency, OutputExists
from regraft.running.stable_diffusion import StableDiffusion
from regraft.training import previews, train
from regraft.training.previews import draw_grid, read_prompts, with_held_out
from tests.running import bases
from tests.training.runs import Stop, contents, logged, short, stopping_at
from tests.training.test_subjects import picture

MID = r"mid.*attn2\.to_(q|k)"


@pytest.fixture
def quick(monkeypatch):
    """One step of sampling instead of 25."""
    sample = StableDiffusion.sample

    def once(self, captions, seeds=0, *, steps=25):
        return sample(self, captions, seeds, steps=1)

    monkeypatch.setattr(StableDiffusion, "sample", once)


def test_a_grid_has_a_row_for_each_prompt_and_a_column_for_each_seed():
    def sample(captions, seeds):
        shades = [10 * len(c) + s for c, s in zip(captions, seeds, strict=True)]
        return np.stack([np.full((8, 8, 3), shade, dtype=np.uint8) for shade in shades])

    grid = draw_grid(SimpleNamespace(size=8, sample=sample), ["a", "bb"], 3)
    assert grid.shape == (18, 28, 3)
    assert [[int(grid[i, j, 0]) for j in (0, 10, 20)] for i in (0, 10)] == [
        [10, 11, 12],
        [20, 21, 22],
    ]
    assert (grid[8:10] == 255).all()
    large = SimpleNamespace(size=300, sample=lambda *_: np.zeros((1, 300, 300, 3), np.uint8))
    assert draw_grid(large, ["a"], 1).shape == (256, 256, 3)


def test_prompts_are_texts_lines_of_a_file_or_held_out_items(tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\n  a castle \na fox\n")
    found = read_prompts(["a dog", str(tmp_path / "prompts.txt"), "held-out"])
    assert found == ["a dog", "a fox", "a castle", "held-out"]
    own = [f"item {i}" for i in range(9)]
    assert with_held_out(found, own) == [*found[:3], *own[:4]]
    with pytest.raises(InputNotFound):
        read_prompts(["missing.txt"])
    with pytest.raises(BadOption, match="Nothing is held out"):
        with_held_out(found, [])


def subjects(folder):
    """Two subjects of three pictures each."""
    for i in range(6):
        colours = [(40 * i, 90, 30), (20, 30 * i, 200)]
        picture(folder / "ab"[i % 2] / f"{i}.png", colours[i % 2])
        (folder / "ab"[i % 2] / f"{i}.txt").write_text("ab"[i % 2])
    return str(folder)


def test_a_run_with_everything_that_was_stopped_twice_writes_the_same_bytes(tiny, tmp_path, quick):
    more = {
        **{"steps": 5, "batch": 1, "accumulate": 2, "save_every": 2, "validation": 0.2},
        **{"prior_prompt": ["c", "d"], "prior_count": 2, "prior_weight": 0.5},
        **{"cut_mix": 0.6, "cut_mix_prompt": "{left} {right}", "unmix_weight": 0.1},
        **{"validation_prompts": ["held-out", "c d"], "validation_seeds": 2},
        **{"targets": MID, "tensorboard": True},
    }
    where = {**tiny, "data": subjects(tmp_path / "data")}
    chosen = short(where, family="svdiff", **more)
    train(chosen, tmp_path / "a" / "out")
    for stop in (3, 4):
        with pytest.raises(Stop):
            train(chosen, tmp_path / "b" / "out", resume=True, progress=stopping_at(stop))
    result = train(chosen, tmp_path / "b" / "out", resume=True)
    assert result.resumed_at == 4
    found = contents(tmp_path / "a" / "out")
    assert found == contents(tmp_path / "b" / "out")
    steps = (0, 2, 4, 5)
    assert {f"pictures/step-{n}.png" for n in steps} <= set(found)
    card = found["README.md"].decode()
    assert all(f"![step {n}](pictures/step-{n}.png)" in card for n in steps)
    rows = logged(tmp_path / "a" / "out")
    assert all(row["prior"] > 0 and row["unmix"] >= 0 for row in rows)
    assert any(row["unmix"] > 0 for row in rows)
    assert not (tmp_path / "b" / "out.training").exists()
    curves = read_events(tmp_path / "b" / "out.tensorboard")
    assert curves["loss"] == pytest.approx({i + 1: row["loss"] for i, row in enumerate(rows)})
    assert set(curves["validation"]) == set(steps)


def read_events(folder):
    """Curve -> step -> value, as TensorBoard shows them."""
    loaded = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loaded.EventAccumulator(str(folder))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def test_an_output_with_pictures_is_replaced_but_not_with_other_peoples(tiny, tmp_path, quick):
    more = {"steps": 1, "validation": 0, "targets": MID, "batch": 1}
    train(short(tiny, **more, validation_prompts="a"), tmp_path / "out")
    mine = tmp_path / "out" / "pictures" / "mine.png"
    mine.write_bytes(b"mine")
    with pytest.raises(OutputExists, match=r"pictures/mine\.png"):
        train(short(tiny, **more), tmp_path / "out", overwrite=True)
    mine.unlink()
    train(short(tiny, **more), tmp_path / "out", overwrite=True)
    assert "pictures" not in {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("family", ["lora", "prompt", "prefix"])
def test_completions_are_sampled_at_every_checkpoint(family, tmp_path, monkeypatch):
    monkeypatch.setattr(previews, "LONGEST", 4)
    base = bases.language_folder(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text('{"prompt": "a b", "completion": "c d e"}\n' * 4)
    where = {"base": str(base), "data": str(tmp_path / "data.jsonl")}
    more = {"steps": 2, "save_every": 1, "batch": 2, "validation": 0.2, "family": family}
    chosen = short(where, **more, validation_prompts=["held-out", "e"], validation_seeds=2)
    train(chosen, tmp_path / "out")
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(r["step"], r["prompt"], r["seed"]) for r in rows] == [
        (step, prompt, seed) for step in (0, 1, 2) for prompt in ("a b", "e") for seed in (0, 1)
    ]
    assert "| a b | 0 |" in (tmp_path / "out" / "README.md").read_text()
    train(chosen, tmp_path / "again")
    assert (
        contents(tmp_path / "again")["samples.jsonl"] == contents(tmp_path / "out")["samples.jsonl"]
    )


def test_curves_are_beside_the_output_which_does_not_depend_on_them(tiny, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, **how):
            written.append(how)

        def __getattr__(self, name):
            return lambda *args, **kwargs: written.append((name, args))

    stub = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    more = {"steps": 2, "validation": 0.2, "targets": MID, "batch": 1}
    train(short(tiny, **more), tmp_path / "out", overwrite=True)
    without = contents(tmp_path / "out")
    train(short(tiny, **more, tensorboard=True), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == without
    assert written[0] == {"log_dir": str(tmp_path / "out.tensorboard"), "purge_step": 0}
    assert {args[0] for name, args in written[1:-1]} == {"loss", "lr", "validation"}
    assert written[-1][0] == "close"


def test_without_the_package_curves_are_refused_before_anything_is_done(
    tiny, tmp_path, monkeypatch
):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch.utils.tensorboard":
            raise ImportError(name="tensorboard")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match="tensorboard"):
        train(short(tiny, tensorboard=True), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_paper_preset_prints_how_to_judge(tiny, tmp_path):
    more = {"preset": "paper", "steps": 1, "batch": 1, "validation": 0, "rank": 2}
    train(short(tiny, **more, family="lora-x", targets=MID), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "regraft measure out --to sd --data HELD-OUT" in card
    assert "--draw 30 --captions 30" in card
    assert "900 pictures" in card
