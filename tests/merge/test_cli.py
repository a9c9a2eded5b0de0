"""``regraft merge`` as a user meets it."""

from __future__ import annotations

import json

import pytest

from tests.cli.test_cli import call
from tests.merge.test_files import adapter, language


@pytest.fixture
def cli(capsys, monkeypatch):
    return lambda *args: call(capsys, monkeypatch, "merge", *args)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return language(tmp_path_factory.mktemp("base") / "base")


def test_json_is_alone_on_stdout_and_tells_what_changed(cli, base, tmp_path):
    a, b = adapter(tmp_path / "a.safetensors", (0,)), adapter(tmp_path / "b.safetensors", (0, 1))
    out = tmp_path / "out"
    strengths = ["--strength", "0.5", "--strength", "-1"]
    code, text, err = cli(a, b, "--base", base, "-o", out, "--json", *strengths)
    found = json.loads(text)
    assert (code, err) == (0, "")
    assert [x["strength"] for x in found["adapters"]] == [0.5, -1]
    assert len(found["sites"]) == 2
    assert found["largest"] in {s["site"] for s in found["sites"]}
    assert found["files"] == ["model.safetensors"]
    assert found["relative_change"] > 0


def test_summary_and_quiet(cli, base, tmp_path):
    a = adapter(tmp_path / "a.safetensors")
    code, out, _ = cli(a, "--base", base, "-o", tmp_path / "out")
    assert code == 0
    assert "relative change" in out
    assert "lost to rounding" in out
    code, out, err = cli(a, "--base", base, "-o", tmp_path / "out", "--overwrite", "-q")
    assert (code, out, err) == (0, "", "")


def test_errors_say_where_and_what_to_do(cli, base, tmp_path):
    a = adapter(tmp_path / "a.safetensors")
    code, out, err = cli(a, "--base", base, "-o", base)
    assert (code, out) == (2, "")
    assert "Choose another name" in err or "never overwritten" in err
    code, _, err = cli(a, "--base", base, "-o", tmp_path / "out.safetensors")
    assert code == 2
    assert "without .safetensors" in err
    code, _, err = cli(base, "--base", base, "-o", tmp_path / "out")
    assert code == 2
    assert "belongs to an adapter" in err
    code, _, err = cli(a, "--base", a, "-o", tmp_path / "out.safetensors")
    assert code == 2
    assert "This is an adapter" in err
