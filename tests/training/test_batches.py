"""Accumulated batches are one batch; half precision trains fp32 numbers in every family."""

from __future__ import annotations

import shutil

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from regraft.files import TensorFile
from regraft.running import open_model
from regraft.training import train
from regraft.training.items import objective_for
from regraft.training.loop import Run
from regraft.training.state import Unfinished
from tests.running import bases
from tests.training.runs import WITH_CHANGE, WITHOUT, logged, settings, short
from tests.training.test_previews import subjects


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tiny Llama, and texts of different lengths."""
    folder = tmp_path_factory.mktemp("words")
    bases.language_folder(folder / "base")
    (folder / "texts.txt").write_text("\n\n".join("a b c d e 0 1 2"[: 2 * i + 3] for i in range(6)))
    return {"base": str(folder / "base"), "data": str(folder / "texts.txt")}


def agree(one, two):
    for first, second in zip(logged(one), logged(two), strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    first, second = (TensorFile(folder / "adapter_model.safetensors") for folder in (one, two))
    for name in first:
        torch.testing.assert_close(first.read(name), second.read(name), rtol=2e-3, atol=2e-5)


def test_accumulated_batches_of_texts_are_one_batch(words, tmp_path):
    more = {"steps": 3, "validation": 0.1, "targets": r".*q_proj"}
    train(short(words, **more, batch=4), tmp_path / "one")
    train(short(words, **more, batch=1, accumulate=4), tmp_path / "two")
    agree(tmp_path / "one", tmp_path / "two")


def test_accumulated_batches_of_pictures_are_one_batch(tiny, tmp_path):
    more = {"steps": 3, "validation": 0, "targets": r"mid.*to_[qk]", "prior": tiny["data"]}
    more |= {"cut_mix": 0.7, "cut_mix_prompt": "{left} {right}", "unmix_weight": 0.5}
    where = {**tiny, "data": subjects(tmp_path / "data")}
    train(short(where, **more, batch=4), tmp_path / "one")
    train(short(where, **more, batch=2, accumulate=2), tmp_path / "two")
    agree(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("language", family) for family in WITH_CHANGE + WITHOUT),
        *(("diffusion", family) for family in (*WITH_CHANGE, "bottleneck")),
    ],
)
def test_every_family_trains_in_bf16(kind, family, checkpointing, words, tiny, tmp_path):
    if checkpointing and family == "prefix":
        pytest.skip("PEFT has no gradient checkpointing for prefixes")
    more = {"precision": "bf16", "gradient_checkpointing": checkpointing, "steps": 2, "batch": 2}
    if kind == "diffusion":
        more["targets"] = r"mid.*(to_out\.0)" if family == "bottleneck" else r"mid.*to_[qv]"
    chosen = settings(words if kind == "language" else tiny, family, validation=0, **more)
    model = open_model(chosen.base, dtype=torch.bfloat16)
    run = Run(chosen, model, objective_for(model, chosen), Unfinished(tmp_path / "out"))
    before = {name: p.detach().clone() for name, p in run.trained.items()}
    assert {p.dtype for p in before.values()} == {torch.float32}
    assert {p.dtype for p in model.modules[run.objective.component].parameters()} == {
        torch.float32,
        torch.bfloat16,
    } or family in ("prompt", "prefix")
    run.go()
    assert any(not torch.equal(p, before[name]) for name, p in run.trained.items())
    assert all(torch.isfinite(t).all() for t in run.tensors.values())


def test_two_subjects_and_their_classes_on_sdxl(tmp_path):
    base = bases.stable_diffusion_folder(tmp_path / "xl", xl=True)
    where = {"base": str(base), "data": subjects(tmp_path / "data")}
    more = {"prior": where["data"], "cut_mix": 1.0, "cut_mix_prompt": "{left} {right}"}
    more |= {"steps": 1, "batch": 2, "unmix_weight": 0.1, "gradient_checkpointing": True}
    result = train(short(where, **more, targets=r"mid.*to_q"), tmp_path / "out")
    [row] = logged(tmp_path / "out")
    assert row["unmix"] > 0
    assert row["prior"] > 0
    assert not result.notes


def test_captions_that_the_text_encoder_does_not_read_whole_are_said(tiny, tmp_path):
    data = tmp_path / "pictures"
    shutil.copytree(tiny["data"], data)
    told = {"base": tiny["base"], "data": str(data)}
    model = open_model(tiny["base"])
    assert objective_for(model, settings(told)).notes == []
    (data / "a.txt").write_text("a b c d e f g h " * 20)
    assert "captions cut off at 8 tokens" in objective_for(model, settings(told)).notes[0]
