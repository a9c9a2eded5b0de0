"""``regraft merge``: a base with an adapter's change added to its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from regraft.cli.screen import (
    AllowPickle,
    AllowUnknown,
    clean,
    pickles,
    print_json,
    progress,
    stderr,
    stdout,
)
from regraft.merge import merge
from regraft.result import MergeResult


def merge_command(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="adapter",
            help="Hub id, PEFT folder, or .safetensors file; several are added up.",
        ),
    ],
    base: Annotated[
        str, typer.Option(help="Base it was trained on: .safetensors file, folder, or hub id.")
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="File to write for a file, folder for a folder."),
    ],
    strength: Annotated[
        list[float] | None,
        typer.Option(
            help="How much of ΔW is added; once for all, or once for each adapter. Default: 1."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16 or bf16, of all weights of what changes. Default: each as it is."
        ),
    ] = None,
    allow_unknown: AllowUnknown = False,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    lossy: Annotated[
        bool,
        typer.Option(
            "--lossy",
            help="Merge into a quantised base also where its zero points cannot hold it all.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Write the base with the adapter's change added to its weights."""
    with pickles(allow_pickle), progress(quiet) as follow:
        result = merge(
            adapters,
            base=base,
            output=output,
            strength=strength or 1.0,
            dtype=dtype,
            allow_unknown=allow_unknown,
            lossy=lossy,
            overwrite=overwrite,
            progress=follow,
        )
    if json:
        print_json(result.to_dict())
    elif not quiet:
        _summary(result)


def _summary(result: MergeResult) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for own in result.adapters:
        table.add_row(
            "adapter", f"{clean(own['name'])} ({clean(own['family'])}) × {own['strength']:g}"
        )
    table.add_row("base", clean(result.base["name"]))
    table.add_row("sites", f"{len(result.sites)} changed, refused {len(result.sites_refused)}")
    table.add_row("relative change", _share(result.relative_change))
    if (most := result.largest) is not None:
        table.add_row("largest", f"{_share(most.relative_change)} at {clean(most.site)}")
    table.add_row("lost to rounding", f"{_share(result.lost_to_rounding)} of the change")
    table.add_row("written", clean(result.output))
    table.add_row("size", f"{result.bytes_out / 1e6:,.1f} MB")
    table.add_row("seconds", f"{result.seconds:.1f}")
    stdout().print(table)
    reasons = Counter(result.sites_refused.values())
    for reason, count in reasons.most_common(8):
        names = [name for name, why in result.sites_refused.items() if why == reason]
        which = ", ".join(names[:3]) + (" …" if count > 3 else "")
        stderr().print(
            f"refused {count} site(s) or tensor(s): {clean(reason)}: {clean(which)}", soft_wrap=True
        )
    for note in result.notes:
        stderr().print(f"note: {clean(note)}", soft_wrap=True)


def _share(value: float) -> str:
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.1f} %"
