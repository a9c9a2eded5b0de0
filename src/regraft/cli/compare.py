"""``regraft compare``: two bases side by side."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Literal, cast

import typer
from rich.table import Table

from regraft.cli.screen import (
    AllowPickle,
    clean,
    number,
    percent,
    pickles,
    print_json,
    progress,
    stderr,
    stdout,
)
from regraft.compare import Comparison, SiteComparison, compare
from regraft.report.places import split_site


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
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Show lineage, pairing, similarity per site, what each method would keep, and the verdict."""
    with pickles(allow_pickle), progress(quiet) as follow:
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


def _layer(site: str) -> str:
    """The component and the kind of layer, without the blocks: few enough rows to read."""
    place = split_site(site)
    return f"{place.component} {place.kind}".strip()


def _show(found: Comparison, every: bool) -> None:
    console = stdout()
    console.print(f"[bold]{clean(found.source['name'])} → {clean(found.target['name'])}[/]")
    console.print(f"lineage: {found.lineage}; paired by {found.pairing}")
    console.print(f"[bold]Verdict: {found.verdict}.[/] {found.why}")
    groups: dict[str, list[SiteComparison]] = defaultdict(list)
    for site in found.sites:
        groups[site.site if every else _layer(site.site)].append(site)
    names = list(found.keeps)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("site" if every else "layer", overflow="fold")
    for column in ("n", "cosine", "moved", "Φ_l", "Φ_r", "chance", *names):
        table.add_column(column, justify="right", no_wrap=True)
    for name, members in groups.items():
        table.add_row(
            clean(name),
            str(len(members)),
            number(_mean([m.cosine for m in members])),
            percent(_mean([m.difference for m in members])),
            number(_mean([m.phi_left for m in members]), 2),
            number(_mean([m.phi_right for m in members]), 2),
            number(_mean([m.chance for m in members]), 2),
            *[percent(_mean([m.keeps.get(n) for m in members])) for n in names],
        )
    console.print(table)
    if found.keeps:
        console.print(
            f"{', '.join(names)}: the share of energy each keeps of an update without preferred "
            f"direction, at subspace dimension {found.dimension}. chance: Φ_l of unrelated weights."
        )
    guesses = ", ".join(f"{name} {value:.2f}" for name, value in found.predicted.items())
    console.print(f"predicted retention R (1: as good as retraining, 0: no adapter): {guesses}")
    if found.unpaired:
        console.print(f"{len(found.unpaired)} source site(s) have no partner (--json lists them)")
    for note in found.notes:
        stderr().print(f"note: {clean(note)}", soft_wrap=True)
