"""Training: it learns, what is written is what was trained, and a stop changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import regraft
from regraft.errors import BadOption, MalformedFile, NonFiniteTensor, OutputExists
from regraft.running import applied, open_model
from regraft.training import FAMILIES, train
from regraft.training.items import objective_for
from tests.running import bases
from tests.training.runs import (
    ASSETS,
    DIFFUSION,
    LANGUAGE,
    WITH_CHANGE,
    WITHOUT,
    Stop,
    contents,
    held_out,
    reloaded_loss,
    settings,
    short,
    stopping_at,
)


@pytest.mark.parametrize("family", WITH_CHANGE + WITHOUT)
def test_every_family_learns_on_a_language_model_and_loads_as_it_was_trained(family, tmp_path):
    chosen = short(LANGUAGE, family=family)
    result = train(chosen, tmp_path / "out")
    assert result.validation < result.validation_before
    assert result.parameters > 0
    assert sorted(contents(tmp_path / "out")) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("log.csv", "training.json"),
    ]
    assert not (tmp_path / "out.training").exists()
    assert reloaded_loss(LANGUAGE, tmp_path / "out", chosen) == pytest.approx(
        result.validation, rel=1e-4
    )


@pytest.mark.parametrize("family", [*WITH_CHANGE, "bottleneck"])
def test_every_family_learns_on_a_diffusion_model_and_loads_as_it_was_trained(
    family, tiny, tmp_path
):
    ends = r"mid.*(ff\.net\.2|to_out\.0)" if family == "bottleneck" else r"mid.*to_[qkv]"
    chosen = short(tiny, family=family, targets=ends, lr=3e-2, steps=6, save_every=50)
    result = train(chosen, tmp_path / "out")
    assert result.loss_last != result.loss_first
    assert result.validation != result.validation_before
    assert reloaded_loss(tiny, tmp_path / "out", chosen) == pytest.approx(
        result.validation, rel=1e-4
    )


@pytest.mark.parametrize("family", ["lora", "lora-x", "svdiff"])
def test_the_small_bases_learn_a_style(family, tmp_path):
    last = r"conv_(in|out)|up_blocks\.2\.resnets.*conv\d"
    lr = 0.01 if family == "lora" else 0.05
    chosen = short(DIFFUSION, family=family, targets=last, lr=lr, batch=8, save_every=50)
    result = train(chosen, tmp_path / "out")
    assert result.validation < result.validation_before


@pytest.mark.parametrize("family", WITH_CHANGE)
@pytest.mark.parametrize("kind", ["language", "diffusion"])
def test_regraft_reads_what_it_trained(family, kind, tiny, tmp_path):
    """The change of weights that Regraft reads does on the bare base what was trained."""
    where = LANGUAGE if kind == "language" else tiny
    targets = r".*layers\.0\.self_attn\.q_proj" if kind == "language" else r"mid.*attn1\.to_q"
    chosen = short(where, family=family, steps=2, targets=targets, lr=0.1)
    result = train(chosen, tmp_path / "out")
    base = regraft.open_base(where["base"])
    adapter = regraft.load_adapter(tmp_path / "out", base=base)
    assert len(adapter.updates) == 1
    assert not adapter.refused
    assert regraft.inspect_file(tmp_path / "out")
    model = open_model(where["base"])
    goal = objective_for(model, chosen)
    rows = held_out(goal, tmp_path / "out")
    module = model.modules[goal.component]
    bare = goal.held_out(module, rows)
    with applied(model, adapter):
        found = goal.held_out(module, rows)
    assert bare == pytest.approx(result.validation_before, rel=1e-6)
    assert abs(found - result.validation) < 1e-2 * abs(bare - result.validation)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("lora", {"options": {"lora_dropout": 0.3}, "schedule": "cosine", "warmup": 2}),
        *((family, {}) for family in FAMILIES if family != "lora"),
    ],
)
def test_a_run_that_was_stopped_writes_the_same_bytes(family, more, tmp_path):
    if family not in WITHOUT:
        more = {**more, "targets": r".*layers\.[01]\.mlp.*proj"}
    chosen = short(LANGUAGE, family=family, **more)
    train(chosen, tmp_path / "a" / "out")
    with pytest.raises(Stop):
        train(chosen, tmp_path / "b" / "out", progress=stopping_at(5))
    assert not (tmp_path / "b" / "out").exists()
    lines = (tmp_path / "b" / "out.training" / "log.csv").read_text().splitlines()
    assert lines[-1].startswith("5,")
    result = train(chosen, tmp_path / "b" / "out", resume=True)
    assert result.resumed_at == 3
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


@pytest.mark.parametrize("family", ["lora", "svdiff"])
def test_a_diffusion_run_that_was_stopped_twice_writes_the_same_bytes(family, tiny, tmp_path):
    chosen = short(tiny, family=family, targets=r"mid.*attn\d.*", snr_gamma=5.0, save_every=2)
    train(chosen, tmp_path / "a" / "out")
    for stop in (3, 7):
        with pytest.raises(Stop):
            train(chosen, tmp_path / "b" / "out", resume=True, progress=stopping_at(stop))
    train(chosen, tmp_path / "b" / "out", resume=True)
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bytes(tmp_path):
    options = [*("--family", "lora-x", "--rank", "4", "--lr", "0.01", "--batch", "2")]
    options += [*("--steps", "120", "--save-every", "10", "--device", "cpu", "-q")]
    options += [*("--base", LANGUAGE["base"], "--data", LANGUAGE["data"], "--validation", "0.02")]

    def command(folder, *more):
        run = "from regraft.cli.main import main; main()"
        return [sys.executable, "-c", run, "train", "-o", str(folder / "out"), *options, *more]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first, second = tmp_path / "a", tmp_path / "b"
    subprocess.run(command(first), env=environment, check=True, capture_output=True)
    process = subprocess.Popen(
        command(second), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = second / "out.training" / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    assert state.exists()
    assert not (second / "out").exists()
    subprocess.run(command(second, "--resume"), env=environment, check=True, capture_output=True)
    assert contents(first / "out") == contents(second / "out")


def test_the_log_has_every_step_and_the_held_out_loss_at_checkpoints(tmp_path):
    chosen = short(LANGUAGE, schedule="cosine", warmup=2)
    result = train(chosen, tmp_path / "out")
    rows = [line.split(",") for line in (tmp_path / "out" / "log.csv").read_text().splitlines()]
    assert rows[0] == ["step", "loss", "lr", "validation"]
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(9)]
    assert [row[0] for row in rows[1:] if row[3]] == ["0", "3", "6", "8"]
    assert float(rows[1][3]) == pytest.approx(result.validation_before)
    assert float(rows[-1][3]) == pytest.approx(result.validation)
    rates = [float(row[2]) for row in rows[2:]]
    assert rates[0] == pytest.approx(5e-3)
    assert rates[1] == rates[2] == pytest.approx(1e-2)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_the_card_says_what_was_trained_and_no_path(tmp_path):
    train(short(LANGUAGE, family="lora-x", steps=1), tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "# mine" in card
    assert "import regraft.tuners" in card
    for text in (card, (tmp_path / "mine" / "training.json").read_text()):
        assert str(tmp_path) not in text
        assert str(ASSETS) not in text
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "v1"
    assert config["inference_mode"] is True


def test_held_out_items_are_not_trained_on(tiny):
    from regraft.training.loop import Run
    from regraft.training.state import Unfinished

    chosen = settings(tiny, validation=0.34, batch=3)
    model = open_model(tiny["base"])
    run = Run(chosen, model, objective_for(model, chosen), Unfinished(Path("out")))
    assert len(run.held_out) == 2
    seen = [row for step in range(4) for row in run._batch(step)]
    assert sorted(seen[:4]) == sorted(seen[4:8]) == sorted(seen[8:]) == run.rows
    assert not set(run.rows) & set(run.held_out)
    assert seen[:4] != seen[4:8] or seen[4:8] != seen[8:], "shuffled anew"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_clean_picture(prediction, tmp_path):
    """γ-clipped SNR times the error of x0 is the weighted error of what is predicted."""
    from regraft.training.denoising import Denoising

    model = open_model(bases.stable_diffusion_folder(tmp_path / "sd", prediction=prediction))
    goal = Denoising.__new__(Denoising)
    goal.model, goal.gamma = model, 5.0
    x0, noise = torch.randn(2, 6, 4, 2, 2)
    t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    x, wanted, step, weight = goal._noisy(x0, noise, t)
    alpha = model.alphas[step].view(-1, 1, 1, 1)
    guess = wanted + 0.1 * torch.randn_like(wanted)
    if prediction == "epsilon":
        clean = (x - (1 - alpha).sqrt() * guess) / alpha.sqrt()
    else:
        clean = alpha.sqrt() * x - (1 - alpha).sqrt() * guess
    snr = (alpha / (1 - alpha)).flatten()
    wrong = (guess - wanted).pow(2).flatten(1).mean(1) * weight
    torch.testing.assert_close(
        wrong, (clean - x0).pow(2).flatten(1).mean(1) * snr.clamp(max=5), rtol=1e-3, atol=1e-6
    )


def test_min_snr_for_rectified_flow():
    from regraft.training.denoising import Denoising

    model = open_model(DIFFUSION["base"])
    goal = Denoising.__new__(Denoising)
    goal.model, goal.gamma = model, 5.0
    x0, noise = torch.randn(2, 4, 12, 4, 4)
    t = torch.tensor([0.05, 0.3, 0.6, 0.95])
    x, wanted, time_, weight = goal._noisy(x0, noise, t)
    guess = wanted + 0.1 * torch.randn_like(wanted)
    clean = x - t.view(-1, 1, 1, 1) * guess
    snr = ((1 - t) / t) ** 2
    wrong = (guess - wanted).pow(2).flatten(1).mean(1) * weight
    torch.testing.assert_close(
        wrong, (clean - x0).pow(2).flatten(1).mean(1) * snr.clamp(max=5), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(time_, t * 1000)


@pytest.mark.parametrize("family", ["lora", "lora-x"])
def test_half_precision_and_gradient_checkpointing(family, tiny, tmp_path):
    more = {"steps": 2, "gradient_checkpointing": True, "validation": 0.2}
    halved = short(tiny, family=family, precision="bf16", **more)
    assert train(halved, tmp_path / "bf16").validation is not None
    plain = train(short(tiny, family=family, **more), tmp_path / "with")
    bare = train(short(tiny, family=family, steps=2, validation=0.2), tmp_path / "without")
    assert plain.loss_last == pytest.approx(bare.loss_last, rel=1e-5)
    tensors = regraft.files.TensorFile(tmp_path / "bf16" / "adapter_model.safetensors")
    assert any(tensors.get(name).dtype == torch.float32 for name in tensors)


def test_long_texts_become_several_items_and_prompts_are_not_learned(tmp_path):
    folder = bases.language_folder(tmp_path / "base")
    (tmp_path / "long.txt").write_text(" ".join("abcde" * 8))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a b", "completion": "c d"}\n')
    model = open_model(folder)
    goal = objective_for(model, settings({"base": str(folder), "data": str(tmp_path / "long.txt")}))
    assert [len(ids) for ids, _ in goal.items] == [16, 16, 11]
    pairs = settings({"base": str(folder), "data": str(tmp_path / "pairs.jsonl")})
    goal = objective_for(model, pairs)
    [(_, labels, share)] = goal.parts([0], torch.Generator(), 8)
    assert share == 1.0
    assert labels[0].tolist()[:3] == [-100] * 3
    assert (labels[0][3:] >= 0).all()


def test_an_unfinished_run_is_not_forgotten_or_mixed_up(tmp_path):
    chosen, out = short(LANGUAGE), tmp_path / "out"
    with pytest.raises(Stop):
        train(chosen, out, progress=stopping_at(4))
    with pytest.raises(OutputExists, match="--resume"):
        train(chosen, out)
    with pytest.raises(BadOption, match="another lr"):
        train(short(LANGUAGE, lr=1e-3), out, resume=True)
    (tmp_path / "out.training" / "state.pt").write_bytes(b"no state")
    with pytest.raises(MalformedFile, match="unfinished run"):
        train(chosen, out, resume=True)
    assert train(chosen, out, overwrite=True).resumed_at == 0
    with pytest.raises(OutputExists):
        train(chosen, out)


def test_a_loss_that_diverges_is_an_error_and_nothing_is_written(tmp_path):
    chosen = short(LANGUAGE, lr=1e30, clip=1e30, steps=8)
    with pytest.raises(NonFiniteTensor, match="loss is"):
        train(chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()
