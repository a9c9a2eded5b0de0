"""``regraft measure``: how well an adapter works on a target, on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from regraft.errors import BadOption
from regraft.retention.drawn import Drawn, PictureScore, asked_for
from regraft.retention.measure import STRENGTHS, measure
from regraft.retention.measurement import Measurement, Way

_STRENGTHS = ",".join(f"{strength:g}" for strength in STRENGTHS)


def _strengths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise BadOption(
            f"{text!r} is not a list of strengths.", fix="Give numbers such as 0.5,1,1.5."
        ) from None


def measure_command(
    adapter: Annotated[str, typer.Argument(help="Hub id, PEFT folder, or .safetensors file.")],
    target: Annotated[
        str, typer.Option("--to", help="Base it shall work on: hub id or folder that runs.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Held-out data: folder of pictures with captions, .jsonl, .txt, or demo."
        ),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Base it was trained on: carry it first, by every method. Default: as is.",
        ),
    ] = None,
    retrained: Annotated[
        str | None, typer.Option(help="Adapter trained on the target; R needs it.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="Only this method, and copy; may be repeated. Default: all."),
    ] = None,
    strengths: Annotated[
        str, typer.Option(help="Strengths to measure at, separated by commas.")
    ] = _STRENGTHS,
    limit: Annotated[
        int | None, typer.Option(help="Measure on the first so many items only.")
    ] = None,
    timesteps: Annotated[int, typer.Option(help="Diffusion: times per picture.")] = 8,
    draw: Annotated[
        int,
        typer.Option(help="Diffusion: also draw so many pictures per caption by every way."),
    ] = 0,
    captions: Annotated[
        int, typer.Option(help="Draw for the first so many captions of the data.")
    ] = 8,
    clip: Annotated[
        str | None, typer.Option(help="CLIP to score the pictures: folder, or cached hub id.")
    ] = None,
    dinov2: Annotated[str | None, typer.Option(help="DINOv2, likewise.")] = None,
    hps: Annotated[Path | None, typer.Option(help="HPSv2's checkpoint file, likewise.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise, the random control, the pictures.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page.")] = None,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing report.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Measure an adapter on its target with held-out data: retention R, by every method."""
    with pickles(allow_pickle), progress(quiet) as follow:
        found = measure(
            adapter,
            source=source,
            target=target,
            retrained=retrained,
            data=data,
            methods=methods or None,
            strengths=_strengths(strengths),
            limit=limit,
            timesteps=timesteps,
            drawing=asked_for(draw, captions, clip=clip, dinov2=dinov2, hps=hps),
            seed=seed,
            device=device,
            report=report,
            overwrite=overwrite,
            progress=follow,
        )
    if json:
        print_json(found.to_dict())
    elif not quiet:
        _show(found)
    if found.verdict == "don't":
        raise typer.Exit(1)


def _show(found: Measurement) -> None:
    console = stdout()
    console.print(f"[bold]Verdict: {found.verdict}.[/] {clean(found.why)}")
    strengths = found.parameters["strengths"]
    ways = sorted(found.ways, key=lambda way: -way.figure)
    table = _table(found.figure, "±", "loss", *(["exact", "flips"] if found.answers else []))
    for way in ways:
        table.add_row(clean(way.name), *_cells(found, way))
    drawn = found.random
    table.add_row("random", _short(found, drawn.mean), "", number(drawn.loss, 4))
    for name, loss in found.losses.items():
        whole = {"target": 0.0, "retrained": 1.0 if found.figure == "R" else None}.get(name)
        answers = found.answers.get(name)
        more = [] if answers is None else [percent(answers)]
        table.add_row(clean(name), _short(found, whole), "", number(loss, 4), *more)
    console.print(table)
    if len(strengths) > 1:
        # a table of its own: with seven strengths beside the figures, names would be squeezed
        curves = _table(*(f"×{strength:g}" for strength in strengths))
        for way in ways:
            curves.add_row(clean(way.name), *_curve(found, way))
        console.print(f"\n{found.figure} at other strengths of the adapter:")
        console.print(curves)
    console.print(
        f"{found.figure}: the gain over the bare target, divided by "
        + {
            "R": "that of the retrained adapter.",
            "relative gain": "the adapter's own gain on its source. R needs --retrained.",
            "loss removed": "the bare target's loss. R needs --retrained.",
        }[found.figure]
        + f" Loss: {found.metric}, {found.unit}, on {found.items} items."
    )
    if found.pictures:
        _show_pictures(found, found.pictures)
    if found.report:
        console.print(f"The page: {clean(found.report)}", soft_wrap=True)
    for name, reason in found.refused.items():
        stderr().print(f"not measured: {name}: {clean(reason)}", soft_wrap=True)
    for note in found.notes:
        stderr().print(f"note: {clean(note)}", soft_wrap=True)


def _show_pictures(found: Measurement, drawn: Drawn) -> None:
    """The table of picture scores; with R beside a score where it is defined."""
    console = stdout()
    names = list(drawn.higher_is_better)
    console.print(
        f"\nPictures: {len(drawn.captions)} captions × {len(drawn.seeds)} seeds, drawn by every way"
        + ("; more is better, R in brackets." if names else "; only the page shows them.")
    )
    if names:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("way", overflow="fold")
        for name in names:
            table.add_column(name, justify="right")
        ways = [way.name for way in sorted(found.ways, key=lambda way: -way.figure)]
        for row in (*ways, *(n for n in ("target", "retrained") if n in drawn.values)):
            scores = drawn.scores(row).values()
            table.add_row(clean(row), *(_scored(score) for score in scores))
        console.print(table)
    for reason in dict.fromkeys(drawn.skipped.values()):
        these = ", ".join(name for name, why in drawn.skipped.items() if why == reason)
        stderr().print(f"not scored: {these}: {clean(reason)}", soft_wrap=True)


def _scored(score: PictureScore) -> str:
    r = None if score.retention is None else score.retention.value
    return number(score.value) + ("" if r is None else f" ({number(r, 2)})")


def _short(found: Measurement, value: float | None, digits: int = 2) -> str:
    return percent(value) if found.figure == "loss removed" else number(value, digits)


def _table(*columns: str) -> Table:
    """One row per way, figures to the right; names are never broken."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("way", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cells(found: Measurement, way: Way) -> list[str]:
    cells = [_short(found, way.figure), _short(found, way.figure_error, 3), number(way.loss, 4)]
    if found.answers:
        own = way.answers
        pair = (None, None) if own is None else (own.score, own.negative_flips)
        cells += [percent(value) for value in pair]
    return cells


def _curve(found: Measurement, way: Way) -> list[str]:
    """The figure at every strength, the best in bold."""
    best = way.curve.best
    return [
        f"[bold]{_short(found, value)}[/]" if strength == best else _short(found, value)
        for strength, value in zip(way.curve.strengths, way.curve.values, strict=True)
    ]
