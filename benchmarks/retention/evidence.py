"""What is seen of every pair of bases before any adapter is touched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.retention.family import Family
from regraft.activations import cka_by_depth
from regraft.bases import Base, open_base
from regraft.compare import compare
from regraft.pairing import kind_of
from regraft.parallel import single_threaded
from regraft.subspaces import Dimension, SubspaceLibrary
from regraft.subspaces.atc import transferability

#: Directions per weight for Φ and ATC: the paper's 320 would be all of these small weights'.
DIRECTIONS = 16


@dataclass(frozen=True)
class Evidence:
    """One pair of bases: v1 and the target of one upgrade."""

    kind: str
    upgrade: str
    facts: dict[str, Any]


@single_threaded()
def gather(family: Family, upgrade: str, library: SubspaceLibrary) -> Evidence:
    """Lineage, verdict, cosine, Φ, what each method keeps, ATC, CKA."""
    source, target = open_base(family.base("v1")), open_base(family.base(upgrade))
    found = compare(source, target, library=library, dimension=DIRECTIONS)
    # ΔW of an adapter lives in matrices; embeddings would weigh in with their own pairing
    fitting = [s for s in found.sites if s.phi_left is not None]
    costs = _atc(source, target, library)
    facts: dict[str, Any] = {
        "lineage": found.lineage,
        "verdict": found.verdict,
        **found.evidence,
        "phi_left": _mean([s.phi_left for s in fitting]),
        "phi_right": _mean([s.phi_right for s in fitting]),
        "chance": _mean([s.chance for s in fitting]),
        "keeps": found.keeps,
        **costs,
        "cka": cka_by_depth(family.states("v1"), family.states(upgrade)),
    }
    return Evidence(family.kind, upgrade, facts)


def _atc(source: Base, target: Base, library: SubspaceLibrary) -> dict[str, float | None]:
    sides = tuple(
        [s for s in base.weights if min(_matrix(base, s)) >= DIRECTIONS]
        for base in (source, target)
    )
    found = transferability(
        source,
        target,
        library,
        dimension=Dimension.parse(DIRECTIONS),
        sites=(sides[0], sides[1]),
        kind=kind_of,
    )
    return {"atc": found.cost, "atc_relative": found.relative, "atc_by_name": found.by_name}


def _matrix(base: Base, site: Any) -> tuple[int, int]:
    shape = base.weights[site].shape
    rest = 1
    for size in shape[1:]:
        rest *= size
    return shape[0], rest


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return fmean(there) if there else None


def write_evidence(path: Path, seen: Sequence[Evidence]) -> None:
    """A list, one entry per pair of bases."""
    path.write_text(json.dumps([asdict(e) for e in seen], indent=1, default=str) + "\n")


def read_evidence(path: Path) -> list[Evidence]:
    """What :func:`write_evidence` wrote."""
    return [Evidence(**entry) for entry in json.loads(path.read_text())]
