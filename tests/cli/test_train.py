"""``regraft train`` as a user meets it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from tests.cli.test_cli import cli  # noqa: F401  (a fixture)
from tests.running import bases


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config with a tiny Llama and a few texts."""
    folder = tmp_path_factory.mktemp("train")
    bases.language_folder(folder / "base")
    (folder / "texts.txt").write_text("a b c d\n\nb c d e\n\nc d e a\n\nd e a b\n")
    (folder / "run.toml").write_text(
        f'base = "{folder / "base"}"\ndata = "{folder / "texts.txt"}"\n'
        'family = "lora"\nrank = 2\nsteps = 4\nbatch = 2\nlr = 1e-2\ndevice = "cpu"\n'
        "targets = '.*layers\\.0\\..*_proj'\n[options]\nlora_dropout = 0.1\n"
    )
    return folder / "run.toml"


def test_a_config_trains_and_options_win_over_it(cli, config, tmp_path):  # noqa: F811
    code, out, _ = cli("train", config, "-o", tmp_path / "out", "--steps", "2", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["steps"] == 2
    assert found["family"] == "lora"
    assert found["held_out"] == 1
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_dropout"]) == (2, 0.1)


def test_the_summary_and_the_next_commands(cli, config, tmp_path):  # noqa: F811
    code, out, _ = cli("train", config, "-o", tmp_path / "out")
    assert code == 0
    for words in ("family", "lora", "held-out loss", "4", "sha256"):
        assert words in out
    code, out, _ = cli("inspect", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["families"]
    code, _, err = cli("train", config, "-o", tmp_path / "out")
    assert code == 2
    assert "already exists" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = ", "Not valid TOML"),
        ("colour = 1\nbase = 'b'\ndata = 'd'", "no setting 'colour'"),
        ("data = 'd'", "No base was named"),
        ("base = 'nowhere'\ndata = 'd'", "nowhere"),
        ("base = 'b'\ndata = 'd'\noutput = 3", "not a name"),
    ],
)
def test_a_bad_config_is_a_clear_error(text, words, cli, tmp_path):  # noqa: F811
    (tmp_path / "bad.toml").write_text(text)
    code, _, err = cli("train", tmp_path / "bad.toml", "-o", tmp_path / "out")
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_no_output_and_no_config(cli, config, tmp_path):  # noqa: F811
    code, _, err = cli("train", config)
    assert code == 2
    assert "No output was named" in err
    code, _, err = cli("train", tmp_path / "missing.toml", "-o", tmp_path / "out")
    assert code == 2
    assert "No such training config" in err
