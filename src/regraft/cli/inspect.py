"""``regraft inspect``: what a file is."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any

import typer
from rich.table import Table

from regraft.bases import architecture, open_base
from regraft.cli.screen import clean, print_json, stdout
from regraft.dialects import inspect_file
from regraft.errors import NotABase, NotAnAdapter, UnknownKeys
from regraft.files import locate
from regraft.pairing import kind_of


def inspect_command(
    file: Annotated[
        str, typer.Argument(help="Adapter or base: hub id, folder or .safetensors file.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a file is: family, dialect, rank, sites, and the base it was made for."""
    facts = _facts(file)
    if json:
        print_json(facts)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), _text(value))
    stdout().print(table)


def _facts(ref: str) -> dict[str, Any]:
    located = locate(ref)
    if located.path.is_dir() and not (located.path / "adapter_config.json").is_file():
        try:
            return _base_facts(ref)
        except NotABase:
            return inspect_file(ref)
    try:
        return inspect_file(ref)
    except (NotAnAdapter, UnknownKeys) as not_adapter:
        try:
            return _base_facts(ref)
        except NotABase:
            raise not_adapter from None


def _base_facts(ref: str) -> dict[str, Any]:
    base = open_base(ref)
    kinds: dict[str, int] = {}
    for site in base.weights:
        kinds[kind_of(site)] = kinds.get(kind_of(site), 0) + 1
    known = architecture(base)
    return {
        "kind": "base",
        "file": str(base.path),
        "name": base.name,
        "revision": base.revision,
        "architecture": known.label if known else "not one with a known name",
        "components": {
            c or "model": sum(s.component == c for s in base.weights) for c in base.components
        },
        "sites": len(base.weights),
        "parameters": sum(prod(w.shape) for w in base.weights.values()),
        "dtypes": sorted({str(w.dtype).removeprefix("torch.") for w in base.weights.values()}),
        "sites_by_kind": kinds,
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        shown = [f"{clean(k)}: {clean(v)}" for k, v in list(value.items())[:12]]
        more = len(value) - len(shown)
        return (
            "\n".join([*shown, *([f"… {more} more (--json lists all)"] if more > 0 else [])]) or "–"
        )
    if isinstance(value, list):
        return ", ".join(clean(v) for v in value[:8]) + (" …" if len(value) > 8 else "") or "–"
    return clean(value) if value not in (None, "") else "–"
