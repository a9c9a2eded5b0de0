"""``regraft convert``: another rank, family, dialect, form or dtype on the same base."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, cast

import typer
from rich.table import Table

from regraft.cli.screen import (
    AllowPickle,
    AllowUnknown,
    clean,
    percent,
    pickles,
    print_json,
    progress,
    stderr,
    stdout,
)
from regraft.convert import convert
from regraft.errors import BadOption
from regraft.result import ConvertResult


def convert_command(
    adapter: Annotated[str, typer.Argument(help="Hub id, PEFT folder, or .safetensors file.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write (folder for --dialect peft)."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base it was trained on. Needed by some families, and for new names."),
    ] = None,
    dialect: Annotated[
        str | None, typer.Option(help="Names to write it under. Default: the input's.")
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="16, exact, 0.99 (share of energy), sv_fro=0.9, sv_ratio=10, sv_cumulative=0.9; "
            "with ,max=64 behind. Default: a LoRA keeps its rank, others stay exact if that "
            "is not larger than a full difference."
        ),
    ] = None,
    form: Annotated[str, typer.Option(help="lora, or diff for full differences.")] = "lora",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16. Default: the input's.")
    ] = None,
    allow_unknown: AllowUnknown = False,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Do everything but write.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Convert an adapter: another rank, family, dialect, form or dtype, on the same base."""
    if output is None and not dry_run:
        raise BadOption("No output was named.", fix="Pass -o OUT, or --dry-run to write nothing.")
    with pickles(allow_pickle), progress(quiet) as follow:
        result = convert(
            adapter,
            output=output,
            base=base,
            dialect=dialect,
            rank=rank,
            form=cast(Literal["lora", "diff"], form),
            dtype=dtype,
            allow_unknown=allow_unknown,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=follow,
        )
    if json:
        print_json(result.to_dict())
    elif not quiet:
        _summary(result)


def _summary(result: ConvertResult) -> None:
    console = stdout()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("energy kept", _kept(result.energy_kept))
    for family, own in result.families.items():
        ranks = f"rank {_span(own['rank_in'])} → {_span(own['rank_out'])}"
        if result.parameters["form"] == "diff":
            ranks = f"rank {_span(own['rank_in'])} → full difference"
        kept = _kept(own["energy_kept"])
        table.add_row(clean(family), f"{own['sites']} sites, {ranks}, energy kept {kept}")
    table.add_row("sites", f"{len(result.sites)}, refused {len(result.sites_refused)}")
    table.add_row("numbers", f"{result.parameters_in:,} → {result.parameters_out:,}")
    if result.output:
        table.add_row("size", f"{_size(result.bytes_in)} → {_size(result.bytes_out)}")
    table.add_row("dialect", f"{clean(result.adapter['dialect'])} → {result.dialect}")
    table.add_row("written", clean(result.output or "nothing (dry run)"))
    if result.sha256:
        table.add_row("sha256", result.sha256)
    table.add_row("seconds", f"{result.seconds:.1f}")
    console.print(table)
    reasons = Counter(result.sites_refused.values())
    for reason, count in reasons.most_common(8):
        names = [name for name, why in result.sites_refused.items() if why == reason]
        which = ", ".join(names[:3]) + (" …" if count > 3 else "")
        stderr().print(
            f"refused {count} site(s) or tensor(s): {clean(reason)}: {clean(which)}", soft_wrap=True
        )
    for note in result.notes:
        stderr().print(f"note: {clean(note)}", soft_wrap=True)


def _kept(share: float) -> str:
    if share >= 1:
        return "all"
    # 99.96 % must not read as all of it.
    return percent(share) if share < 0.999 else f"{100 * share:.4f} %"


def _span(ranks: list[int]) -> str:
    low, high = ranks
    return str(low) if low == high else f"{low}–{high}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
