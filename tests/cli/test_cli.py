"""The command line as a user meets it: output streams, exit codes, messages without tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.cli.main import main
from tests.methods.worlds import SHAPES


def call(capsys, monkeypatch, *args):
    """(exit code, stdout, stderr) of one command."""
    monkeypatch.setattr(sys, "argv", ["regraft", *map(str, args)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture
def cli(capsys, monkeypatch):
    return lambda *args: call(capsys, monkeypatch, *args)


def transfer_args(world, *more):
    return (
        "transfer",
        world / "lora.safetensors",
        "--from",
        world / "v1",
        "--to",
        world / "v2",
        "-o",
        world / "out.safetensors",
        *more,
    )


def test_transfer_json_is_alone_on_stdout(cli, world):
    code, out, err = cli(*transfer_args(world, "--json"))
    found = json.loads(out)
    assert code == 0
    assert err == ""
    wanted = {
        "verdict",
        "method",
        "sites_carried",
        "sites_refused",
        "energy_kept",
        "energy_kept_by_copy",
        "output",
        "sha256",
    }
    assert wanted <= set(found)
    assert found["sites_carried"] == len(SHAPES)


def test_transfer_summary_and_quiet(cli, world):
    code, out, _ = cli(*transfer_args(world))
    assert code == 0
    assert "Verdict: copy." in out
    assert "energy kept" in out
    code, out, err = cli(*transfer_args(world, "--overwrite", "--quiet"))
    assert (code, out, err) == (0, "", "")


def test_the_report_is_written(cli, world):
    code, _, _ = cli(*transfer_args(world, "--report", world / "page.html"))
    assert code == 0
    assert "<html" in (world / "page.html").read_text()


def test_dont_exits_1_and_still_prints_json(cli, world):
    args = (
        "transfer",
        world / "lora.safetensors",
        "--from",
        world / "v1",
        "--to",
        world / "stranger",
        "-o",
        world / "o.safetensors",
        "--json",
    )
    code, out, err = cli(*args)
    assert code == 1
    assert json.loads(out)["verdict"] == "don't"
    assert "Verdict: don't." in err
    assert not (world / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("nothing.safetensors", None, None), "No such file"),
        ((None, "missing-base", None), "No such file or folder"),
        ((None, None, "lora.safetensors"), "adapter, not a base"),
        (("v1/model.safetensors", None, None), "None of its"),
    ],
)
def test_unreadable_inputs_exit_2(cli, world, change, says, monkeypatch):
    monkeypatch.chdir(world)
    given = [c or d for c, d in zip(change, ("lora.safetensors", "v1", "v2"), strict=True)]
    code, out, err = cli(
        "transfer", given[0], "--from", given[1], "--to", given[2], "-o", "o.safetensors"
    )
    assert code == 2
    assert out == ""
    assert says in " ".join(err.split())
    assert not Path("o.safetensors").exists()


def test_usage_errors_exit_2(cli, world):
    assert cli("transfer", "x")[0] == 2
    assert cli("transfer", "x", "--from", "a", "--to", "b")[0] == 2
    code, _, err = cli(*transfer_args(world, "--rank", "lots"))
    assert code == 2
    assert "not a rank" in err


def test_messages_do_not_pass_on_control_characters(cli, world):
    code, _, err = cli("inspect", "evil\x1b[31m[bold]name.safetensors")
    assert code == 2
    assert "\x1b[31m" not in err
    assert "[bold]name" in err


def test_inspect_adapter_and_base(cli, world):
    code, out, _ = cli("inspect", world / "lora.safetensors", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["kind"], found["family"], found["dialect"]) == ("adapter", "lora", "diffusers")
    assert found["sites"] == len(SHAPES)
    assert found["trigger_words"] == "inkstyle"
    code, out, _ = cli("inspect", world / "v1", "--json")
    assert (code, json.loads(out)["kind"]) == (0, "base")
    for file in ("lora.safetensors", "v1"):
        code, out, _ = cli("inspect", world / file)
        assert code == 0
        assert "sites" in out


def test_compare(cli, world):
    code, out, _ = cli("compare", world / "v1", world / "v2", "--json", "--dimension", "6")
    found = json.loads(out)
    assert code == 0
    assert found["verdict"] == "copy"
    assert len(found["sites"]) == len(SHAPES)
    for site in found["sites"]:
        assert 0 < site["phi_left"] <= 1.0001
        assert set(site["keeps"]) == {"copy", "lora-x", "prolora"}
    code, out, _ = cli("compare", world / "v1", world / "stranger", "--no-subspaces")
    assert code == 0
    assert "don't" in out
    code, out, _ = cli("compare", world / "v1", world / "v1", "--json")
    assert json.loads(out)["lineage"] == "same weights"


def test_methods(cli):
    code, out, _ = cli("methods", "--json")
    listed = json.loads(out)
    assert code == 0
    assert {m["name"] for m in listed} == {"activation-map", "copy", "lora-x", "prolora"}
    assert all({"needs", "paper", "cost"} <= set(m) for m in listed)
    assert "lora-x" in cli("methods")[1]


def test_version_and_help_from_a_shell():
    for args in (["--version"], ["--help"], ["transfer", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", "from regraft.cli.main import main; main()", *args],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
