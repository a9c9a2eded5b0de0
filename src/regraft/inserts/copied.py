"""Copying an insert: its numbers as they are, where the target has a place of their shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from regraft.adapters import Site
from regraft.bases import Base
from regraft.dialects.load import is_conv1d
from regraft.inserts.carry import Carried
from regraft.inserts.insert import Insert, InsertAdapter, KeysValues, Prompt
from regraft.inserts.pair import InsertPair
from regraft.inserts.places import attentions, weights_in
from regraft.tuners.bottleneck.parts import Bottleneck


def misfit(part: Insert, site: Site, base: Base) -> str:
    """Why an insert does not fit a place of a base, as the end of a sentence; "" if it does.

    Parameters
    ----------
    part : Insert
    site : Site
        One that the base has, with the insert's parameter.
    base : Base
    """
    if isinstance(part, Prompt):
        width = base.at(site.with_parameter("weight")).shape[1]
        own = part.vectors.shape[1]
        return "" if own == width else f"it is {own} wide, and the embedding {width}"
    if isinstance(part, KeysValues):
        there = attentions(base)
        heads, _, each = part.keys.shape
        if (heads, heads * each) == (there.heads or heads, there.width or heads * each):
            return ""
        return (
            f"it has {heads} key heads, {heads * each} wide together, and the base {there.heads}, "
            f"{there.width} wide"
        )
    return _misfit(part, *_sizes(site, base))


def _sizes(site: Site, base: Base) -> tuple[set[int], set[int]]:
    """How many numbers the weights in a module take, and how many they give."""
    takes, gives = set(), set()
    for own in weights_in(site, base):
        shape = base.at(own).shape
        given, taken = (shape[1], shape[0]) if is_conv1d(own, base) else shape[:2]
        takes.add(taken)
        gives.add(given)
    return takes, gives


def _misfit(part: Bottleneck, takes: set[int], gives: set[int]) -> str:
    if part.down.ndim != 2 or part.up.ndim != 2:
        return "it is not made of two matrices"
    (w, n), (m, v) = part.down.shape, part.up.shape
    if w != v or part.down_bias.shape != (w,) or part.up_bias.shape != (m,):
        return f"it is not whole: {tuple(part.down.shape)} and {tuple(part.up.shape)}"
    if any(t.shape != (n,) for t in (part.norm, part.norm_bias) if t is not None):
        return "its norm has another width"
    if part.position != "parallel" and n != m:
        return f"it takes {n} numbers and gives {m}, but is added to what it reads"
    read = takes if part.position == "parallel" else gives
    if n in read and m in gives:
        return ""
    known = ", ".join(map(str, sorted(gives))) or "nothing"
    return f"it gives {m} numbers for {n}, and the module gives {known}"


def copied(adapter: InsertAdapter, pairs: Sequence[InsertPair], target: Base) -> Carried:
    """The insert on the target's places, unchanged.

    A prefix is carried as a whole or not at all: every layer of a model needs one.
    """
    found = Carried()
    for pair in pairs:
        part = adapter.parts[pair.source]
        why = misfit(part, pair.target, target)
        if why:
            found.refused[str(pair.source)] = f"shapes differ: {why}"
            continue
        if isinstance(part, Bottleneck):
            part = replace(part, module=pair.target.module)
        found.parts[pair.target] = part
        found.sources[pair.target] = pair.source
        found.kept[pair.target] = 1.0
    if adapter.family == "prefix" and len(found.parts) < len(attentions(target).modules):
        return Carried(refused=found.refused)
    return found
