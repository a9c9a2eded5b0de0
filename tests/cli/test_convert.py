"""``regraft convert`` as a user meets it."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.cli.test_cli import call
from tests.convert.files import kohya, lora, rand, save


@pytest.fixture
def cli(capsys, monkeypatch):
    return lambda *args: call(capsys, monkeypatch, *args)


def test_json_is_alone_on_stdout(cli, tmp_path):
    path = kohya(tmp_path / "a.safetensors")
    code, out, err = cli("convert", path, "-o", tmp_path / "o.safetensors", "--rank", 2, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["energy_kept"] < 1
    assert [s["rank_out"] for s in found["sites"]] == [2, 2, 2]
    assert found["bytes_out"] == (tmp_path / "o.safetensors").stat().st_size


def test_the_summary_says_what_was_lost(cli, tmp_path):
    path = kohya(tmp_path / "a.safetensors")
    code, out, _ = cli("convert", path, "-o", tmp_path / "o.safetensors", "--rank", "0.9")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("energy kept"))
    assert row.rstrip().endswith("%")
    assert "3 sites, rank 4–6 → " in out
    args = ("convert", path, "-o", tmp_path / "p.safetensors")
    row = next(line for line in cli(*args)[1].splitlines() if line.startswith("energy kept"))
    assert row.split() == ["energy", "kept", "all"]
    assert cli(*args, "--overwrite", "--quiet") == (0, "", "")


def test_a_dry_run_writes_nothing(cli, tmp_path):
    path = kohya(tmp_path / "a.safetensors")
    code, out, _ = cli("convert", path, "--rank", "sv_ratio=3,max=2", "--dry-run")
    assert (code, "dry run" in out) == (0, True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--dialect", "peft"), "--base"),
        (("--rank", "many"), "No rank rule"),
        (("--dialect", "latin"), "No dialect"),
        ((), "No output"),
    ],
)
def test_usage_errors_exit_2(cli, tmp_path, args, says):
    path = kohya(tmp_path / "a.safetensors")
    where = ("-o", tmp_path / "o") if args else ()
    code, out, err = cli("convert", path, *where, *args)
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())


def test_unknown_keys_with_and_without_leave(cli, tmp_path):
    path = save(tmp_path / "a.safetensors", lora("lora_unet_q", 8, 8, 2, 1.0) | {"odd": rand(2)})
    out = tmp_path / "o.safetensors"
    assert cli("convert", path, "-o", out, "--strict")[0] == 2
    code, _, err = cli("convert", path, "-o", out, "--allow-unknown")
    assert code == 0
    assert "refused 1" in err
    assert "odd" not in load_file(out)
