"""What a merge reports, and what its output says of its own making."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from regraft.adapters import Adapter, Site
from regraft.bases import Base, Weight
from regraft.files import Located
from regraft.merge.added import Measured
from regraft.merge.plan import tied
from regraft.provenance import adapter_facts, other_base
from regraft.result import MergedSite, MergeResult
from regraft.transfer import DTYPES
from regraft.versions import versions

#: A share of ΔW lost to rounding above this is told.
_TELL = 0.01


def account(
    result: MergeResult, measured: Sequence[Measured], base: Base, loaded: Sequence[Adapter]
) -> None:
    """Put what was measured into the result."""
    for m in measured:
        weight = base.at(m.site)
        result.sites.append(
            MergedSite(
                site=str(m.site),
                family=_family(m.site, loaded),
                shape=weight.shape,
                dtype=_stored(weight, result.dtype),
                relative_change=_ratio(m.change, m.weight),
                lost_to_rounding=_ratio(m.lost, m.change),
                moved=m.moved,
            )
        )
    change = math.fsum(m.change for m in measured)
    result.relative_change = _ratio(change, math.fsum(m.weight for m in measured))
    result.lost_to_rounding = _ratio(math.fsum(m.lost for m in measured), change)
    floats = all(base.at(m.site).quantised is None for m in measured)
    if result.lost_to_rounding > _TELL and floats:
        stored = ", ".join(sorted({s.dtype for s in result.sites}))
        result.notes.append(
            f"{100 * result.lost_to_rounding:.1f} % of the change was lost to rounding in {stored} "
            "(‖stored − exact‖ / ‖ΔW‖)."
            + (" --dtype fp32 keeps all of it, in a larger file." if stored != "float32" else "")
        )
    still = sum(not m.moved for m in measured)
    if still:
        result.notes.append(
            f"{still} of {len(measured)} weights stayed as they were: their change is zero, or too "
            "small for their dtype."
        )


def _family(site: Site, loaded: Sequence[Adapter]) -> str:
    """The family of the site's update; of several adapters each one's."""
    own = (a.families.get(site, a.family) for a in loaded if site in a.updates)
    return " + ".join(dict.fromkeys(own))


def _stored(weight: Weight, asked: str) -> str:
    if weight.quantised is not None:
        return weight.quantised.form
    return str(DTYPES[asked] if asked else weight.dtype).removeprefix("torch.")


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0


def empty_result(
    base: Base,
    located: Sequence[Located],
    loaded: Sequence[Adapter],
    strengths: Sequence[float],
    dtype: str | None,
) -> MergeResult:
    """What is known before a weight is read."""
    facts = [adapter_facts(one, own) for one, own in zip(located, loaded, strict=True)]
    sites = [site for own in loaded for site in own.updates]
    notes = [note for own in loaded for note in (*own.notes, *other_base(own, base))]
    return MergeResult(
        adapters=[f | {"strength": s} for f, s in zip(facts, strengths, strict=True)],
        base={
            "ref": base.ref,
            "name": base.name,
            "revision": base.revision,
            "sha256_of_used_weights": None,
        },
        sites_refused={k: why for own in loaded for k, why in own.refused.items()},
        dtype=dtype or "",
        notes=[*notes, *tied(base, dict.fromkeys(sites))],
        versions=versions(),
    )


def provenance(
    result: MergeResult, parameters: Mapping[str, bool], sha: str, before: str | None
) -> dict[str, Any]:
    """What the output says of its own making: nothing that differs between two equal runs.

    Parameters
    ----------
    result : MergeResult
    parameters : mapping of str to bool
        Options of :func:`regraft.merge` that decide whether there is an output.
    sha : str
        Hash of the base's weights that change.
    before : str, optional
        The base's own story, where Regraft made the base.
    """
    story: dict[str, Any] = {
        "format": 1,
        "operation": "merge",
        "adapters": [{k: v for k, v in a.items() if k != "ref"} for a in result.adapters],
        "base": {k: v for k, v in result.base.items() if k != "ref"}
        | {"sha256_of_used_weights": sha},
        "parameters": dict(parameters),
        "sites_refused": result.sites_refused,
        "dtype": result.dtype or None,
        "versions": result.versions,
    }
    if before is not None:
        try:
            story["before"] = json.loads(before)
        except (ValueError, RecursionError):
            story["before"] = before
    return story
