"""The bar chart: energy kept at every site against a plain copy, in network order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from regraft.report.places import split_site
from regraft.report.words import percent
from regraft.result import SiteResult

_WIDTH = 1040
_LEFT, _RIGHT, _TOP = 44, 8, 10
_HEIGHT, _SHARE_HEIGHT, _GAP, _FOOT = 150, 56, 26, 20
_NARROWEST, _WIDEST = 3.0, 22.0
#: Narrower than this, a label would run into the next one.
_LABEL_WIDTH = 34.0


@dataclass(frozen=True)
class Bar:
    """One site: ``kept`` and ``share`` are (y, height), ``copy_y`` the copy's mark."""

    x: float
    width: float
    kept: tuple[float, float]
    copy_y: float
    share: tuple[float, float]
    words: str


@dataclass(frozen=True)
class Chart:
    """Geometry for the template's SVG, in its own units."""

    width: float
    height: float
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    groups: tuple[tuple[float, float, str], ...]
    left: float
    right: float
    zero: float
    share_zero: float
    share_top: float
    share_peak: str
    uniform: str
    summary: str


def in_network_order(sites: Sequence[SiteResult]) -> list[SiteResult]:
    """As data flows: components as they come, blocks by depth, kinds by name."""
    places = {s.site: split_site(s.site) for s in sites}
    components = {p.component: i for i, p in reversed(list(enumerate(places.values())))}

    def key(site: SiteResult) -> tuple[object, ...]:
        place = places[site.site]
        return (components[place.component], place.order, place.group, place.kind, site.site)

    return sorted(sites, key=key)


def bar_chart(sites: Sequence[SiteResult]) -> Chart | None:
    """Lay the chart out, or None when nothing was carried."""
    if not sites:
        return None
    ordered = in_network_order(sites)
    step = min(max((_WIDTH - _LEFT - _RIGHT) / len(ordered), _NARROWEST), _WIDEST)
    # Gaps between bars vanish when there are hundreds: a skyline reads better than a comb.
    width = step * (0.78 if step > 5 else 0.94)
    peak = max([1.0, *(_finite(s.kept) for s in ordered)])
    zero = _TOP + _HEIGHT
    share_top = zero + _GAP
    share_zero = share_top + _SHARE_HEIGHT
    largest = max(_finite(s.share) for s in ordered) or 1.0
    bars = []
    for index, site in enumerate(ordered):
        kept = _finite(site.kept) / peak * _HEIGHT
        share = _finite(site.share) / largest * _SHARE_HEIGHT
        bars.append(
            Bar(
                x=_round(_LEFT + index * step),
                width=_round(width),
                kept=(_round(zero - kept), _round(kept)),
                copy_y=_round(zero - _finite(site.kept_by_copy) / peak * _HEIGHT),
                share=(_round(share_zero - share), _round(share)),
                words=f"{site.site}: kept {percent(site.kept)}, by plain copy "
                f"{percent(site.kept_by_copy)}, {percent(site.share)} of the adapter's energy",
            )
        )
    right = _LEFT + len(ordered) * step
    ticks = tuple(
        (_round(zero - value / peak * _HEIGHT), percent(value, 0)) for value in _ticks(peak)
    )
    return Chart(
        width=_round(max(right + _RIGHT, 360)),
        height=share_zero + _FOOT,
        bars=tuple(bars),
        ticks=ticks,
        groups=_groups(ordered, step),
        left=_LEFT,
        right=_round(right),
        zero=zero,
        share_zero=share_zero,
        share_top=share_top,
        share_peak=percent(largest),
        uniform=_uniform(ordered),
        summary=_summary(ordered),
    )


def _finite(value: float) -> float:
    return max(value, 0.0) if math.isfinite(value) else 0.0


def _round(value: float) -> float:
    return round(value, 2)


def _ticks(peak: float) -> list[float]:
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    return ticks if peak < 1.2 else [0.0, 0.5, 1.0, *([peak] if peak >= 1.4 else [])]


def _groups(ordered: Sequence[SiteResult], step: float) -> tuple[tuple[float, float, str], ...]:
    """(x of the first bar, middle, label) per run of one block; no label where there is no room."""
    found = []
    index = 0
    places = [split_site(s.site) for s in ordered]
    several = len({p.component for p in places}) > 1
    for (component, group), members in groupby(places, key=lambda p: (p.component, p.group)):
        count = len(list(members))
        start = _LEFT + index * step
        label = f"{component} {group}" if several and group in ("layers", "in", "out") else group
        room = count * step
        fits = room >= max(_LABEL_WIDTH, 6.2 * len(label))
        found.append((_round(start), _round(start + room / 2), label if fits else ""))
        index += count
    return tuple(found)


def _uniform(ordered: Sequence[SiteResult]) -> str:
    """A sentence instead of reading hundreds of equal bars, or "" when they differ."""
    if all(abs(s.kept - 1) < 1e-6 and abs(s.kept_by_copy - 1) < 1e-6 for s in ordered):
        return (
            "Every carried site kept all of its energy, as a plain copy does. What "
            "differs between sites is only how much of the adapter each of them holds."
        )
    return ""


def _summary(ordered: Sequence[SiteResult]) -> str:
    least = min(ordered, key=lambda s: s.kept)
    most = max(ordered, key=lambda s: s.kept)
    return (
        f"Energy kept at {len(ordered)} sites in network order: from {percent(least.kept)} at "
        f"{least.site} to {percent(most.kept)} at {most.site}. The table below has every figure."
    )
