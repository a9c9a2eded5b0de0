"""``regraft demo``: the main job on the embedded pair."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from regraft.cli.screen import clean, percent, print_json, progress, stderr, stdout
from regraft.errors import MissingDependency


def demo_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the page.")] = Path(
        "regraft-demo"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Carry a real adapter between two small embedded bases and show what carried."""
    try:
        from regraft.demo.run import run_demo
    except ImportError as error:
        raise MissingDependency(
            f"The demo needs the package {error.name!r}.", fix="pip install 'regraft[demo]'"
        ) from error
    if not quiet and not json:
        stderr().print("Carrying a style adapter from base v1 to base v2 (about a minute) …")
    with progress(quiet) as follow:
        found = run_demo(output, progress=follow)
    if json:
        print_json(asdict(found))
    elif not quiet:
        console, result = stdout(), found.result
        console.print(f"[bold]Verdict: {result.verdict}.[/] {clean(result.why)}")
        console.print(f"energy kept {percent(result.energy_kept)}, {result.sites_carried} sites")
        for name, value in sorted(found.retention.items(), key=lambda item: -item[1]):
            console.print(f"retention of {name}: R = {value:.2f}")
        console.print(f"The page: {clean(found.page.resolve())}", soft_wrap=True)
