"""What commands share: messages and progress on stderr, JSON alone on stdout."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from regraft.crossing import Progress as Report
from regraft.errors import RegraftError

#: Terminal control characters: file names and metadata are other people's text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: object) -> str:
    """Text from a file, safe to print: no control characters, no rich markup."""
    return escape(_CONTROL.sub("", str(text)))


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def fail(error: RegraftError) -> int:
    """Print an error as a user should read it; returns the exit code."""
    console = stderr()
    console.print(f"[bold red]Error:[/] {clean(error.what)}", soft_wrap=True)
    if error.file:
        console.print(f"  file:   {clean(error.file)}", soft_wrap=True)
    if error.tensor:
        console.print(f"  tensor: {clean(error.tensor)}", soft_wrap=True)
    if error.fix:
        console.print(f"  {clean(error.fix)}", soft_wrap=True)
    return error.exit_code


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """A progress bar on standard error; silent when it is not a terminal."""
    console = stderr()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done)

    with bar:
        yield report


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
