"""``regraft inspect`` on a terminal of 80 columns, and with pickles."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.test_cli import call
from tests.methods.worlds import make_base, write_lora


@pytest.fixture
def cli(capsys, monkeypatch):
    return lambda *args: call(capsys, monkeypatch, *args)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_the_table_fits_and_shows_what_matters(cli, tmp_path):
    meta = {"modelspec.trigger_phrase": "ink\x1b[31mstyle", "ss_training_comment": "x" * 9999}
    path = write_lora(tmp_path / "lora.safetensors", metadata=meta)
    code, out, _ = cli("inspect", path, "--spectrum")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    for word in ("family", "dialect", "ranks", "scale", "trigger words", "sha256", "eff. rank"):
        assert word in out


def test_a_base(cli, tmp_path):
    make_base(tmp_path / "base", 0)
    code, out, _ = cli("inspect", tmp_path / "base", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["kind"], found["quantised"]) == ("base", {})


def test_a_checkpoint_with_names_like_an_adapters_is_a_base(cli, tmp_path):
    tensors = {f"layers.{i}.weight": torch.ones(8, 8) for i in range(5)}
    save_file({**tensors, "layers.0.diff": torch.ones(8, 8)}, tmp_path / "a.safetensors")
    code, out, _ = cli("inspect", tmp_path / "a.safetensors", "--json")
    assert (code, json.loads(out)["kind"]) == (0, "base")


def test_pickles_need_the_option_and_come_with_a_warning(cli, tmp_path):
    torch.save(
        {"unet.a.lora_A.weight": torch.ones(2, 8), "unet.a.lora_B.weight": torch.ones(8, 2)},
        tmp_path / "a.pt",
    )
    code, out, err = cli("inspect", tmp_path / "a.pt")
    assert (code, out) == (2, "")
    assert "--allow-pickle" in err
    code, out, err = cli("inspect", tmp_path / "a.pt", "--allow-pickle", "--json")
    assert code == 0
    assert "CVE-2025-32434" in err
    assert json.loads(out)["file"] == str(tmp_path / "a.pt")
