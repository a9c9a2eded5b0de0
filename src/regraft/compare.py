"""Two bases side by side, before any adapter is touched: lineage, pairing, Φ, what to expect."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from regraft.adapters import matrix_shape
from regraft.bases import Base, architecture, open_base
from regraft.bases.quantised.cost import notes as quantised_notes
from regraft.crossing import Progress, silent
from regraft.errors import BadOption, NotABase
from regraft.methods import MethodOptions, methods
from regraft.methods.choose import RELATED, PairFacts, choose
from regraft.methods.predict import PairEvidence, predict
from regraft.pairing import Pair, kind_of, pair_sites
from regraft.parallel import in_order
from regraft.subspaces import Closeness, Dimension, SubspaceLibrary
from regraft.versions import versions


@dataclass(frozen=True)
class SiteComparison:
    """One paired site. ``chance`` is the Φ_l of two unrelated weights; ``keeps`` is the share of
    energy each method would keep of an update without preferred direction."""

    site: str
    source: str
    kind: str
    shape: tuple[int, ...]
    cosine: float | None
    difference: float | None
    phi_left: float | None
    phi_right: float | None
    chance: float | None
    keeps: dict[str, float]


@dataclass
class Comparison:
    """Everything ``regraft compare`` reports.

    ``keeps`` is the share of energy that each method would keep of an update without preferred
    direction, ``predicted`` the retention R to expect of it, copying first among equals.
    """

    source: dict[str, Any]
    target: dict[str, Any]
    lineage: str
    verdict: str
    why: str
    evidence: dict[str, Any]
    pairing: str
    dimension: str
    sites: list[SiteComparison] = field(default_factory=list)
    unpaired: dict[str, str] = field(default_factory=dict)
    keeps: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    decompositions: int = 0
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def compare(
    source: str | Path | Base,
    target: str | Path | Base,
    *,
    dimension: int | float | str = 320,
    sites: str = "",
    subspaces: bool = True,
    pairing: Literal["auto", "name", "similarity"] = "auto",
    device: str = "auto",
    library: SubspaceLibrary | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare two bases site by site.

    Parameters
    ----------
    source, target : str, Path or Base
    dimension : int, float or "full"
        Of the singular subspaces compared.
    sites : str
        Regular expression: only sites that match are compared. Default all.
    subspaces : bool
        Also compute Φ_l and Φ_r (LoRA-X Eq. 4), which needs both decompositions.
    pairing, device, library
        As in :func:`regraft.transfer`.

    Returns
    -------
    Comparison

    Raises
    ------
    NotABase
        No site of the source matches ``sites``.
    RegraftError
        Any unreadable input.
    """
    started = time.perf_counter()
    options = MethodOptions(Dimension.parse(dimension))
    a = source if isinstance(source, Base) else open_base(source)
    b = target if isinstance(target, Base) else open_base(target)
    library = library or SubspaceLibrary(device=device)
    before = library.decompositions
    try:
        chosen = [s for s in a.weights if re.search(sites, str(s))]
    except re.error as error:
        raise BadOption(f"{sites!r} is not a regular expression: {error}.") from error
    if not chosen:
        raise NotABase(f"No site of the source matches {sites!r}.", file=a.ref)
    paired = pair_sites(a, b, chosen, how=pairing)
    total = sum(prod(a.weights[s].shape) for s in chosen)
    found: list[SiteComparison] = []
    facts: list[PairFacts] = []
    shelf = library

    def look(pair: Pair) -> tuple[Closeness | None, SiteComparison]:
        return _compare_site(a, b, pair, shelf, options, subspaces)

    for pair, (close, entry) in zip(paired.pairs, in_order(look, paired.pairs), strict=True):
        share = prod(a.weights[pair.source].shape) / total
        facts.append(PairFacts.of(share, close, pair))
        found.append(entry)
        progress("comparing", len(found), len(paired.pairs))
    library.cache.commit()
    verdict = choose(facts)
    keeps = _mean_keeps(found)
    evidence = {k: v for k, v in verdict.to_dict().items() if k not in ("word", "why", "predicted")}
    return Comparison(
        source=_describe(a),
        target=_describe(b),
        lineage=_lineage(facts, verdict.cosine, verdict.coverage, a, b),
        verdict=verdict.word,
        why=verdict.why,
        evidence=evidence,
        pairing=paired.how,
        dimension=str(options.dimension),
        sites=found,
        unpaired={str(s): why for s, why in paired.unpaired.items()},
        keeps=keeps,
        predicted=predict(PairEvidence(verdict.cosine, verdict.coverage, keeps)),
        decompositions=library.decompositions - before,
        seconds=time.perf_counter() - started,
        versions=versions(),
        notes=quantised_notes(a, b),
    )


def _compare_site(
    a: Base,
    b: Base,
    pair: Pair,
    library: SubspaceLibrary,
    options: MethodOptions,
    subspaces: bool,
) -> tuple[Closeness | None, SiteComparison]:
    close = library.closeness(a, pair.source, b, pair.target)
    phis = rho = None
    if subspaces:
        phis = library.phi(a, pair.source, b, pair.target, options.dimension)
    if phis:
        rho = _shares(b, pair.target, options.dimension, library)
    entry = SiteComparison(
        site=str(pair.target),
        source=str(pair.source),
        kind=kind_of(pair.target),
        shape=b.weights[pair.target].shape,
        cosine=None if close is None else close.cosine,
        difference=None if close is None else close.difference,
        phi_left=phis[0] if phis else None,
        phi_right=phis[1] if phis else None,
        chance=rho[0] if rho else None,
        keeps={m.name: m.keeps(*phis, *rho, options) for m in methods()} if phis and rho else {},
    )
    return close, entry


def _shares(
    base: Base, site: Any, dimension: Dimension, library: SubspaceLibrary
) -> tuple[float, float]:
    """(k/m, k/n): the part of each side's directions that lies in the subspace."""
    m, n = matrix_shape(base.weights[site].shape)
    if dimension.full:
        return 1.0, 1.0
    k = dimension.k
    if k is None:
        k = library.subspace(base, site, dimension).k
    k = min(k, m, n)
    return k / m, k / n


def _mean_keeps(sites: list[SiteComparison]) -> dict[str, float]:
    weighted = [(prod(s.shape), s.keeps) for s in sites if s.keeps]
    total = sum(w for w, _ in weighted)
    names = weighted[0][1] if weighted else {}
    return {n: sum(w * keeps[n] for w, keeps in weighted) / total for n in names}


def _describe(base: Base) -> dict[str, Any]:
    known = architecture(base)
    return {
        "ref": base.ref,
        "name": base.name,
        "revision": base.revision,
        "components": list(base.components),
        "sites": len(base.weights),
        "parameters": sum(prod(w.shape) for w in base.weights.values()),
        "architecture": known.label if known else None,
    }


def _lineage(facts: list[PairFacts], cosine: float, coverage: float, a: Base, b: Base) -> str:
    """One of the words of design: how the target is related to the source."""
    fitting = [f for f in facts if f.cosine is not None]
    if not fitting:
        return "no weight of equal shape: a different architecture or width"
    if cosine < RELATED:
        same = coverage > 0.95
        return "unrelated weights" + (", same architecture" if same else "")
    if all(f.identical for f in fitting):
        same = coverage > 0.999 and len(a.weights) == len(b.weights)
        return "same weights" if same else "same weights where they meet"
    if any(f.by_similarity for f in fitting) or len(b.weights) < 0.9 * len(a.weights):
        return "pruned or distilled from the source"
    if len(b.weights) > 1.1 * len(a.weights):
        return "deeper sibling of the source"
    return "fine-tune of the source, or trained on from it"
