"""The heat map: how alike the two bases are, by depth and by kind of layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from regraft.report.places import Place, split_site
from regraft.report.words import number
from regraft.result import SiteResult

#: Viridis at even steps: equal steps in value look equal, and it reads without colour vision.
_STOPS = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 73, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (109, 205, 89),
    (180, 222, 44),
    (253, 231, 37),
)
#: Where the colours may start. Related bases lie near 1, where a scale from 0 would show nothing.
_FLOORS = (0.9, 0.8, 0.5, 0.0)
#: Up to this many columns the figures fit into the cells.
_COLUMNS_WITH_FIGURES = 26
PHI, COSINE = "min(Φ_l, Φ_r)", "weight cosine"


@dataclass(frozen=True)
class Cell:
    """One cell: colour, ink and words; ``state`` is "value", "refused" or "empty"."""

    state: str
    words: str = ""
    figure: str = ""
    fill: str = ""
    ink: str = ""
    other: bool = False


@dataclass(frozen=True)
class Column:
    label: str
    words: str
    starts_group: bool


@dataclass(frozen=True)
class Group:
    label: str
    span: int


@dataclass(frozen=True)
class Row:
    kind: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class HeatMap:
    """One component's map, ready for the template."""

    component: str
    groups: tuple[Group, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    refused: bool
    dense: bool


@dataclass(frozen=True)
class HeatMaps:
    """All maps with the scale they share.

    ``measure`` is what colours mean; ``mixed`` is true when some cells had only the other measure.
    """

    maps: tuple[HeatMap, ...]
    measure: str
    mixed: bool
    low: float
    legend: tuple[tuple[str, str], ...]


def similarity(site: SiteResult) -> tuple[float, str] | None:
    """The site's similarity and which measure it is: Φ where it was computed, else the cosine."""
    left, right = site.phi_left, site.phi_right
    if left is not None and right is not None and math.isfinite(left + right):
        return min(left, right), PHI
    if site.cosine is not None and math.isfinite(site.cosine):
        return site.cosine, COSINE
    return None


def colour(value: float, low: float = 0.0) -> tuple[str, str]:
    """(fill, ink) of a value on the scale from ``low`` to 1; values outside take the end's colour.

    >>> colour(0.0), colour(1.0)
    (('#440154', '#fff'), ('#fde725', '#000'))
    """
    place = min(max((value - low) / (1 - low), 0.0), 1.0) * (len(_STOPS) - 1)
    index = min(int(place), len(_STOPS) - 2)
    part = place - index
    red, green, blue = (
        round(a + (b - a) * part) for a, b in zip(_STOPS[index], _STOPS[index + 1], strict=True)
    )
    # Rec. 709 luma: from here up black is easier to read than white.
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 118
    return f"#{red:02x}{green:02x}{blue:02x}", "#000" if light else "#fff"


def heat_maps(sites: Iterable[SiteResult], refused: Mapping[str, str]) -> HeatMaps:
    """Arrange the carried sites, and the refused ones that have a place among them."""
    carried = [(split_site(s.site), s) for s in sites]
    found = [f for _, s in carried if (f := similarity(s)) is not None]
    measures = {measure for _, measure in found}
    low = next((f for f in _FLOORS if all(v >= f for v, _ in found)), 0.0)
    components = {place.component: None for place, _ in carried}
    # Refused names may be tensor names of the file: only those that name a block can be placed.
    lost = [(p, n) for n in refused if (p := split_site(n)).in_block and p.component in components]
    main = PHI if PHI in measures else COSINE
    maps = []
    for component in components:
        here = [(p, s) for p, s in carried if p.component == component]
        gone = [(p, n) for p, n in lost if p.component == component]
        maps.append(_one_map(component, here, gone, low, main))
    steps = [low + (1 - low) * i / 20 for i in range(21)]
    legend = tuple((colour(v, low)[0], _tick(i, v)) for i, v in enumerate(steps))
    return HeatMaps(tuple(maps), main, len(measures) > 1, low, legend)


def _one_map(
    component: str,
    here: list[tuple[Place, SiteResult]],
    gone: list[tuple[Place, str]],
    low: float,
    main: str,
) -> HeatMap:
    columns: dict[object, Place] = {}
    for place in [p for p, _ in here] + [p for p, _ in gone]:
        # Sites of one position may carry different labels ("0" and "0.0"): the order decides.
        columns.setdefault((place.order, place.group), place)
    ordered = sorted(columns.values(), key=lambda p: (p.order, p.group))
    inner = {(p.order, p.group): i for i, p in enumerate(ordered)}
    values: dict[tuple[str, int], list[SiteResult]] = {}
    losses: dict[tuple[str, int], list[str]] = {}
    kinds: dict[str, None] = {}
    for place, site in here:
        values.setdefault((place.kind, inner[place.order, place.group]), []).append(site)
        kinds[place.kind] = None
    for place, name in gone:
        losses.setdefault((place.kind, inner[place.order, place.group]), []).append(name)
        kinds[place.kind] = None
    rows = tuple(
        Row(
            kind,
            tuple(
                _cell(values.get((kind, i), []), losses.get((kind, i), []), low, main)
                for i in range(len(ordered))
            ),
        )
        for kind in sorted(kinds, key=_natural)
    )
    labels = _short_labels(ordered)
    heads: list[Column] = []
    groups: list[Group] = []
    for group, members in groupby(zip(ordered, labels, strict=True), key=lambda m: m[0].group):
        listed = list(members)
        groups.append(Group(group, len(listed)))
        for position, (place, label) in enumerate(listed):
            words = f"{group} {place.label}".strip()
            heads.append(Column(label, words, position == 0))
    dense = len(ordered) > _COLUMNS_WITH_FIGURES
    return HeatMap(component, tuple(groups), tuple(heads), rows, bool(losses), dense)


def _natural(kind: str) -> tuple[object, ...]:
    """Attention first, then the rest, each by name: the order people read such maps in."""
    return (not kind.startswith(("attn", "self_attn", "cross_attn")), kind)


def _short_labels(places: list[Place]) -> list[str]:
    """Column labels without the ".0" that every column of its group carries."""
    labels = []
    for place in places:
        siblings = [p.label for p in places if p.group == place.group]
        bare = all(s.endswith(".0") for s in siblings if "." in s)
        labels.append(place.label.removesuffix(".0") if bare else place.label)
    return labels


def _cell(sites: list[SiteResult], lost: list[str], low: float, main: str) -> Cell:
    found = [(s, f) for s in sites if (f := similarity(s)) is not None]
    if found:
        # One measure per cell: a mean over two would mean nothing.
        of_main = [(s, f) for s, f in found if f[1] == main] or found
        value = sum(f[0] for _, f in of_main) / len(of_main)
        measure = of_main[0][1][1]
        fill, ink = colour(value, low)
        names = of_main[0][0].site if len(of_main) == 1 else f"mean of {len(of_main)} sites"
        words = f"{names}: {measure} {number(value)}"
        return Cell("value", words, _figure(value), fill, ink, measure != main)
    if sites:
        return Cell("value", f"{sites[0].site}: shapes differ, no similarity", "?", "", "")
    if lost:
        return Cell("refused", f"{lost[0]}: refused", "×")
    return Cell("empty")


def _tick(index: int, value: float) -> str:
    """A label at every fifth step where two decimals are exact."""
    return f"{value:.2f}" if index % 5 == 0 and abs(round(value, 2) - value) < 1e-9 else ""


def _figure(value: float) -> str:
    """Two decimals without the leading zero: cells are narrow. Never rounds up to 1."""
    if value >= 0.9999:
        return "1"
    shown = math.floor(value * 100) / 100 if value > 0.99 else round(value, 2)
    return f"{shown:.2f}".replace("0.", ".", 1)
