"""The catalogue as the table of docs/formats.md: one row per family and dialect, no cell empty."""

from __future__ import annotations

from collections.abc import Callable

from tests.wild.case import DIALECTS, LAYERS, Case
from tests.wild.catalogue import CASES

#: Further columns: title → what it says of (family, dialect).
MORE_COLUMNS: dict[str, Callable[[str, str], str]] = {}


class Notes:
    """Remarks, numbered in the order in which cells first need them."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        return f"[{self.numbers.setdefault(text, len(self.numbers) + 1)}]"


def cell(cases: list[Case], notes: Notes) -> str:
    """What reading gives, over all cases of one family, dialect and kind of layer."""
    if not cases:
        return "not written"
    found: list[str] = []
    for case in cases:
        kind, _, says = case.outcome.partition(": ")
        text = {"exact": "exact", "note": "exact, note", "refused": "refused"}[kind]
        if says:
            where = f"{case.what}: " if case.what else ""
            text += f" {notes.mark(where + says)}"
        if text not in found:
            found.append(text)
    return "; ".join(found)


def render() -> str:
    """The dialects, the table and its notes, in Markdown."""
    rows: dict[tuple[str, str], list[Case]] = {}
    for case in CASES:
        rows.setdefault((case.family, case.dialect), []).append(case)
    families = list(dict.fromkeys(family for family, _ in rows))
    notes = Notes()
    out = ["| dialect | written by | how its files name a module |", "|---|---|---|"]
    for dialect, how in DIALECTS.items():
        writers = dict.fromkeys(c.writer for c in CASES if c.dialect == dialect)
        out.append(f"| {dialect} | {', '.join(writers)} | {how} |")
    out += ["", f"| family | dialect | {' | '.join((*LAYERS, *MORE_COLUMNS))} |"]
    out.append("|---" * (2 + len(LAYERS) + len(MORE_COLUMNS)) + "|")
    for family in families:
        for dialect in DIALECTS:
            cases = rows.get((family, dialect))
            if cases:
                cells = [cell([c for c in cases if c.layer == kind], notes) for kind in LAYERS]
                cells += [say(family, dialect) for say in MORE_COLUMNS.values()]
                out.append(f"| {family} | {dialect} | {' | '.join(cells)} |")
        if any((family, dialect) not in rows for dialect in DIALECTS):
            cells = ["not written"] * len(LAYERS) + ["–"] * len(MORE_COLUMNS)
            out.append(f"| {family} | any other | {' | '.join(cells)} |")
    out.append("")
    out += [f"{number}. {text}" for text, number in notes.numbers.items()]
    return "\n".join(out)
