"""What a file says reaches the screen as text, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from regraft.cli.main import main
from regraft.cli.screen import clean, print_json

EVIL = {
    "colour": "a\x1b[31mb",
    "a line of its own": "a\nError: b",
    "back to the start": "a\rb",
    "C1 control": "a\x9b31mb",
    "turned around": "a\u202eb\u2066c",
    "no width": "a\u200bb",
    "half a character": "a\ud800b",
}


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_names_stay_on_their_line(text):
    shown = clean(text)
    assert shown.isprintable()
    assert shown.startswith("a")


def test_markup_is_text():
    assert clean("[bold]x[/]") == r"\[bold]x\[/]"
    assert clean("Ünïcødé 日本 🐱") == "Ünïcødé 日本 🐱"


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_json_is_escaped_and_comes_back(text, capsys):
    print_json({"k": text})
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert json.loads(out) == {"k": text}


def test_notes_to_programmers_do_not_reach_the_screen():
    """In a process of its own, since pytest makes errors of warnings."""
    code = (
        "import warnings\n"
        "from regraft.cli import main as cli\n"
        "cli.app = lambda: warnings.warn('x will be removed', FutureWarning)\n"
        "cli.main()\n"
    )
    for flags, shown in (([], False), (["-W", "default"], True)):
        run = subprocess.run(
            [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True
        )
        assert ("x will be removed" in run.stderr) is shown


def test_ctrl_c_says_what_is_left(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("regraft.cli.methods.print_json", interrupted)
    monkeypatch.setattr(sys, "argv", ["regraft", "methods", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert "nothing half-written" in capsys.readouterr().err
