"""``regraft methods``: every transfer method, with its needs, paper and cost."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from regraft.cli.screen import print_json, stdout
from regraft.methods import methods


def methods_command(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List every method with its needs, paper and cost."""
    listed = [m.describe() for m in methods()]
    if json:
        print_json(listed)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("method", "what it does", "needs", "cost", "paper"):
        table.add_column(column, overflow="fold")
    for m in listed:
        table.add_row(m["name"], m["title"], "; ".join(m["needs"]), m["cost"], m["paper"])
    stdout().print(table)
