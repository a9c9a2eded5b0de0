"""The table of docs/formats.md is the catalogue's, and says something in every cell."""

from __future__ import annotations

from cogapp import Cog

from tests.docs.pages import ROOT, text
from tests.wild.table import render

PAGE = ROOT / "docs" / "formats.md"


def test_the_page_is_up_to_date(capsys):
    assert Cog().main(["cog", "--check", str(PAGE)]) == 0, (
        f"run `make docs`\n{capsys.readouterr().out}"
    )
    assert render() in text(PAGE)


def test_no_cell_is_empty():
    rows = [line for line in render().splitlines() if line.startswith("|")]
    for row in rows:
        assert all(cell.strip() for cell in row.strip("|").split("|")), row


def test_every_mark_has_its_note():
    page = render()
    numbers = {int(line.partition(".")[0]) for line in page.splitlines() if line[:1].isdigit()}
    assert numbers == set(range(1, len(numbers) + 1))
    for number in numbers:
        assert f"[{number}]" in page
