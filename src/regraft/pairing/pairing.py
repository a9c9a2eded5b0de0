"""Pairing sites by name, and by similarity where the two bases have different depths.

Names pair two releases of one architecture. When a target has fewer or more blocks of a kind (SDXL
→ SSD-1B), equal block numbers no longer mean the same block: there, each target site takes the
source site of its kind and shape whose weight it resembles most (cosine). ProLoRA
(arXiv 2506.04244) does the same with Φ; the cosine needs no decomposition and separates better,
because a pruned block keeps most of its numbers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from regraft.adapters import Site
from regraft.bases import Base
from regraft.errors import BadOption

How = Literal["name", "similarity"]

#: Entries of each weight compared. Chance cosines are about 1/√entries = 0.004.
_SKETCH = 65_536
#: A best match below this is no match.
SMALLEST_COSINE = 0.25


@dataclass(frozen=True)
class Pair:
    """One target site and the source site that feeds it.

    ``cosine`` is set when the pair was found by similarity.
    """

    target: Site
    source: Site
    how: How
    cosine: float | None = None


@dataclass
class Pairing:
    """All pairs, and the source sites that feed nothing, with the reason."""

    pairs: list[Pair] = field(default_factory=list)
    unpaired: dict[Site, str] = field(default_factory=dict)

    @property
    def how(self) -> str:
        """ "name", "similarity", or "name and similarity"."""
        ways = sorted({p.how for p in self.pairs})
        return " and ".join(ways) if ways else "none"


def kind_of(site: Site) -> str:
    """The site's name with every block number as ``#``: sites of one kind do the same work."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", f"{site}.").removesuffix(".")


def _sketch(base: Base, site: Site) -> Tensor:
    """A fixed sample of the weight's entries, as a unit vector."""
    flat = base.read(site).flatten()
    step = max(1, flat.numel() // _SKETCH)
    sample = flat[::step].clone()
    unit: Tensor = sample / sample.norm().clamp_min(1e-30)
    return unit


def pair_sites(
    source: Base,
    target: Base,
    sites: Iterable[Site],
    *,
    how: Literal["auto", "name", "similarity"] = "auto",
) -> Pairing:
    """Find the target sites that the given source sites feed.

    Parameters
    ----------
    source, target : Base
    sites : iterable of Site
        The source sites of interest (an adapter's, or all).
    how : str
        "auto" pairs by name, except kinds of which the bases have different numbers of blocks.

    Returns
    -------
    Pairing
    """
    if how not in ("auto", "name", "similarity"):
        raise BadOption(f"No pairing {how!r}.", fix="Choose auto, name or similarity.")
    result = Pairing()
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        groups[kind_of(site)].append(site)
    here: dict[str, list[Site]] = defaultdict(list)
    there: dict[str, list[Site]] = defaultdict(list)
    for base, table in ((source, here), (target, there)):
        for site in (*base.weights, *base.others):
            if kind_of(site) in groups:
                table[kind_of(site)].append(site)
    for kind, wanted in groups.items():
        same_depth = set(here[kind]) == set(there[kind])
        if how == "name" or (how == "auto" and (same_depth or not there[kind])):
            _by_name(wanted, source, target, result)
        else:
            _by_similarity(wanted, here[kind], there[kind], source, target, result)
    return result


def _by_name(wanted: list[Site], source: Base, target: Base, result: Pairing) -> None:
    for site in wanted:
        if site in target:
            result.pairs.append(Pair(site, site, "name"))
        elif site.component not in target.components:
            result.unpaired[site] = f"the target has no {site.component or 'such model'}"
        else:
            result.unpaired[site] = "the target has no such module"


def _by_similarity(
    wanted: list[Site],
    here: list[Site],
    there: list[Site],
    source: Base,
    target: Base,
    result: Pairing,
) -> None:
    """Every target site of one kind takes its most similar source site of the same shape."""
    shape_of = {s: source.at(s).shape for s in here}
    sketches: dict[tuple[int, ...], tuple[list[Site], Tensor]] = {}
    for shape in dict.fromkeys(shape_of.values()):
        members = [s for s in here if shape_of[s] == shape]
        sketches[shape] = (members, torch.stack([_sketch(source, s) for s in members]))
    fed: set[Site] = set()
    for site in there:
        shape = target.at(site).shape
        if shape not in sketches:
            continue
        members, rows = sketches[shape]
        scores = rows @ _sketch(target, site)
        best = int(scores.argmax())
        if float(scores[best]) >= SMALLEST_COSINE and members[best] in wanted:
            result.pairs.append(Pair(site, members[best], "similarity", float(scores[best])))
            fed.add(members[best])
    for site in wanted:
        if site not in fed:
            result.unpaired[site] = "no weight of the target resembles this one"
