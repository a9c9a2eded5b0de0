"""``regraft verify`` as a user meets it: 0 passed, 1 failed, 2 unreadable, 3 inconclusive."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_cli import call, transfer_args
from tests.convert.files import kohya


@pytest.fixture
def cli(capsys, monkeypatch):
    return lambda *args: call(capsys, monkeypatch, *args)


def test_exit_codes_of_a_transfer(cli, world):
    assert cli(*transfer_args(world, "--quiet"))[0] == 0
    out = world / "out.safetensors"
    bases = ("--from", world / "v1", "--to", world / "v2")
    code, said, _ = cli("verify", out, "--adapter", world / "lora.safetensors", *bases)
    assert (code, said.startswith("Passed: byte for byte")) == (0, True)
    code, said, _ = cli("verify", out, *bases, "--json")
    assert (code, json.loads(said)["status"]) == (3, "inconclusive")
    assert cli("verify", world / "lora.safetensors")[0] == 3
    data = bytearray(out.read_bytes())
    data[-1] ^= 255
    out.write_bytes(data)
    code, said, _ = cli("verify", out, *bases)
    assert (code, said.startswith("Failed:")) == (1, True)
    assert cli("verify", world / "nothing.safetensors")[0] == 2
    assert cli("verify", out, "--from", world / "nothing")[0] == 2


def test_a_conversion(cli, tmp_path):
    path, out = kohya(tmp_path / "a.safetensors"), tmp_path / "o.safetensors"
    assert cli("convert", path, "-o", out, "--rank", 3, "-q") == (0, "", "")
    code, said, err = cli("verify", out, "--adapter", path, "--json")
    found = json.loads(said)
    assert (code, err, found["status"], found["operation"]) == (0, "", "passed", "convert")
    assert cli("verify", out, "--adapter", path, "-q") == (0, "", "")


def test_what_a_file_says_of_itself_is_text(cli, tmp_path):
    from safetensors.torch import load_file, save_file

    path = kohya(tmp_path / "a.safetensors")
    story = json.dumps({"format": "\x1b[31m[bold]evil"})
    save_file(load_file(path), tmp_path / "b.safetensors", {"regraft": story})
    code, said, _ = cli("verify", tmp_path / "b.safetensors")
    assert (code, "\x1b[31m" in said, "[bold]evil" in said) == (3, False, True)


def test_a_transfer_that_left_out_unknown_keys_passes(cli, world):
    from safetensors.torch import load_file, save_file

    path = world / "lora.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"odd": next(iter(tensors.values())).clone()}, path)
    assert cli(*transfer_args(world, "--strict"))[0] == 2
    code, out, _ = cli(*transfer_args(world, "--allow-unknown", "--json"))
    assert (code, "odd" in json.loads(out)["sites_refused"]) == (0, True)
    bases = ("--from", world / "v1", "--to", world / "v2")
    assert cli("verify", world / "out.safetensors", "--adapter", path, *bases)[0] == 0


def test_a_conversion_of_a_pickle(cli, tmp_path):
    path, out = tmp_path / "a.pt", tmp_path / "o.safetensors"
    torch.save(load_file(kohya(tmp_path / "a.safetensors")), path)
    assert cli("convert", path, "-o", out, "-q", "--allow-pickle")[0] == 0
    assert "--allow-pickle" in cli("verify", out, "--adapter", path)[2]
    code, said, _ = cli("verify", out, "--adapter", path, "--allow-pickle")
    assert (code, said.startswith("Passed: byte for byte")) == (0, True)
