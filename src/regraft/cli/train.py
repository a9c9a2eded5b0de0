"""``regraft train``: an adapter of any family, trained on a base that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from regraft.cli.screen import clean, number, print_json, progress, stderr, stdout
from regraft.errors import BadOption
from regraft.training import FAMILIES, FORMS, PRESETS, Settings, TrainResult, read_config, train


def train_command(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file with the options below; options win over it.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base to train on: hub id or folder of a model that runs.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Pictures with captions, or texts (.jsonl, .txt), as for measure."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="PEFT folder to write.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(FAMILIES)}; qlora: lora on nf4. Default: lora."),
    ] = None,
    rank: Annotated[
        float | None,
        typer.Option(
            help="Rank; for lora-x also a share of energy; for bottleneck the width; for prompt "
            "and prefix the virtual tokens. Default: the family's."
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Default: the rank.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. Default: 1000.")] = None,
    batch: Annotated[int | None, typer.Option(help="Items in a step. Default: 8.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: the family's.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant or cosine. Default: constant.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Steps of linear rise before it. Default: 0.")
    ] = None,
    snr_gamma: Annotated[
        float | None, typer.Option(help="γ of Min-SNR weights; diffusion only. Default: none.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16, of the base and of autocast. Default: fp32."),
    ] = None,
    quantise: Annotated[
        str | None,
        typer.Option(help=f"Quantise the base first: {', '.join(FORMS)}. Default: as it is."),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a zero point in integers, and that qa-lora pools. Default: 32."
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Whole names of the modules to change."),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per item. Default: 512.")] = None,
    validation: Annotated[
        float | None, typer.Option(help="Share of the data to hold out. Default: 0.1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every draw. Default: 0.")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: 250.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Less memory for more time. Default: off.",
        ),
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches in a step. Default: 1.")] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="Pictures of the class with captions, for prior preservation."),
    ] = None,
    prior_prompt: Annotated[
        list[str] | None,
        typer.Option(help="Draw class pictures from the bare base; may be repeated."),
    ] = None,
    prior_count: Annotated[
        int | None, typer.Option(help="How many for each prompt. Default: 200.")
    ] = None,
    prior_weight: Annotated[
        float | None, typer.Option(help="Of the loss on class pictures. Default: 1.")
    ] = None,
    cut_mix: Annotated[
        float | None,
        typer.Option(help="How often two subjects are put into one picture. Default: 0."),
    ] = None,
    unmix_weight: Annotated[
        float | None,
        typer.Option(help="Of the attention of one's words in the other's half. Default: none."),
    ] = None,
    validation_prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Draw or complete it at every checkpoint: a text, a .txt file, or held-out; "
            "may be repeated."
        ),
    ] = None,
    validation_seeds: Annotated[
        int | None, typer.Option(help="How often each. Default: 1.")
    ] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option("--tensorboard", help="Also write event files, into OUTPUT.tensorboard/."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: a GPU if there is one.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(PRESETS)}: LoRA-X's own training. Other options win."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Replace an existing output, or an unfinished run.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Train an adapter of any family on a base, and write it as a PEFT folder."""
    given = {
        "base": base,
        "data": data,
        "family": family,
        "rank": rank,
        "alpha": alpha,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "schedule": schedule,
        "warmup": warmup,
        "snr_gamma": snr_gamma,
        "precision": precision,
        "quantise": quantise,
        "group": group,
        "targets": targets,
        "length": length,
        "validation": validation,
        "seed": seed,
        "save_every": save_every,
        "gradient_checkpointing": gradient_checkpointing,
        "accumulate": accumulate,
        "prior": prior,
        "prior_prompt": prior_prompt or None,
        "prior_count": prior_count,
        "prior_weight": prior_weight,
        "cut_mix": cut_mix,
        "unmix_weight": unmix_weight,
        "validation_prompts": validation_prompts or None,
        "validation_seeds": validation_seeds,
        "tensorboard": tensorboard,
        "device": device,
        "preset": preset,
    }
    told = {} if config is None else read_config(config)
    named = told.pop("output", None)
    if named is not None and not isinstance(named, str):
        raise BadOption(f"output is {named!r}, not a name.", file=config, fix="Give a folder.")
    place = output or (Path(named) if named else None)
    if place is None:
        raise BadOption("No output was named.", fix="Pass -o OUT, or name output in the config.")
    settings = Settings.of({**told, **{k: v for k, v in given.items() if v is not None}})
    with progress(quiet) as follow:
        result = train(settings, place, resume=resume, overwrite=overwrite, progress=follow)
    if json:
        print_json(result.to_dict())
    elif not quiet:
        _summary(result)


def _summary(result: TrainResult) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("family", clean(result.family))
    table.add_row("trained", f"{result.parameters:,} numbers, {result.bytes / 1e3:,.1f} kB")
    table.add_row("data", f"{result.items} items, {result.held_out} held out")
    steps = f"{result.steps}"
    if result.resumed_at:
        steps += f", resumed at {result.resumed_at}"
    table.add_row("steps", steps)
    table.add_row("loss", f"{number(result.loss_first, 4)} → {number(result.loss_last, 4)}")
    if result.validation is not None:
        before, after = number(result.validation_before, 4), number(result.validation, 4)
        table.add_row("held-out loss", f"{before} → {after}")
    table.add_row("written", clean(result.output))
    table.add_row("sha256", result.sha256)
    table.add_row("seconds", f"{result.seconds:.1f}")
    stdout().print(table)
    for note in result.notes:
        stderr().print(f"note: {clean(note)}", soft_wrap=True)
