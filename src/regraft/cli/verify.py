"""``regraft verify``: whether a file is what its provenance says."""

from __future__ import annotations

from typing import Annotated

import typer

from regraft.cli.screen import AllowPickle, clean, pickles, print_json, progress, stdout
from regraft.verify import verify

_CODES = {"passed": 0, "failed": 1, "inconclusive": 3}


def verify_command(
    out: Annotated[str, typer.Argument(help="What transfer, convert or merge wrote.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="The input adapter; repeat it for a merge of several. Default: the recorded hub "
            "id."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="The source base of a transfer.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", help="The target base of a transfer.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base of a conversion or a merge.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="The calibration data of a transfer, if it had any.")
    ] = None,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Replay what a file's provenance says, and compare: passed, failed or inconclusive."""
    with pickles(allow_pickle), progress(quiet) as follow:
        result = verify(
            out,
            adapter=adapter,
            source=source,
            target=target,
            base=base,
            calibration=calibration,
            progress=follow,
        )
    if json:
        print_json(result.to_dict())
    elif not quiet:
        console = stdout()
        console.print(f"[bold]{result.status.capitalize()}:[/] {clean(result.how)}", soft_wrap=True)
        for check in result.checks:
            console.print(
                f"  {check.status:<12}  {check.name}: {clean(check.detail)}", soft_wrap=True
            )
        console.print(f"  {result.seconds:.1f} seconds")
    if _CODES[result.status]:
        raise typer.Exit(_CODES[result.status])
