"""Crossing: one adapter over one pair of bases, site by site, with every site accounted for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from regraft.adapters import Adapter, LowRank, RankRule, Site, Spectral, Update, cut, same_matrix
from regraft.bases import Base
from regraft.errors import NonFiniteTensor
from regraft.methods import Method, MethodOptions, Refusal, SiteJob, get_method
from regraft.methods.choose import PairFacts
from regraft.pairing import Pair, Pairing, kind_of
from regraft.parallel import in_order
from regraft.result import SiteResult
from regraft.subspaces import Closeness, SubspaceLibrary

#: Called with (stage, done, total).
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """No progress wanted."""


@dataclass
class Carried:
    """What a method made of an adapter: the target's adapter, and an account of every site.

    ``refused`` maps a target site to the reason; the shares are of the adapter's energy ‖ΔW‖².
    """

    adapter: Adapter
    sites: list[SiteResult] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    energy_kept: float = 0.0
    energy_kept_by_copy: float = 0.0


def energies_of(adapter: Adapter) -> dict[Site, float]:
    """‖ΔW‖² of every site.

    Raises
    ------
    NonFiniteTensor
        One is beyond fp32.
    """
    found = in_order(lambda update: update.energy(), adapter.updates.values())
    energies = dict(zip(adapter.updates, found, strict=True))
    for site, energy in energies.items():
        if not math.isfinite(energy):
            raise NonFiniteTensor(
                f"The change at {site} is beyond what fp32 can hold.",
                fix="The file is damaged or its training diverged; use an earlier checkpoint.",
            )
    return energies


@dataclass
class Crossing:
    """An adapter on its way from one base to another.

    ``energies`` holds ‖ΔW‖² of each source site.
    """

    adapter: Adapter
    source: Base
    target: Base
    library: SubspaceLibrary
    paired: Pairing
    energies: dict[Site, float]
    progress: Progress = silent

    def __post_init__(self) -> None:
        total = sum(self.energies.values())
        feeds = Counter(pair.source for pair in self.paired.pairs)
        # A source site that feeds several target sites shares out its weight among them.
        self.share = {
            p.target: self.energies[p.source] / total / feeds[p.source] for p in self.paired.pairs
        }
        self.close: dict[Site, Closeness | None] = {}

    def facts(self) -> list[PairFacts]:
        """The evidence, pair by pair, before any method runs."""
        found = []
        pairs = self.paired.pairs
        for pair, close in zip(pairs, in_order(self._closeness, pairs), strict=True):
            self.close[pair.target] = close
            found.append(PairFacts.of(self.share[pair.target], close, pair))
            self.progress("comparing weights", len(found), len(pairs))
        return found

    def _closeness(self, pair: Pair) -> Closeness | None:
        return self.library.closeness(self.source, pair.source, self.target, pair.target)

    def carry(
        self,
        used: Method,
        options: MethodOptions,
        rank: int | str | None = None,
        share: float | None = None,
    ) -> Carried:
        """Run a method at every pair, in memory.

        ``rank`` and ``share`` make the output rank rule, see :func:`rank_rule`.
        """
        updates: dict[Site, Update] = {}
        result = Carried(replace(self.adapter, updates=updates))
        pairs = self.paired.pairs

        def work(pair: Pair) -> tuple[Update, SiteResult] | Refusal:
            outcome = self._one(used, options, pair)
            if isinstance(outcome, Refusal):
                return outcome
            update = cut(outcome, rank_rule(self.adapter.updates[pair.source], rank, share))
            return update, self._entry(pair, update, options)

        for done, (pair, outcome) in enumerate(zip(pairs, in_order(work, pairs), strict=True), 1):
            weight = self.share[pair.target]
            result.energy_kept_by_copy += weight * self._by_copy(pair)
            self.progress(used.name, done, len(pairs))
            if isinstance(outcome, Refusal):
                result.refused[str(pair.target)] = outcome.reason
                continue
            updates[pair.target], entry = outcome
            result.sites.append(entry)
            result.energy_kept += weight * entry.kept
        result.energy_kept = _share(result.energy_kept)
        result.energy_kept_by_copy = _share(result.energy_kept_by_copy)
        return result

    def _by_copy(self, pair: Pair) -> float:
        source, target = self.source.at(pair.source), self.target.at(pair.target)
        return 1.0 if same_matrix(source.shape, target.shape) else 0.0

    def _one(self, used: Method, options: MethodOptions, pair: Pair) -> Update | Refusal:
        pattern = options.filtered(pair.target)
        if pattern is not None:
            return Refusal(f"left out by the filter {pattern!r}")
        update = self.adapter.updates[pair.source]
        if pair.target not in self.target.weights:
            # A bias or a normalisation has no singular subspaces: it is copied or refused.
            used = get_method("copy")
        job = SiteJob(
            update, self.source, pair.source, self.target, pair.target, self.library, options
        )
        return used.carry(job)

    def _kept(self, pair: Pair, update: Update) -> float:
        before = self.energies[pair.source]
        if update is self.adapter.updates[pair.source] or not before:
            return 1.0
        return update.energy() / before

    def _entry(self, pair: Pair, update: Update, options: MethodOptions) -> SiteResult:
        close = self.close[pair.target]
        phi = self.library.known_phi(
            self.source, pair.source, self.target, pair.target, options.dimension
        )
        return SiteResult(
            site=str(pair.target),
            source=str(pair.source),
            kind=kind_of(pair.target),
            shape=tuple(self.target.at(pair.target).shape),
            rank_in=self.adapter.updates[pair.source].rank,
            rank_out=update.rank,
            share=self.share[pair.target],
            kept=self._kept(pair, update),
            kept_by_copy=self._by_copy(pair),
            cosine=None if close is None else close.cosine,
            difference=None if close is None else close.difference,
            phi_left=phi[0] if phi else None,
            phi_right=phi[1] if phi else None,
        )


def _share(value: float) -> float:
    """A sum of shares without the dust of adding them up."""
    return 1.0 if abs(value - 1.0) < 1e-9 else value


def rank_rule(before: Update, rank: int | str | None, share: float | None) -> RankRule | None:
    """The rule for one site's output rank.

    Parameters
    ----------
    before : Update
        The input; its rank is the limit when neither rule is given and it is a plain LoRA. What is
        not held in two factors keeps every direction if "full", else what "auto" keeps.
    rank : int, "full" or None
    share : float or None
        Share of the site's energy to keep.
    """
    if share is not None:
        return RankRule("energy", share)
    held = isinstance(before, LowRank | Spectral)
    if rank == "full":
        return None if held else RankRule("exact")
    if rank is not None:
        return RankRule("rank", int(rank))
    if not held:
        return RankRule()
    return RankRule("rank", before.rank) if isinstance(before, LowRank) else None
