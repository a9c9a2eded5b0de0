"""``regraft transfer``: carry one adapter."""

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
    number,
    percent,
    pickles,
    print_json,
    progress,
    stderr,
    stdout,
)
from regraft.errors import BadOption, NotRecommended
from regraft.result import TransferResult
from regraft.transfer import transfer


def _rank(text: str | None) -> int | Literal["full"] | None:
    if text is None or text == "full":
        return cast(Literal["full"] | None, text)
    try:
        return int(text)
    except ValueError:
        raise BadOption(f"{text!r} is not a rank.", fix="Give a number, or full.") from None


def transfer_command(
    adapter: Annotated[str, typer.Argument(help="Hub id, PEFT folder, or .safetensors file.")],
    source: Annotated[
        str, typer.Option("--from", help="Base it was trained on: hub id, folder or file.")
    ],
    target: Annotated[
        str, typer.Option("--to", help="Base it shall work on: hub id, folder or file.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write (folder for --dialect peft)."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto, copy, lora-x or prolora; for inserts activation-map.")
    ] = "auto",
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page.")] = None,
    dialect: Annotated[
        str | None,
        typer.Option(help="peft, diffusers, kohya, comfyui or lora-x. Default: the input's."),
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="Largest output rank, or full. Default: the input's rank.")
    ] = None,
    rank_energy: Annotated[
        float | None, typer.Option(help="Instead of a rank: share of energy to keep per site.")
    ] = None,
    dimension: Annotated[
        str, typer.Option(help="Subspace dimension: a number, a share of energy, or full.")
    ] = "320",
    threshold: Annotated[
        float | None, typer.Option(help="Leave out sites with min(Φ_l, Φ_r) below this.")
    ] = None,
    filter_blocks: Annotated[
        list[str] | None, typer.Option(help="Leave out target sites matching this expression.")
    ] = None,
    cross_terms: Annotated[bool, typer.Option(help="prolora: keep the cross terms.")] = False,
    align: Annotated[
        str, typer.Option(help="lora-x on unequal shapes: none or rank-order (§4.2.2).")
    ] = "none",
    pairing: Annotated[str, typer.Option(help="auto, name or similarity.")] = "auto",
    calibration: Annotated[
        str | None,
        typer.Option(help="activation-map: texts or pictures to fit on. Default: own samples."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16. Default: the input's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    seed: Annotated[int, typer.Option(help="Of activation-map's own samples.")] = 0,
    allow_unknown: AllowUnknown = False,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Do everything but write.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Carry an adapter from the base it was trained on to another base."""
    if output is None and not dry_run:
        raise BadOption("No output was named.", fix="Pass -o OUT, or --dry-run to write nothing.")
    try:
        with pickles(allow_pickle), progress(quiet) as follow:
            result = transfer(
                adapter,
                source=source,
                target=target,
                output=output,
                method=method,
                report=report,
                dialect=dialect,
                rank=_rank(rank),
                rank_energy=rank_energy,
                dimension=dimension,
                threshold=threshold,
                filter_blocks=filter_blocks or (),
                cross_terms=cross_terms,
                align=cast(Literal["none", "rank-order"], align),
                pairing=cast(Literal["auto", "name", "similarity"], pairing),
                calibration=calibration,
                dtype=dtype,
                device=device,
                seed=seed,
                allow_unknown=allow_unknown,
                overwrite=overwrite,
                dry_run=dry_run,
                progress=follow,
            )
    except NotRecommended as refusal:
        if json:
            print_json(refusal.result.to_dict())
        raise
    if json:
        print_json(result.to_dict())
    elif not quiet:
        _summary(result)


def _summary(result: TransferResult) -> None:
    console = stdout()
    console.print(f"[bold]Verdict: {result.verdict}.[/] {clean(result.why)}")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    copied = number(result.predicted.get("copy"), 2)
    table.add_row("method", result.method)
    table.add_row("sites carried", f"{result.sites_carried}, refused {len(result.sites_refused)}")
    table.add_row(
        "energy kept",
        f"{percent(result.energy_kept)} (plain copy {percent(result.energy_kept_by_copy)})",
    )
    if result.predicted:
        guess = number(result.predicted.get(result.method), 2)
        table.add_row("predicted R", f"{guess} (copy {copied})")
    if "fit" in result.evidence:
        followed = number(result.evidence["followed"], 2)
        fit = number(result.evidence["fit"], 2)
        table.add_row("change followed", f"{followed} (fit of the map: R² {fit})")
    table.add_row("written", clean(result.output or "nothing (dry run)"))
    if result.sha256:
        table.add_row("sha256", result.sha256)
    if result.report:
        table.add_row("report", clean(result.report))
    table.add_row("seconds", f"{result.seconds:.1f}")
    console.print(table)
    reasons = Counter(result.sites_refused.values())
    for reason, count in reasons.most_common(8):
        stderr().print(f"refused {count} site(s): {clean(reason)}", soft_wrap=True)
    for note in result.notes:
        stderr().print(f"note: {clean(note)}", soft_wrap=True)
