"""``regraft``: collects the commands and turns errors into messages and exit codes."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from regraft.cli import compare as _compare
from regraft.cli import convert as _convert
from regraft.cli import demo as _demo
from regraft.cli import inspect as _inspect
from regraft.cli import measure as _measure
from regraft.cli import merge as _merge
from regraft.cli import methods as _methods
from regraft.cli import train as _train
from regraft.cli import transfer as _transfer
from regraft.cli import verify as _verify
from regraft.cli.screen import fail
from regraft.errors import RegraftError
from regraft.versions import regraft_version

app = typer.Typer(
    name="regraft",
    help="Carry adapters (LoRA and its relatives) from one base model to another, without the "
    'training data.\n\nExit codes: 0 done, 1 the work failed or the verdict is "don\'t", '
    "2 unreadable input or usage, 3 inconclusive.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(regraft_version())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command("transfer")(_transfer.transfer_command)
app.command("convert")(_convert.convert_command)
app.command("merge")(_merge.merge_command)
app.command("verify")(_verify.verify_command)
app.command("inspect")(_inspect.inspect_command)
app.command("compare")(_compare.compare_command)
app.command("measure")(_measure.measure_command)
app.command("train")(_train.train_command)
app.command("methods")(_methods.methods_command)
app.command("demo")(_demo.demo_command)


#: What optional packages say when they are imported, of kernels that nothing here uses.
_NOISY = ("bitsandbytes", "torchao", "torch.utils._pytree", "diffusers.quantizers.torchao")


def main() -> None:
    """Entry point: no traceback for anything a user can cause."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not sys.warnoptions:
        # Notes to programmers; what a user should know is a note or an error of ours.
        warnings.showwarning = lambda *_args, **_more: None
    try:
        app()
    except RegraftError as error:
        sys.exit(fail(error))
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C, which typer makes an exit of
            sys.stderr.write("Interrupted; nothing half-written was left behind.\n")
        raise
    except MemoryError:
        sys.stderr.write("Error: not enough memory.\n")
        sys.exit(1)
