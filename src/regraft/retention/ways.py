"""Every way of putting an adapter on a target: all methods, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adapters import Adapter
from regraft.bases import Base
from regraft.crossing import Crossing, Progress, energies_of
from regraft.errors import NothingCarried, RegraftError
from regraft.methods import MethodOptions, get_insert_method, get_method, insert_methods, methods
from regraft.methods.choose import choose
from regraft.pairing import pair_sites
from regraft.retention.hosted import load_any
from regraft.subspaces import SubspaceLibrary

if TYPE_CHECKING:
    from regraft.inserts.insert import InsertAdapter
    from regraft.retention.hosted import AnyAdapter

#: The name of the only way when the adapter is on the target already.
AS_IT_IS = "as it is"


@dataclass
class OnTarget:
    """An adapter on the target, and what the way there lost of it.

    ``energy_kept`` is None where nothing was carried: it is as it is.
    """

    adapter: AnyAdapter
    sites: int
    energy_kept: float | None = None
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class Ways:
    """An adapter, and what each way made of it for the target.

    ``refused`` maps methods that carry nothing to the reason; ``predicted`` is the verdict of the
    weights alone; ``left_out`` holds what no way can carry.
    """

    loaded: AnyAdapter
    carried: dict[str, OnTarget] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    predicted: dict[str, Any] | None = None

    @property
    def example(self) -> AnyAdapter:
        """What a random control is like: the plain copy if there is one."""
        found = self.carried.get("copy") or next(iter(self.carried.values()))
        return found.adapter


def as_it_is(ref: str | Path, target: Base) -> Ways:
    """The one way of an adapter that was made for the target.

    Raises
    ------
    SitesNotInBase, ShapeMismatch
        It does not fit the target.
    """
    loaded = load_any(ref, target)
    sites = len(loaded.updates if isinstance(loaded, Adapter) else loaded.parts)
    return Ways(loaded, {AS_IT_IS: OnTarget(loaded, sites)}, left_out=dict(loaded.refused))


def by_methods(
    ref: str | Path,
    source: Base,
    target: Base,
    *,
    names: Sequence[str] | None,
    options: MethodOptions,
    library: SubspaceLibrary,
    progress: Progress,
    seed: int = 0,
) -> Ways:
    """Carry an adapter by the methods named, or all; always by copying too, which comes first.

    ``seed`` is that of the samples that activation-map is fitted on.

    Raises
    ------
    UnknownMethod
    NothingCarried
        No method carries anything.
    """
    loaded = load_any(ref, source)
    if isinstance(loaded, Adapter):
        ways = _of_weights(loaded, source, target, names, options, library, progress)
    else:
        ways = _of_inserts(loaded, source, target, names, library, progress, seed)
    library.cache.commit()
    if not ways.carried:
        raise NothingCarried(
            "No method carries anything to this target: "
            + "; ".join(sorted(set(ways.refused.values()))[:3])
            + ".",
            fix="`regraft compare` shows how the two bases relate.",
        )
    return ways


def _of_weights(
    loaded: Adapter,
    source: Base,
    target: Base,
    names: Sequence[str] | None,
    options: MethodOptions,
    library: SubspaceLibrary,
    progress: Progress,
) -> Ways:
    chosen = {m.name: m for m in (methods() if names is None else map(get_method, names))}
    chosen = {"copy": get_method("copy"), **chosen}
    energies = energies_of(loaded)
    if not sum(energies.values()):
        raise NothingCarried(
            "The adapter changes nothing: every update it holds is zero.", file=loaded.name
        )
    paired = pair_sites(source, target, loaded.updates)
    crossing = Crossing(loaded, source, target, library, paired, energies, progress)
    seen = choose(crossing.facts())
    ways = Ways(
        loaded,
        left_out={**loaded.refused, **{str(s): why for s, why in paired.unpaired.items()}},
        predicted={"verdict": seen.word, "method": seen.method, "why": seen.why},
    )
    for name, method in chosen.items():
        try:
            carried = crossing.carry(method, options)
        except RegraftError as error:
            ways.refused[name] = error.what
            continue
        if carried.adapter.updates and carried.energy_kept > 0:
            ways.carried[name] = OnTarget(
                carried.adapter,
                len(carried.adapter.updates),
                carried.energy_kept if carried.sites else None,
                carried.refused,
            )
        else:
            ways.refused[name] = _reasons(carried.refused, ways)
    return ways


def _of_inserts(
    loaded: InsertAdapter,
    source: Base,
    target: Base,
    names: Sequence[str] | None,
    library: SubspaceLibrary,
    progress: Progress,
    seed: int,
) -> Ways:
    from regraft.inserts.choose import from_weights
    from regraft.inserts.transfer import InsertCrossing, refuse_nothing

    known = tuple(m.name for m in methods())
    chosen = [m.name for m in insert_methods()]
    if names is not None:
        chosen = [get_insert_method(name, known).name for name in names]
    refuse_nothing(loaded, loaded.name)
    crossing = InsertCrossing(loaded, source, target, library, seed=seed, progress=progress)
    seen = from_weights(crossing.facts())
    ways = Ways(
        loaded,
        left_out=dict(loaded.refused),
        predicted=None
        if seen is None
        else {"verdict": seen.word, "method": seen.method, "why": seen.why},
    )
    for name in dict.fromkeys(["copy", *chosen]):
        try:
            carried = crossing.copied() if name == "copy" else crossing.mapped()
        except RegraftError as error:
            ways.refused[name] = error.what
            continue
        if name == "copy":
            carried.refused |= crossing.unpaired()
        if carried.parts:
            ways.carried[name] = OnTarget(
                replace(loaded, parts=carried.parts),
                len(carried.parts),
                crossing.energy_kept(carried),
                carried.refused,
            )
        else:
            ways.refused[name] = _reasons(carried.refused, ways)
    return ways


def _reasons(refused: dict[str, str], ways: Ways) -> str:
    reasons = sorted({*refused.values()} or {*ways.left_out.values()})
    return "; ".join(reasons[:2]) or "nothing of the adapter is left"
