"""The tables of two sets of names: diffusers' and those of the original ("native") checkpoint.

Read from ``maps/*.json``, which ``lab/native_names.py`` writes from diffusers' own converters. A
parameter's name is written as the file has it: ``double_blocks.3.img_attn.qkv.weight``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any

from regraft.bases.base import Rows

_NUMBER = re.compile(r"\d+")
#: Of the parameters outside the numbered blocks a model must have all that no variant lacks, and of
#: those it has, this share must be known.
_KNOWN = 0.9


def shape_of_name(name: str) -> str:
    """A name with every number replaced by ``#``, and the mark of a last block too."""
    return _NUMBER.sub("#", name).replace("$", "#")


def module_of(name: str) -> str:
    """A parameter's module."""
    return name.rpartition(".")[0]


@dataclass(frozen=True)
class Entry:
    """One native parameter and its parts; ``#`` and ``$`` in the names are not filled in yet.

    ``parts`` are (canonical name, ranges of the native rows, in shares of ``total``), ordered by
    where they begin; no ranges means all of the rows.
    """

    native: str
    parts: tuple[tuple[str, Rows], ...]
    total: int

    def filled(self, number: str) -> Entry:
        """With the block's number in the names."""

        def fill(name: str) -> str:
            return name.replace("#", number).replace("$", number)

        return Entry(fill(self.native), tuple((fill(c), r) for c, r in self.parts), self.total)


def _entry(native: str, parts: str | Mapping[str, str]) -> Entry:
    if isinstance(parts, str):
        return Entry(native, ((parts, ()),), 1)
    cut = {
        canonical: tuple((int(a), int(b)) for a, b in (r.split(":") for r in ranges.split()))
        for canonical, ranges in parts.items()
    }
    return Entry(native, tuple(cut.items()), max(b for ranges in cut.values() for _, b in ranges))


@cache
def name_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of names as a regular expression; the block's number is its only group."""
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d{1,6})").replace(r"\$", r"(\d{1,6})"))


class _Index:
    """Names of one set → the entry each belongs to, its number filled in."""

    def __init__(self, patterns: Iterable[tuple[str, Entry]]) -> None:
        self._by_shape: dict[str, list[tuple[str, re.Pattern[str], Entry]]] = {}
        self._ends: set[str] = set()
        for pattern, entry in patterns:
            found = self._by_shape.setdefault(shape_of_name(pattern), [])
            found.append((pattern, name_pattern(pattern), entry))
            # The last block's own form is tried first.
            found.sort(key=lambda f: "$" not in f[0])
            if "$" in pattern:
                self._ends.add(pattern.partition("$")[0])

    def all(self, names: Iterable[str]) -> dict[str, Entry]:
        """name → its entry, for the names that are known."""
        names = list(names)
        last = {
            stack: max(
                (
                    int(m[1])
                    for n in names
                    if (m := re.match(rf"{re.escape(stack)}(\d{{1,6}})\.", n))
                ),
                default=-1,
            )
            for stack in self._ends
        }
        found: dict[str, Entry] = {}
        for name in names:
            for pattern, regex, entry in self._by_shape.get(shape_of_name(name), []):
                match = regex.fullmatch(name)
                if match is None:
                    continue
                number = match[1] if match.groups() else ""
                if "$" in pattern and int(number) != last[pattern.partition("$")[0]]:
                    continue
                found[name] = entry.filled(number)
                break
        return found


@dataclass(frozen=True)
class Table:
    """One architecture's two sets of names."""

    architecture: str
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    optional: frozenset[str]

    @cached_property
    def renamed(self) -> bool:
        """Whether the two sets differ at all."""
        return any([(e.native, ())] != [*e.parts] for e in self.entries)

    @cached_property
    def native(self) -> _Index:
        """By native name."""
        return _Index((e.native, e) for e in self.entries)

    @cached_property
    def canonical(self) -> _Index:
        """By diffusers' name."""
        return _Index((c, e) for e in self.entries for c, _ in e.parts)

    @cached_property
    def modules(self) -> dict[bool, Modules]:
        """native? → the modules under that set of names."""
        return {
            True: Modules((e.native, e.native in self.optional) for e in self.entries),
            False: Modules(
                (c, e.native in self.optional) for e in self.entries for c, _ in e.parts
            ),
        }


class Modules:
    """The module names that a model may have, and those it must have, by (parameter, optional?)."""

    def __init__(self, parameters: Iterable[tuple[str, bool]]) -> None:
        parameters = list(parameters)
        self.must = frozenset(
            module_of(n)
            for n, optional in parameters
            if n.endswith(".weight") and not optional and not {"#", "$"} & set(n)
        )
        self._may: dict[str, list[re.Pattern[str]]] = {}
        for pattern in dict.fromkeys(module_of(n) for n, _ in parameters):
            self._may.setdefault(shape_of_name(pattern), []).append(name_pattern(pattern))

    def __contains__(self, module: object) -> bool:
        options = self._may.get(shape_of_name(str(module)), [])
        return any(regex.fullmatch(str(module)) for regex in options)


@cache
def tables() -> tuple[Table, ...]:
    """Every table, those with fewest names first."""
    found = []
    for file in (resources.files("regraft.bases") / "maps").iterdir():
        if file.name.endswith(".json"):
            read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            entries = tuple(_entry(n, p) for n, p in read["names"].items())
            name = file.name.removesuffix(".json")
            found.append(Table(name, tuple(read["classes"]), entries, frozenset(read["optional"])))
    return tuple(sorted(found, key=lambda t: (len(t.entries), t.architecture)))


@cache
def table_of(architecture: str) -> Table:
    """The table of an architecture by its name, such as "flux" (KeyError if there is none)."""
    return {t.architecture: t for t in tables()}[architecture]


def recognise(modules: Iterable[str]) -> tuple[Table, bool] | None:
    """Whose module names these are, and whether they are the native ones.

    Any depth and width. Where the two sets are the same, they count as diffusers'.
    """
    own = {m for m in modules if m}
    best: tuple[Table, bool] | None = None
    most = 0.0
    for table in tables():
        for native in (False, True):
            names = table.modules[native]
            if not own >= names.must:
                continue
            share = sum(m in names for m in own) / max(1, len(own))
            if share >= _KNOWN and share > most:
                best, most = (table, native), share
    return best
