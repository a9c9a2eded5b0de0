"""``regraft methods``: every transfer method, with its needs, paper and cost."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from regraft.cli.screen import print_json, stdout
from regraft.methods import insert_methods, methods


def methods_command(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List every method with its needs, paper and cost."""
    listed = [m.describe() for m in methods()]
    listed += [m.describe() for m in insert_methods()]
    if json:
        print_json(listed)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for column in ("carries", "what it does", "needs", "cost", "paper"):
        table.add_column(column, overflow="fold")
    for m in listed:
        carries, needs = ", ".join(m["carries"]), "; ".join(m["needs"])
        table.add_row(m["name"], carries, m["title"], needs, m["cost"], m["paper"])
    stdout().print(table)
