"""``regraft compare``: two bases side by side."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Literal, cast

import typer
from rich.table import Table

from regraft.cli.screen import clean, number, percent, print_json, progress, stdout
from regraft.compare import Comparison, SiteComparison, compare


def compare_command(
    source: Annotated[str, typer.Argument(help="Source base: hub id, folder or file.")],
    target: Annotated[str, typer.Argument(help="Target base: hub id, folder or file.")],
    dimension: Annotated[
        str, typer.Option(help="Subspace dimension: a number, a share of energy, or full.")
    ] = "320",
    sites: Annotated[str, typer.Option(help="Only sites that match this expression.")] = "",
    subspaces: Annotated[bool, typer.Option(help="Also compute Φ (decomposes both bases).")] = True,
    pairing: Annotated[str, typer.Option(help="auto, name or similarity.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    every: Annotated[bool, typer.Option("--every", help="List every site, not kinds.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Show lineage, pairing, similarity per site, what each method would keep, and the verdict."""
    with progress(quiet) as follow:
        found = compare(
            source,
            target,
            dimension=dimension,
            sites=sites,
            subspaces=subspaces,
            pairing=cast(Literal["auto", "name", "similarity"], pairing),
            device=device,
            progress=follow,
        )
    if json:
        print_json(found.to_dict())
    else:
        _show(found, every)


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _show(found: Comparison, every: bool) -> None:
    console = stdout()
    console.print(f"[bold]{clean(found.source['name'])} → {clean(found.target['name'])}[/]")
    console.print(f"lineage: {found.lineage}; paired by {found.pairing}")
    console.print(f"[bold]Verdict: {found.verdict}.[/] {found.why}")
    groups: dict[str, list[SiteComparison]] = defaultdict(list)
    for site in found.sites:
        groups[site.site if every else site.kind].append(site)
    names = list(found.keeps)
    table = Table(box=None, pad_edge=False)
    for column in ("site" if every else "kind", "n", "cosine", "moved", "Φ_l", "Φ_r", "chance"):
        table.add_column(column, justify="left" if column in ("site", "kind") else "right")
    for name in names:
        table.add_column(f"{name} keeps", justify="right")
    for name, members in groups.items():
        table.add_row(
            clean(name),
            str(len(members)),
            number(_mean([m.cosine for m in members])),
            percent(_mean([m.difference for m in members])),
            number(_mean([m.phi_left for m in members])),
            number(_mean([m.phi_right for m in members])),
            number(_mean([m.chance for m in members])),
            *[percent(_mean([m.keeps.get(n) for m in members])) for n in names],
        )
    console.print(table)
    if found.keeps:
        console.print(
            "keeps: share of energy a method keeps of an update without preferred direction, "
            f"subspace dimension {found.dimension}"
        )
    if found.unpaired:
        console.print(f"{len(found.unpaired)} source site(s) have no partner (--json lists them)")
