"""The page: one HTML file with everything a transfer has to say, for people and for printing.

Nothing is loaded from anywhere. All text from files goes through :func:`clean` and is escaped by
the template engine; no HTML is made outside the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from regraft.files import atomic_file
from regraft.methods import insert_methods, methods
from regraft.report import words
from regraft.report.chart import bar_chart, in_network_order
from regraft.report.gallery import Gallery, Measured, picture_rows
from regraft.report.heatmap import COSINE, heat_maps, similarity
from regraft.report.loading import snippets
from regraft.result import TransferResult

#: Verdict → class of its box, word, mark.
BADGES = {
    "carry": ("carry", "Carry", "✓"),
    "copy": ("copy", "Copy", "="),
    "don't": ("dont", "Don’t", "✕"),
}


@dataclass(frozen=True)
class Tile:
    """One key figure."""

    label: str
    value: str
    note: str = ""

    @property
    def long(self) -> bool:
        """Whether it is set in small letters: file names and hashes."""
        return len(self.value) > 9


@dataclass(frozen=True)
class RefusedGroup:
    """Refused names that share a reason; ``names`` are (name, what is special about it)."""

    reason: str
    names: tuple[tuple[str, str], ...]


def write_report(
    result: TransferResult,
    path: Path,
    *,
    overwrite: bool = False,
    gallery: Gallery | None = None,
) -> None:
    """Write the page for ``result`` to ``path``, whole or not at all.

    Parameters
    ----------
    result : TransferResult
        Also of a dry run, or with the verdict "don't" and nothing carried.
    path : Path
    overwrite : bool
    gallery : Gallery, optional
        Pictures and measurements to show first.

    Raises
    ------
    OutputExists, OutputFailed
    ValueError
        The gallery's rows do not fit its columns, or a picture is not a PNG file.
    """
    page = render_report(result, gallery=gallery)
    with atomic_file(path, overwrite=overwrite) as temporary:
        # Bytes, not text: the same line ends on every system.
        temporary.write_bytes(page.encode("utf-8"))


def render_report(result: TransferResult, *, gallery: Gallery | None = None) -> str:
    """The page as text: a function of its arguments alone."""
    adds = words.inserts(result)
    known = {m.name: m for m in (insert_methods() if adds else methods())}.get(result.method)
    heat = heat_maps(result.sites, result.sites_refused)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            result=result,
            badge=BADGES.get(result.verdict, ("dont", result.verdict, "?")),
            adapter=_adapter_name(result),
            source=_name(result.source),
            target=_name(result.target),
            remark=_remark(result),
            tiles=_tiles(result),
            trigger_words=result.adapter.get("trigger_words") or "",
            gallery=gallery,
            pictures=picture_rows(gallery) if gallery else (),
            measured=[Measured(*m) for m in gallery.measured] if gallery else [],
            heat=heat if any(map(similarity, result.sites)) else None,
            inserts=adds,
            similarity=_similarity(heat.measure, adds),
            size=words.size_of(result),
            chart=bar_chart(result.sites),
            sites=in_network_order(result.sites),
            refused=_refused(result.sites_refused),
            snippets=snippets(result),
            method=known,
            facts=_facts(result),
        )
    )


def _similarity(measure: str, inserts: bool) -> str:
    """What the colours of the heat map are."""
    if measure != COSINE:
        return f"the overlap of the two weights’ main directions, {measure}"
    if inserts:
        return "the cosine of the two bases’ weights that make the space of each part"
    return "the cosine of the two weights, as Φ was not computed for this transfer"


def environment() -> Environment:
    """The templates, with everything they print escaped and cleaned."""
    made = Environment(
        loader=PackageLoader("regraft.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=words.clean,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "percent": words.percent,
        "number": words.number,
        "plain": words.plain,
    }
    return made


def _name(base: Mapping[str, Any]) -> str:
    return str(base.get("name") or words.file_name(str(base.get("ref") or "")) or "unnamed base")


def _adapter_name(result: TransferResult) -> str:
    ref = words.file_name(str(result.adapter.get("ref") or ""))
    return str(result.adapter.get("name") or ref or "unnamed adapter")


def _remark(result: TransferResult) -> str:
    """A sentence when what was done is not what was recommended."""
    if result.method == "none":
        return "Nothing was written. To do it all the same, name a method."
    best = result.evidence.get("method")
    if result.verdict == "don't":
        return f"The method {result.method} was run because it was asked for; expect little."
    if best and best != result.method:
        return f"The method {result.method} was run because it was asked for, not {best}."
    if result.dry_run:
        return "This was a dry run: nothing was written."
    return ""


def _tiles(result: TransferResult) -> list[Tile]:
    """The key figures, most wanted first."""
    evidence = result.evidence
    tiles = [Tile("Method run", result.method)]
    if result.method != "none":
        copy = f"a plain copy keeps {words.percent(result.energy_kept_by_copy)}"
        tiles.append(Tile("Energy kept", words.percent(result.energy_kept), copy))
        tiles.append(_sites_tile(result))
        guess = result.predicted.get(result.method)
        if guess is not None:
            tiles.append(Tile("Predicted R", f"{guess:.2f}", "1 as retrained, 0 as no adapter"))
        if evidence.get("followed") is not None:
            share = words.percent(evidence["followed"], 0)
            tiles.append(Tile("Change followed", share, "of that on the source"))
        if evidence.get("fit") is not None:
            tiles.append(Tile("Fit of the map", f"{evidence['fit']:.2f}", "R² on unseen inputs"))
    elif "coverage" in evidence:
        share = words.percent(evidence["coverage"])
        tiles.append(Tile("Has a place", share, "of the adapter, by energy"))
    if "cosine" in evidence and evidence.get("coverage", 1.0) > 0:
        moved = f"bases moved apart by {words.percent(evidence.get('difference'), 0)}"
        tiles.append(Tile("Weight cosine", words.number(evidence["cosine"]), moved))
    if result.output is not None:
        kind = ", ".join(x for x in (result.dialect, result.dtype) if x)
        tiles.append(Tile("Output", words.file_name(result.output), kind))
    else:
        tiles.append(Tile("Output", "none", "dry run" if result.dry_run else "nothing written"))
    tiles.append(Tile("Time", words.seconds(result.seconds), _decompositions(result)))
    return tiles


def _sites_tile(result: TransferResult) -> Tile:
    refused = len(result.sites_refused)
    return Tile("Sites carried", str(result.sites_carried), f"{refused or 'none'} refused")


def _decompositions(result: TransferResult) -> str:
    count = result.decompositions
    return "no decompositions" if not count else f"{count} decomposition{'s' * (count > 1)}"


def _refused(refused: Mapping[str, str]) -> list[RefusedGroup]:
    """By reason, most frequent first. What follows a reason's colon is special to the site."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, why in refused.items():
        reason, _, special = why.partition(": ")
        groups.setdefault(reason, []).append((name, special))
    ordered = sorted(groups.items(), key=lambda g: (-len(g[1]), g[0]))
    return [RefusedGroup(reason, tuple(sorted(names))) for reason, names in ordered]


def _facts(result: TransferResult) -> list[tuple[str, list[tuple[str, str]]]]:
    """Provenance: (heading, (label, value) pairs). Paths stay out: they name the maker's disk."""
    adapter = result.adapter
    file = [
        ("name", _adapter_name(result)),
        ("sha256", words.plain(adapter.get("sha256"))),
        ("family", words.plain(adapter.get("family"))),
        ("dialect", words.plain(adapter.get("dialect"))),
        (words.size_of(result).lower(), words.plain(adapter.get("rank", adapter.get("size")))),
        ("sites", words.plain(adapter.get("sites"))),
    ]
    output = [
        ("file", words.file_name(result.output) if result.output else "none"),
        ("sha256", words.plain(result.sha256)),
        ("dialect", words.plain(result.dialect)),
        ("dtype", words.plain(result.dtype)),
        ("pairing", words.plain(result.pairing)),
    ]
    return [
        ("Adapter", file),
        ("Source base", _base_facts(result.source)),
        ("Target base", _base_facts(result.target)),
        ("Output", output),
        ("Parameters", [(k, words.plain(v)) for k, v in sorted(result.parameters.items())]),
        ("Versions", [(k, words.plain(v)) for k, v in result.versions.items()]),
    ]


def _base_facts(base: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("name", _name(base)),
        ("revision", words.plain(base.get("revision"))),
        ("sha256 of the weights used", words.plain(base.get("sha256_of_used_weights"))),
    ]
