"""``regraft inspect``: what a file is."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any

import typer
from rich.table import Table

from regraft.bases import architecture, open_base
from regraft.cli.screen import AllowPickle, clean, pickles, print_json, stdout
from regraft.dialects import inspect_file
from regraft.errors import NotABase, NotAnAdapter
from regraft.files import locate
from regraft.files.pickle_gate import original
from regraft.pairing import kind_of

#: Shown under one name, in this order; the rest of --json stays in --json.
_ROWS = (
    "kind", "file", "title", "family", "changes", "virtual_tokens", "embedding_width", "layers",
    "key_heads", "key_width", "width", "position", "activation", "why",
    "families", "dialect", "writer", "made_for",
    "made_for_by_metadata", "name", "revision", "architecture", "quantised", "components", "sites",
    "tensors", "sites_by_component", "sites_by_kind", "ranks", "alpha", "alpha_from", "scale",
    "dtypes", "parameters", "bytes", "trigger_words", "concepts", "tags", "training", "zero_sites",
    "nonfinite_tensors", "unknown_keys", "refused", "keys", "notes", "provenance", "sha256",
    "autov2", "autov3",
)  # fmt: skip
_LONG = 12


def inspect_command(
    file: Annotated[
        str, typer.Argument(help="Adapter or base: hub id, folder or .safetensors file.")
    ],
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Also how the energy lies, by kind of layer.")
    ] = False,
    allow_pickle: AllowPickle = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a file is: family, dialect, rank, scale, sites, and the base it was made for."""
    with pickles(allow_pickle):
        facts = _facts(file, spectrum)
    if json:
        print_json(facts)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key in _ROWS:
        value = facts.get(key)
        if value or value == 0:
            table.add_row(key.replace("_", " "), _text(value))
    console = stdout()
    console.print(table)
    if "spectrum" in facts:
        _show_spectrum(facts["spectrum"])
    for warning in facts.get("warnings", ()):
        console.print(f"[bold yellow]warning:[/] {clean(warning)}")


def _facts(ref: str, spectrum: bool) -> dict[str, Any]:
    located = locate(ref)
    if located.path.is_dir() and not (located.path / "adapter_config.json").is_file():
        try:
            return _base_facts(ref)
        except NotABase:
            return inspect_file(ref, spectrum=spectrum)
    try:
        facts = inspect_file(ref, spectrum=spectrum)
    except NotAnAdapter as not_adapter:
        try:
            return _base_facts(ref)
        except NotABase:
            raise not_adapter from None
    if len(facts.get("unknown_keys", ())) > facts.get("sites", 0):
        try:  # a checkpoint whose own names happen to end like an adapter's
            return _base_facts(ref)
        except NotABase:
            pass
    return facts


def _base_facts(ref: str) -> dict[str, Any]:
    base = open_base(ref)
    kinds: dict[str, int] = {}
    for site in base.weights:
        kinds[kind_of(site)] = kinds.get(kind_of(site), 0) + 1
    known = architecture(base)
    return {
        "kind": "base",
        "file": str(original(base.path)),
        "name": base.name,
        "revision": base.revision,
        "architecture": known.label if known else "not one with a known name",
        "components": {
            c or "model": sum(s.component == c for s in base.weights) for c in base.components
        },
        "sites": len(base.weights),
        "parameters": sum(
            prod(w.shape) for held in (base.weights, base.others) for w in held.values()
        ),
        "dtypes": sorted({str(w.dtype).removeprefix("torch.") for w in base.weights.values()}),
        "quantised": base.quantised,
        "sites_by_kind": kinds,
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        shown = [f"{clean(k)}: {_short(v)}" for k, v in list(value.items())[:_LONG]]
        more = len(value) - len(shown)
        return "\n".join([*shown, *([f"… {more} more (--json lists all)"] if more > 0 else [])])
    if isinstance(value, list):
        more = len(value) - _LONG
        tail = [f"… {more} more (--json lists all)"] if more > 0 else []
        return "\n".join([*map(_short, value[:_LONG]), *tail])
    return _short(value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if type(value) is int else str(value)
    return clean(text if len(text) <= 300 else f"{text[:300]}… ({len(text)} characters)")


def _show_spectrum(found: dict[str, Any]) -> None:
    """One row per kind of layer: how few directions hold its energy."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    first = ("1", "4", "16")
    for column in ("n", "‖ΔW‖²", "eff. rank", "90 %", "99 %", *(f"first {k}" for k in first)):
        table.add_column(column, justify="right", no_wrap=True)
    for kind, row in found["kinds"].items():
        table.add_row(
            clean(kind),
            str(row["sites"]),
            f"{row['energy']:.3g}",
            f"{row['effective_rank']:.1f}",
            *(f"{row[r]['median']}–{row[r]['largest']}" for r in ("rank_for_90", "rank_for_99")),
            *(f"{100 * row['share'][k]:.0f} %" if k in row["share"] else "–" for k in first),
        )
    console = stdout()
    console.print(table)
    console.print(
        "90 %, 99 %: the rank that keeps this share of ‖ΔW‖² (median–largest over the sites). "
        "first k: the share in the first k singular directions."
    )
    for why, count in found["left_out"].items():
        console.print(f"left out {count} site(s): {clean(why)}")
