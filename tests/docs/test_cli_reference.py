"""docs/cli.md is what the program says of itself, and the program leaves nothing unsaid."""

from __future__ import annotations

import inspect

import pytest
from cogapp import Cog
from typer.main import get_command

from regraft import errors
from regraft.cli.main import app
from tests.docs.pages import ROOT, text

PAGE = ROOT / "docs" / "cli.md"
COMMANDS = get_command(app).commands
ERRORS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, errors.RegraftError)
]


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_page_is_up_to_date_whatever_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Cog().main(["cog", "--check", str(PAGE)]) == 0, (
        f"run `make docs`\n{capsys.readouterr().out}"
    )


def test_the_page_has_no_terminal_codes_and_no_trailing_space():
    assert "\x1b" not in text(PAGE)
    assert not [line for line in text(PAGE).splitlines() if line != line.rstrip()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_says_what_it_is(name):
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, f"{name}: {parameter.name} has no help"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_pages(name):
    assert f"## regraft {name}\n" in text(PAGE)
    assert f"regraft {name}" in text(ROOT / "README.md")


def test_every_error_is_in_the_page_with_its_exit_code():
    for kind in ERRORS:
        assert kind.__doc__
        rows = [line for line in text(PAGE).splitlines() if line.startswith(f"| `{kind.__name__}`")]
        assert len(rows) == 1
        assert rows[0].endswith(f"| {kind.exit_code} |")


def test_the_exit_codes_of_the_page_are_all_there_are():
    """3 is no error: it is what verify says when it could not check."""
    assert {kind.exit_code for kind in ERRORS} == {1, 2}
    assert "| 3 | inconclusive: `verify`" in text(PAGE)
