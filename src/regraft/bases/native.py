"""Bases under two sets of names: diffusers' and those of the original single-file checkpoint.

Flux, SD 3, HunyuanVideo, Wan and others are published both as diffusers folders and as single
files with the names (and the fused layers) of the code they were trained with. Both are one base:
its sites carry diffusers' names, and this module says where each lies under the other names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from regraft.adapters import Site
from regraft.bases.base import Base, Rows
from regraft.bases.native_tables import Entry, Table, recognise
from regraft.bases.unet_names import to_ldm


@dataclass(frozen=True)
class Part:
    """What one native parameter holds of a site.

    ``rows`` are ranges of the native parameter's rows, in the order in which they make up the site;
    empty means all of them.
    """

    site: Site
    rows: Rows = ()


#: (native module, parameter) → the sites it holds.
NativeParts = dict[tuple[str, str], tuple[Part, ...]]


def architecture_of_names(modules: Iterable[str]) -> str | None:
    """The architecture with these module names, diffusers' or native, such as "flux".

    Parameters
    ----------
    modules : iterable of str
        All module names of one model, whatever its depth and width.

    Returns
    -------
    str or None
        The name of a table in ``maps``.
    """
    found = recognise(modules)
    return None if found is None else found[0].architecture


def native_parts(base: Base, component: str) -> NativeParts:
    """Every native parameter of a component, and the sites it holds.

    Parameters
    ----------
    base : Base
        Opened from either set of names.
    component : str

    Returns
    -------
    dict
        (native module, parameter) → parts, in the order of the native rows. A parameter without
        another name stands under its own. Empty where the architecture has no other names.
    """
    sites = {
        s: w.shape
        for held in (base.weights, base.others)
        for s, w in held.items()
        if s.component == component
    }
    modules = {s.module for s in sites}
    if component == "unet":
        ldm = to_ldm(modules)
        return {(ldm[s.module], s.parameter): (Part(s),) for s in sites if s.module in ldm}
    found = recognise(modules)
    if found is None or not found[0].renamed:
        return {}
    return _parts(found[0], component, sites)


def _parts(table: Table, component: str, sites: Mapping[Site, tuple[int, ...]]) -> NativeParts:
    by_name = {_name(s): s for s in sites}
    entries = table.canonical.all(by_name)
    parts: NativeParts = {}
    for name, site in by_name.items():
        entry = entries.get(name)
        if entry is None or any(c not in by_name for c, _ in entry.parts):
            parts[site.module, site.parameter] = (Part(site),)
            continue
        key = _site(entry.native)
        if (key.module, key.parameter) not in parts:
            held = {by_name[c]: ranges for c, ranges in entry.parts}
            rows = {s: sites[s][0] if sites[s] else 0 for s in held}
            parts[key.module, key.parameter] = _laid_out(held, rows)
    return parts


def _laid_out(held: Mapping[Site, Rows], rows: Mapping[Site, int]) -> tuple[Part, ...]:
    """Parts by shares of rows → parts by rows, from the rows that each site really has."""
    pieces: list[tuple[int, Site, int]] = []  # (share where it begins, site, rows)
    for site, ranges in held.items():
        shares = sum(last - first for first, last in ranges)
        pieces += [(first, site, rows[site] * (last - first) // shares) for first, last in ranges]
    starts: dict[tuple[Site, int], tuple[int, int]] = {}
    position = 0
    for share, site, count in sorted(pieces, key=lambda piece: piece[0]):
        starts[site, share] = (position, position + count)
        position += count
    return tuple(
        Part(site, tuple(starts[site, first] for first, _ in ranges))
        for site, ranges in held.items()
    )


def to_canonical(
    table: Table, stored: Mapping[Site, tuple[int, ...]]
) -> dict[Site, list[tuple[Site, Rows]]]:
    """The sites that each parameter of a native checkpoint holds.

    Parameters
    ----------
    table : Table
    stored : mapping of Site to shape
        Under native names, without component.

    Returns
    -------
    dict
        Native site → its sites, and the ranges of its rows that each is (empty: all). A parameter
        that the table does not know, or whose rows do not divide, keeps its own name.
    """
    by_name = {_name(s): s for s in stored}
    entries = table.native.all(by_name)
    found: dict[Site, list[tuple[Site, Rows]]] = {}
    for name, site in by_name.items():
        entry, shape = entries.get(name), stored[site]
        if entry is None or (shape and shape[0] % entry.total):
            found[site] = [(site, ())]
        else:
            found[site] = _cut(entry, shape[0] if shape else 0)
    return found


def _cut(entry: Entry, rows: int) -> list[tuple[Site, Rows]]:
    unit = rows // entry.total
    return [(_site(c), tuple((a * unit, b * unit) for a, b in ranges)) for c, ranges in entry.parts]


def _name(site: Site) -> str:
    return f"{site.module}.{site.parameter}" if site.module else site.parameter


def _site(name: str) -> Site:
    module, _, parameter = name.rpartition(".")
    return Site("", module, parameter)
