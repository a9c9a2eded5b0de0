"""The measurement's page: every way's figure, the strength curve, and how it was measured.

It is made from what ``regraft measure --json`` prints and, if there are any, the drawn pictures.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.files import atomic_file
from regraft.report import words
from regraft.report.curves import bar_plot, figure, line_plot
from regraft.report.gallery import Gallery, picture_rows
from regraft.report.page import BADGES, Tile, environment

_LOSSES = {
    "target": "target, bare",
    "retrained": "target with the retrained adapter",
    "source": "source, bare",
    "source with adapter": "source with its adapter",
}


def write_measured(
    found: Mapping[str, Any],
    path: Path,
    *,
    gallery: Gallery | None = None,
    overwrite: bool = False,
) -> None:
    """Write the page to ``path``, whole or not at all.

    Parameters
    ----------
    found : mapping
        A measurement's JSON form.
    path : Path
    gallery : Gallery, optional
        Pictures that were drawn.
    overwrite : bool

    Raises
    ------
    OutputExists, OutputFailed
    """
    page = render_measured(found, gallery)
    with atomic_file(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(page.encode("utf-8"))


def render_measured(found: Mapping[str, Any], gallery: Gallery | None = None) -> str:
    """The page as text: a function of its arguments alone."""
    name = found["figure"]
    return (
        environment()
        .get_template("measured.html.j2")
        .render(
            found=found,
            badge=BADGES.get(found["verdict"], ("dont", found["verdict"], "?")),
            adapter=_name(found["adapter"]),
            source=_name(found["source"]) if found["source"] else None,
            target=_name(found["target"]),
            data=words.file_name(found["data"]["ref"]),
            tiles=_tiles(found),
            bars=bar_plot(found),
            curves=line_plot(found),
            ways=sorted(found["ways"], key=lambda way: -way["figure"]),
            answered=any(way["answers"] for way in found["ways"]),
            scored=_pictures(found),
            gallery=gallery,
            pictures=picture_rows(gallery) if gallery else (),
            losses=[(_LOSSES.get(k, k), v) for k, v in found["losses"].items()],
            shown=lambda value, digits=2: figure(name, value, digits),
            command=command(found),
            facts=_facts(found),
        )
    )


def _name(what: Mapping[str, Any]) -> str:
    return str(what.get("name") or words.file_name(str(what.get("ref") or "")) or "unnamed")


def _tiles(found: Mapping[str, Any]) -> list[Tile]:
    best = next(way for way in found["ways"] if way["name"] == found["best"])
    name, error = found["figure"], best["figure_error"]
    within = "" if error is None else f"± {figure(name, error, 3)}, one standard error"
    kind = "pictures" if found["data"]["kind"] == "pictures" else "texts"
    draws = found["random"]["figures"]
    spread = f"{figure(name, min(draws))} to {figure(name, max(draws))} in {len(draws)} draws"
    curve = best["curve"]
    right = "1.0 counts as right" if curve["right_at_one"] else "1.0 is not right"
    tiles = [
        Tile("Best way", best["name"]),
        Tile(name[0].upper() + name[1:], figure(name, best["figure"]), within),
    ]
    if len(curve["strengths"]) > 1:
        tiles.append(Tile("Best strength", f"{curve['best']:g}", right))
    return [
        *tiles,
        Tile("Random updates", figure(name, found["random"]["mean"]), spread),
        Tile("Measured on", str(found["items"]), kind),
        Tile("Time", words.seconds(found["seconds"])),
    ]


def _pictures(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of picture scores; None if nothing was drawn."""
    drawn = found.get("pictures")
    if not drawn:
        return None
    columns = list(drawn["higher_is_better"])

    def reference(name: str) -> dict[str, Any]:
        values = drawn["references"][name]
        cells = [{"text": words.number(values[c]), "title": ""} for c in columns]
        return {"name": _LOSSES[name], "cells": cells, "best": False}

    rows = [
        {
            "name": way["name"],
            "cells": [_cell(way["pictures"][c]) for c in columns],
            "best": way["name"] == found["best"],
        }
        for way in sorted(found["ways"], key=lambda way: -way["figure"])
    ]
    last = [reference("retrained")] if "retrained" in drawn["references"] else []
    why: dict[str, list[str]] = {}
    for name, reason in drawn["skipped"].items():
        why.setdefault(_without_paths(reason, drawn["weights"]), []).append(name)
    return {
        "seeds": len(drawn["seeds"]),
        "captions": len(drawn["captions"]),
        "columns": columns,
        "rows": [reference("target"), *rows, *last],
        "skipped": [(", ".join(names), reason) for reason, names in why.items()],
    }


def _cell(score: Mapping[str, Any]) -> dict[str, str]:
    """A value, with R beside it where R is defined; else why not, for the pointer."""
    found, text = score["retention"], words.number(score["value"])
    if found is None:
        return {"text": text, "title": ""}
    if found["value"] is None:
        return {"text": text, "title": f"No R: {found['reason']}"}
    error = "" if found["error"] is None else f" ± {words.number(found['error'], 2)}"
    return {"text": f"{text} (R = {words.number(found['value'], 2)}{error})", "title": ""}


def _without_paths(reason: str, weights: Mapping[str, str]) -> str:
    """A reason without the paths of the maker's disk."""
    reason = re.sub(r" \[file: [^\]]*\]", "", reason)
    for ref in weights.values():
        reason = reason.replace(ref, _ref(ref))
    return reason


def _ref(text: str) -> str:
    """A hub id as it is, a path cut to its last part."""
    return text if re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) else words.file_name(text)


def command(found: Mapping[str, Any]) -> str:
    """The command that measures this again; paths are cut to their last part."""

    def ref(what: Mapping[str, Any]) -> str:
        text = str(what["ref"])
        return text if what.get("revision") else words.file_name(text)

    given = found["parameters"]
    parts = ["regraft measure", shlex.quote(ref(found["adapter"]))]
    if found["source"]:
        parts.append(f"--from {shlex.quote(ref(found['source']))}")
    parts.append(f"--to {shlex.quote(ref(found['target']))}")
    if found["retrained"]:
        parts.append(f"--retrained {shlex.quote(ref(found['retrained']))}")
    parts.append(f"--data {shlex.quote(ref(found['data']))}")
    parts += [f"--method {shlex.quote(name)}" for name in given["methods"] or ()]
    parts.append("--strengths " + ",".join(f"{s:g}" for s in given["strengths"]))
    if given["limit"]:
        parts.append(f"--limit {given['limit']}")
    if given["timesteps"]:
        parts.append(f"--timesteps {given['timesteps']}")
    parts.append(f"--seed {given['seed']}")
    if drawn := found.get("pictures"):
        parts.append(f"--draw {len(drawn['seeds'])} --captions {given['captions']}")
        parts += [f"--{k} {shlex.quote(_ref(ref))}" for k, ref in drawn["weights"].items()]
    return " \\\n    ".join([" ".join(parts[:2]), *parts[2:]])


def _facts(found: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, (label, value) pairs); paths stay out, they name the maker's disk."""

    def pairs(what: Mapping[str, Any] | None) -> list[tuple[str, str]]:
        rows = {k: v for k, v in (what or {}).items() if k != "ref"}
        return [(k, words.plain(v)) for k, v in rows.items()]

    return [
        ("Adapter", pairs(found["adapter"])),
        ("Source base", pairs(found["source"])),
        ("Target base", pairs(found["target"])),
        ("Retrained adapter", pairs(found["retrained"])),
        ("Parameters", pairs(found["parameters"])),
        ("Versions", pairs(found["versions"])),
    ]
