"""From the command line: an insert carried by a map to a stranger, loaded there, verified."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")

from regraft.adapters import Site
from regraft.bases import open_base
from regraft.cli.main import app
from regraft.errors import NotRecommended, RegraftError
from regraft.inserts import calibration, carry
from regraft.inserts.insert import Bottleneck, InsertAdapter
from regraft.inserts.read import load_insert
from regraft.inserts.write import write_insert
from regraft.retention.hosted import hosted
from regraft.running import open_model
from tests.inserts import made
from tests.running.bases import stable_diffusion_folder

CONFIG = {"position": "houlsby", "activation": "swish", "scale": 1.0, "norm": False}


def command(*arguments):
    found = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(found.exception, RegraftError | SystemExit | None), found.exception
    return found


def outputs(base):
    """The layers that end the first attentions of a U-Net, and the numbers they give."""
    found = {
        site.module: base.at(site).shape[0]
        for site in base.weights
        if site.component == "unet" and site.module.endswith("to_out.0")
    }
    return {name: found[name] for name in sorted(found)[:2]}


def bottlenecks(folder, out, seed=0):
    base, draw = open_base(folder), torch.Generator().manual_seed(seed)
    parts = {
        Site("unet", name, "bottleneck"): Bottleneck(
            module=name, position="houlsby", activation="swish", scale=1.0,
            down=torch.randn(2, n, generator=draw), down_bias=torch.zeros(2),
            up=torch.randn(n, 2, generator=draw), up_bias=torch.zeros(n),
        )
        for name, n in outputs(base).items()
    }  # fmt: skip
    adapter = InsertAdapter("bottleneck", parts, CONFIG, name="drawn")
    write_insert(adapter, base, out, dtype=torch.float32, provenance={})
    return out


def test_bottlenecks_of_a_u_net_go_to_another_and_are_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "PICTURES", 2)
    monkeypatch.setattr(calibration, "TIMES", (0.3, 0.7))
    source, target = (stable_diffusion_folder(tmp_path / str(n), seed=n) for n in (0, 1))
    adapter, out = bottlenecks(source, tmp_path / "adapter"), tmp_path / "out"
    inputs = ("--from", source, "--to", target)
    told = command(
        "transfer", adapter, *inputs, "-o", out, "--method", "activation-map", "--device", "cpu",
        "--json",
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    result = json.loads(told.stdout)
    assert result["method"] == "activation-map"
    assert len(result["sites"]) == len(outputs(open_base(target)))
    assert not result["sites_refused"]
    assert any("4 noisy pictures" in note for note in result["notes"])
    carried = load_insert(out, target)
    assert {site.module for site in carried.parts} == outputs(open_base(target)).keys()
    model = open_model(target)
    x, condition = torch.ones(1, 4, 8, 8), model.condition([""])
    with torch.no_grad():
        bare = model.predict(x, 0.5, condition)
        with hosted(model, carried):
            changed = model.predict(x, 0.5, condition)
        assert torch.equal(model.predict(x, 0.5, condition), bare)
    assert torch.isfinite(changed).all()
    assert not torch.allclose(changed, bare, atol=1e-4)
    again = command("verify", out, "--adapter", adapter, *inputs)
    assert again.exit_code == 0, again.output
    assert "byte for byte" in again.output


def test_an_insert_is_carried_and_verified_from_the_command_line(world, tmp_path, monkeypatch):
    monkeypatch.setattr(carry, "TEXTS", 8)
    inputs = ("--from", world["base"], "--to", world["other"])
    out = tmp_path / "out"
    told = command(
        "transfer", world["prompt"], *inputs, "-o", out, "--method", "activation-map",
        "--seed", "3", "--device", "cpu",
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert "change followed" in told.output
    ids = torch.tensor([[0, 3, 7]])
    assert torch.isfinite(made.logits(world["other"], out, ids)).all()
    again = command("verify", out, "--adapter", world["prompt"], *inputs)
    assert again.exit_code == 0, again.output
    wrong = command("verify", out, "--adapter", world["prompt"], "--from", world["base"],
                    "--to", world["near"])  # fmt: skip
    assert wrong.exit_code != 0


def test_without_a_map_that_follows_nothing_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setattr(carry, "TEXTS", 8)
    told = command(
        "transfer", world["prompt"], "--from", world["base"], "--to", world["other"],
        "-o", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert isinstance(told.exception, NotRecommended)
    assert not (tmp_path / "out").exists()
