"""Pairing the places of an insert on two bases: by name, by similarity, or by depth.

As :mod:`regraft.pairing` does for weights, by the weights that make an insert's space; and by
relative depth where shapes differ, since a map needs a partner for every layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from regraft.adapters import Site
from regraft.bases import Base
from regraft.inserts.insert import InsertAdapter
from regraft.inserts.places import (
    attentions,
    embedding,
    in_order,
    pattern_of,
    space_of,
)
from regraft.pairing import pair_sites

How = Literal["name", "similarity", "depth"]


@dataclass(frozen=True)
class InsertPair:
    """A place on the target and the place on the source that feeds it."""

    target: Site
    source: Site
    how: How


@dataclass
class InsertPairing:
    """All pairs, in the target's order; and the source's places that feed nothing, with why."""

    pairs: list[InsertPair] = field(default_factory=list)
    unpaired: dict[Site, str] = field(default_factory=dict)

    @property
    def how(self) -> str:
        """ "name", "depth", "name and similarity", …"""
        return " and ".join(sorted({pair.how for pair in self.pairs})) or "none"


def pair_inserts(adapter: InsertAdapter, source: Base, target: Base) -> InsertPairing:
    """Find the places on the target that the insert's places on the source feed.

    A prefix feeds every attention of the target, or none. Bottlenecks feed at most one place each,
    so that their sum stays what it was.
    """
    if adapter.family == "prompt":
        return _prompt(adapter, target)
    if adapter.family == "prefix":
        return _prefix(adapter, source, target)
    return _bottlenecks(adapter, source, target)


def _prompt(adapter: InsertAdapter, target: Base) -> InsertPairing:
    (site,) = adapter.parts
    there = embedding(target)
    if there is None:
        return InsertPairing([], {site: "the target is no language model that is known"})
    return InsertPairing([InsertPair(there.with_parameter("prompt"), site, "name")])


def _prefix(adapter: InsertAdapter, source: Base, target: Base) -> InsertPairing:
    here = list(adapter.parts)
    there = [Site("", name, "prefix") for name in attentions(target).modules]
    if not there:
        why = "the target is no language model that is known"
        return InsertPairing([], dict.fromkeys(here, why))
    if set(here) == set(there):
        return InsertPairing([InsertPair(site, site, "name") for site in there])
    alike = _alike(here, there, source, target)
    if alike.keys() == set(there):
        pairs = [InsertPair(site, alike[site], "similarity") for site in there]
    else:
        pairs = [
            InsertPair(site, here[_at_depth(i, len(there), len(here))], "depth")
            for i, site in enumerate(there)
        ]
    fed = {pair.source for pair in pairs}
    why = "the target has fewer layers"
    return InsertPairing(pairs, {site: why for site in here if site not in fed})


def _bottlenecks(adapter: InsertAdapter, source: Base, target: Base) -> InsertPairing:
    groups: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in adapter.parts:
        groups[site.component, pattern_of(site.module)].append(site)
    found = InsertPairing()
    for (component, pattern), wanted in groups.items():
        here, there = (_places(base, component, pattern) for base in (source, target))
        if not there:
            found.unpaired |= dict.fromkeys(wanted, "the target has no such module")
        elif here == there:
            found.pairs += [InsertPair(site, site, "name") for site in wanted]
        else:
            _by_depth(wanted, here, there, source, target, found)
    order = {site: i for i, site in enumerate(in_order(pair.target for pair in found.pairs))}
    found.pairs.sort(key=lambda pair: order[pair.target])
    return found


def _by_depth(
    wanted: Sequence[Site],
    here: Sequence[Site],
    there: Sequence[Site],
    source: Base,
    target: Base,
    found: InsertPairing,
) -> None:
    """The most alike where weights resemble each other, else the one at the same depth."""
    taken: set[Site] = set()
    alike = {s: t for t, s in reversed(_alike(wanted, there, source, target).items())}
    for site in wanted:
        how: How = "similarity" if alike else "depth"
        place = alike.get(site)
        if not alike:
            place = there[_at_depth(here.index(site), len(here), len(there))]
        if place is None or place in taken:
            found.unpaired[site] = "the target has fewer such modules"
            continue
        taken.add(place)
        found.pairs.append(InsertPair(place, site, how))


def _places(base: Base, component: str, pattern: str) -> list[Site]:
    """The modules of one pattern, in order."""
    modules = set()
    for site in base.weights:
        parts = site.module.split(".")
        name = ".".join(parts[: pattern.count(".") + 1])
        if site.component == component and pattern_of(name) == pattern:
            modules.add(name)
    return in_order(Site(component, name, "bottleneck") for name in modules)


def _alike(
    here: Sequence[Site], there: Sequence[Site], source: Base, target: Base
) -> dict[Site, Site]:
    """Target place → the source place whose weights it resembles; those with none are absent."""
    first = {space_of(site, base)[0]: site for base in (source,) for site in here}
    places = {space_of(site, target)[0]: site for site in there}
    paired = pair_sites(source, target, first, how="similarity")
    return {
        places[pair.target]: first[pair.source] for pair in paired.pairs if pair.target in places
    }


def _at_depth(index: int, count: int, others: int) -> int:
    """The place among ``others`` at the same relative depth as ``index`` among ``count``."""
    return round(index * (others - 1) / (count - 1)) if count > 1 else 0
