"""What commands share: messages and progress on stderr, JSON alone on stdout."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from regraft.crossing import Progress as Report
from regraft.errors import RegraftError
from regraft.files import allow_pickles
from regraft.files.pickle_gate import WARNING as PICKLE_WARNING

#: Characters that move the cursor, colour, hide or reorder text: file names and metadata are other
#: people's words, and must not be able to write lines of their own.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff"
    r"\ud800-\udfff]"
)
_BREAKS = re.compile(r"[\t\n\r\u2028\u2029]+")

#: The option of commands that open files.
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read .pt, .bin and .ckpt files too, in a fenced process."),
]

#: The option of commands that write an adapter.
AllowUnknown = Annotated[
    bool,
    typer.Option(
        "--allow-unknown/--strict", help="Leave out tensors that fit no rule, and record them."
    ),
]


def clean(text: object) -> str:
    """Text from a file, safe to print: one line, no control characters, no rich markup."""
    return escape(_CONTROL.sub("", _BREAKS.sub(" ", str(text))))


@contextmanager
def pickles(allow: bool) -> Iterator[None]:
    """Read pickles inside it if ``allow`` is true; say why that is dangerous, and what was left."""
    if not allow:
        yield
        return
    stderr().print(f"[bold]--allow-pickle:[/] {PICKLE_WARNING}", soft_wrap=True)
    with allow_pickles() as gate:
        try:
            yield
        finally:
            for note in gate.notes:
                stderr().print(f"note: {clean(note)}", soft_wrap=True)


def stdout() -> Console:
    return Console(highlight=False, soft_wrap=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on standard output; what a terminal would obey is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    text = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    sys.stdout.write(text + "\n")


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
