"""Every way of putting an adapter on a target: all methods, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.adapters import Adapter
from regraft.bases import Base
from regraft.crossing import Carried, Crossing, Progress, energies_of
from regraft.dialects import load_adapter
from regraft.errors import NothingCarried, RegraftError
from regraft.methods import MethodOptions, get_method, methods
from regraft.methods.choose import choose
from regraft.pairing import pair_sites
from regraft.subspaces import SubspaceLibrary

#: The name of the only way when the adapter is on the target already.
AS_IT_IS = "as it is"


@dataclass
class Ways:
    """An adapter, and what each way made of it for the target.

    ``refused`` maps methods that carry nothing to the reason; ``predicted`` is the verdict of the
    weights alone; ``left_out`` holds what no way can carry.
    """

    loaded: Adapter
    carried: dict[str, Carried] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    predicted: dict[str, Any] | None = None

    @property
    def example(self) -> Adapter:
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
    loaded = load_adapter(ref, target)
    return Ways(loaded, {AS_IT_IS: Carried(loaded)}, left_out=dict(loaded.refused))


def by_methods(
    ref: str | Path,
    source: Base,
    target: Base,
    *,
    names: Sequence[str] | None,
    options: MethodOptions,
    library: SubspaceLibrary,
    progress: Progress,
) -> Ways:
    """Carry an adapter by the methods named, or all; always by copying too, which comes first.

    Raises
    ------
    UnknownMethod
    NothingCarried
        No method carries anything.
    """
    chosen = {m.name: m for m in (methods() if names is None else map(get_method, names))}
    chosen = {"copy": get_method("copy"), **chosen}
    loaded = load_adapter(ref, source)
    energies = energies_of(loaded)
    if not sum(energies.values()):
        raise NothingCarried(
            "The adapter changes nothing: every update it holds is zero.", file=str(ref)
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
            ways.carried[name] = carried
        else:
            reasons = sorted({*carried.refused.values()} or {*ways.left_out.values()})
            ways.refused[name] = "; ".join(reasons[:2]) or "nothing of the adapter is left"
    library.cache.commit()
    if not ways.carried:
        raise NothingCarried(
            "No method carries anything to this target: "
            + "; ".join(sorted(set(ways.refused.values()))[:3])
            + ".",
            fix="`regraft compare` shows how the two bases relate.",
        )
    return ways
