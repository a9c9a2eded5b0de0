"""The insert line: read, open, pair, choose, copy or map, write, report."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from regraft import provenance
from regraft.adapters import Site
from regraft.bases import Base, open_base
from regraft.bases.quantised.cost import TRAINED_ON
from regraft.bases.quantised.cost import notes as quantised_notes
from regraft.crossing import Progress, silent
from regraft.errors import BadData, BadOption, CannotRun, NothingCarried, NotRecommended
from regraft.files import Located
from regraft.inserts.carry import Carried, carry
from regraft.inserts.choose import MapEvidence, from_map, from_weights
from regraft.inserts.copied import copied
from regraft.inserts.insert import InsertAdapter
from regraft.inserts.pair import InsertPairing, pair_inserts
from regraft.inserts.places import space_of
from regraft.inserts.read import load_insert
from regraft.inserts.tables import energy, shape_of, size_of
from regraft.inserts.write import write_insert
from regraft.methods.choose import PairFacts, Verdict
from regraft.methods.inserts import ACTIVATION_MAP, COPY
from regraft.pairing import kind_of
from regraft.result import SiteResult, TransferResult
from regraft.running import open_model
from regraft.running.data import digest, read_data
from regraft.subspaces import Closeness, SubspaceLibrary
from regraft.tuners.bottleneck.parts import Bottleneck
from regraft.versions import versions

_DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def transfer_insert(
    located: Located,
    *,
    source: str | Path | Base,
    target: str | Path | Base,
    library: SubspaceLibrary,
    output: str | Path | None = None,
    method: str = "auto",
    calibration: str | Path | None = None,
    report: str | Path | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    name: str | None = None,
    allow_unknown: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> TransferResult:
    """Carry prompt vectors, a prefix or bottlenecks to another base.

    Parameters are those of :func:`regraft.transfer`; ``method`` is "auto", "copy" or
    "activation-map".

    Raises
    ------
    NotRecommended
        ``method="auto"`` and the verdict is "don't".
    NothingCarried
        The result would change nothing on the target.
    CannotRun
        "activation-map" was asked for, and a base does not run.
    BadOption
        Calibration data for "copy".
    RegraftError
    """
    started = time.perf_counter()
    if method == COPY.name and calibration is not None:
        raise BadOption(
            "Calibration data are for activation-map, and copying fits nothing.",
            fix="Leave out --calibration.",
        )
    source_base = source if isinstance(source, Base) else open_base(source)
    target_base = target if isinstance(target, Base) else open_base(target)
    loaded = load_insert(located.path, source_base, allow_unknown=allow_unknown)
    loaded.name = name or provenance.adapter_name(located, loaded.name)
    refuse_nothing(loaded, located.ref)
    way = InsertCrossing(
        loaded, source_base, target_base, library, calibration, seed, progress=progress
    )
    verdict = from_weights(way.facts())
    carried: Carried | None = None
    found: MapEvidence | None = None
    if method == ACTIVATION_MAP.name or (method == "auto" and verdict is None):
        try:
            carried = way.mapped()
            found = way.evidence(carried)
            verdict = verdict or from_map(way.facts(), found)
        except (CannotRun, BadData, BadOption) as error:
            if method != "auto" or calibration is not None:
                raise
            why = f"no map between them can be fitted: {error.what}".rstrip(".")
            verdict = from_map(way.facts(), None, why)
    if verdict is None:
        why = "whether a map between them holds was not looked at (--method activation-map)"
        verdict = from_map(way.facts(), None, why)
    result = way.result(located, verdict, with_map=carried is not None)
    if found is not None:
        result.evidence |= {"fit": found.fit, "followed": found.followed}
    result.parameters = {
        "method": method,
        "calibration": way.calibration_sha256,
        "seed": seed,
        "allow_unknown": allow_unknown,
        "device": library.device.type,
    }
    chosen = verdict.method if method == "auto" else method
    if chosen != ACTIVATION_MAP.name:
        result.sites_refused |= way.unpaired()
    if chosen is None:
        library.cache.commit()
        result.seconds = time.perf_counter() - started
        _report(result, report, overwrite, dry_run)
        refusal = NotRecommended(
            f"Verdict: don't. {verdict.why}",
            fix="Nothing was written. To do it all the same, name a method (--method copy).",
        )
        refusal.result = result
        raise refusal
    result.method = chosen
    if chosen == COPY.name:
        carried = way.copied()
        if calibration is not None:
            result.notes.append("the calibration data were not used: copying fits nothing")
    assert carried is not None
    if chosen == ACTIVATION_MAP.name:
        alike = all(site == origin for site, origin in carried.sources.items())
        by_name = alike or loaded.family == "prompt"
        result.pairing = "name" if by_name else "similarity of activations"
    way.account(result, carried)
    library.cache.commit()
    if not result.sites:
        reasons = sorted(set(result.sites_refused.values()))[:3]
        raise NothingCarried(
            "Nothing could be carried, so nothing was written: " + "; ".join(reasons) + ".",
            fix="`regraft compare` shows how the two bases relate.",
        )
    stored = dtype or (loaded.dtype if loaded.dtype in _DTYPE_NAMES else torch.float32)
    result.dtype, result.dialect = _DTYPE_NAMES[stored], "peft"
    if output is not None and not dry_run:
        written = write_insert(
            replace(loaded, parts=carried.parts),
            target_base,
            Path(output),
            dtype=stored,
            provenance=provenance.of_transfer(result),
            overwrite=overwrite,
        )
        result.output, result.sha256 = str(output), written.sha256
    result.dry_run = dry_run
    result.seconds = time.perf_counter() - started
    _report(result, report, overwrite, dry_run)
    return result


@dataclass
class InsertCrossing:
    """An insert on its way from one base to another.

    ``calibration`` is a path to data for the map; None for samples of the source base.
    """

    adapter: InsertAdapter
    source: Base
    target: Base
    library: SubspaceLibrary
    calibration: str | Path | None = None
    seed: int = 0
    device: str | None = None
    progress: Progress = silent
    calibration_sha256: str | None = None
    _close: dict[tuple[Site, Site], Closeness | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.paired: InsertPairing = pair_inserts(self.adapter, self.source, self.target)
        self._energies = {site: energy(part) for site, part in self.adapter.parts.items()}

    def facts(self) -> list[PairFacts]:
        """The evidence, pair by pair: the weights that make each part's space."""
        pairs = self.paired.pairs
        shares = self._shares({pair.target: pair.source for pair in pairs})
        found = []
        for pair in pairs:
            close = self._closeness(pair.target, pair.source)
            found.append(
                PairFacts(
                    share=shares[pair.target],
                    cosine=None if close is None else close.cosine,
                    difference=None if close is None else close.difference,
                    identical=close is not None and close.difference == 0.0,
                    by_similarity=pair.how == "similarity" and pair.source != pair.target,
                )
            )
            self.progress("comparing weights", len(found), len(pairs))
        return found

    def unpaired(self) -> dict[str, str]:
        """Source sites whose weights have no partner, and why; a map finds partners of its own."""
        return {str(site): why for site, why in self.paired.unpaired.items()}

    def copied(self) -> Carried:
        """The insert as it is."""
        return copied(self.adapter, self.paired.pairs, self.target)

    def mapped(self) -> Carried:
        """The insert through a map between the two bases' activations.

        Raises
        ------
        CannotRun, BadData, MissingDependency, InputNotFound
        """
        device = self.device or self.library.device.type
        source = open_model(self.source, device=device)
        target = open_model(self.target, device=device)
        items = None
        if self.calibration is not None:
            items = read_data(self.calibration, source)
            self.calibration_sha256 = digest(items)
        found = carry(
            self.adapter,
            source,
            target,
            calibration=items,
            seed=self.seed,
            progress=self.progress,
        )
        if found.form != "as it is":
            return found
        same = {site: site for site in found.parts}
        return replace(found, sources=same, kept=dict.fromkeys(same, 1.0))

    def evidence(self, carried: Carried) -> MapEvidence:
        """How good the maps were: their fit is a mean by share."""
        fits = {site: fit for site, fit in carried.fit.items() if site in carried.sources}
        shares = self._shares(carried.sources)
        total = sum(shares[site] for site in fits)
        fit = sum(shares[site] * fit for site, fit in fits.items()) / total if total else None
        return MapEvidence(fit, carried.followed.get(carried.form))

    def energy_kept(self, carried: Carried) -> float:
        """The share of ‖x‖² that came through, over all of the adapter."""
        shares = self._shares(carried.sources)
        return _share(sum((shares[site] * carried.kept[site] for site in carried.parts), 0.0))

    def account(self, result: TransferResult, carried: Carried) -> None:
        """Write what was carried, and what was not, into the result."""
        shares = self._shares(carried.sources)
        by_copy = self.copied()
        for site, part in carried.parts.items():
            origin = carried.sources[site]
            close = self._closeness(site, origin)
            result.sites.append(
                SiteResult(
                    site=str(site),
                    source=str(origin),
                    kind=kind_of(site),
                    shape=shape_of(part),
                    rank_in=size_of(self.adapter.parts[origin]),
                    rank_out=size_of(part),
                    share=shares[site],
                    kept=carried.kept[site],
                    kept_by_copy=1.0 if site in by_copy.parts else 0.0,
                    cosine=None if close is None else close.cosine,
                    difference=None if close is None else close.difference,
                )
            )
        result.sites_refused |= carried.refused
        result.notes += carried.notes
        result.energy_kept = self.energy_kept(carried)
        result.energy_kept_by_copy = self.energy_kept(by_copy)

    def result(self, located: Located, verdict: Verdict, *, with_map: bool) -> TransferResult:
        """All that is known before anything is carried."""
        evidence = verdict.to_dict()
        for name in ("why", "word", "predicted"):
            evidence.pop(name)
        loaded = self.adapter
        return TransferResult(
            verdict=verdict.word,
            why=verdict.why,
            method="none",
            parameters={},
            adapter=_adapter_facts(located, loaded),
            source=self._base_facts(self.source, list(loaded.parts), with_map),
            target=self._base_facts(
                self.target, [pair.target for pair in self.paired.pairs], with_map
            ),
            evidence=evidence,
            pairing=self.paired.how,
            sites_refused=dict(loaded.refused),
            notes=[
                *loaded.notes,
                *quantised_notes(self.source, self.target, loaded.metadata.get(TRAINED_ON)),
            ],
            versions=versions(),
        )

    def _base_facts(self, base: Base, places: list[Site], with_map: bool) -> dict[str, Any]:
        """A map depends on all of a base: everything that it computes goes through it."""
        used = {weight for site in places for weight in space_of(site, base)}
        if with_map:
            used = {*base.weights, *base.others}
        return provenance.base_facts(base, used, self.library)

    def _shares(self, sources: dict[Site, Site]) -> dict[Site, float]:
        """Target place → its share of ‖x‖²; places that one source feeds share its own."""
        total = sum(self._energies.values())
        feeds = Counter(sources.values())
        return {t: self._energies[s] / total / feeds[s] for t, s in sources.items()}

    def _closeness(self, there: Site, here: Site) -> Closeness | None:
        """Of the weights that make the space, their mean; None if a shape differs."""
        if (there, here) not in self._close:
            weights = zip(space_of(here, self.source), space_of(there, self.target), strict=False)
            found = [self.library.closeness(self.source, s, self.target, t) for s, t in weights]
            known = [close for close in found if close is not None]
            self._close[there, here] = (
                Closeness(
                    sum(close.cosine for close in known) / len(known),
                    sum(close.difference for close in known) / len(known),
                )
                if known and len(known) == len(found)
                else None
            )
        return self._close[there, here]


def refuse_nothing(loaded: InsertAdapter, ref: str) -> None:
    """Raise :class:`NothingCarried` for bottlenecks that add nothing yet, and for zeros."""
    parts = [part for part in loaded.parts.values() if isinstance(part, Bottleneck)]
    if parts and not any(p.scale and (p.up.any() or p.up_bias.any()) for p in parts):
        raise NothingCarried(
            "The adapter changes nothing: every bottleneck it holds adds zero.", file=ref
        )
    if not any(energy(part) for part in loaded.parts.values()):
        raise NothingCarried("Every number of the adapter is zero.", file=ref)


def _adapter_facts(located: Located, loaded: InsertAdapter) -> dict[str, Any]:
    """As :func:`regraft.provenance.adapter_facts`; ``size`` is virtual tokens, or width."""
    return {
        "ref": located.ref,
        "name": loaded.name,
        "repo": located.repo,
        "revision": located.revision,
        "changes": "activations",
        "family": loaded.family,
        "dialect": "peft",
        "size": max(map(size_of, loaded.parts.values())),
        "sites": len(loaded.parts),
        "sha256": loaded.sha256,
        "config_sha256": provenance.config_sha256(loaded.config),
        "trigger_words": loaded.metadata.get("modelspec.trigger_phrase", ""),
    }


def _share(value: float) -> float:
    """A sum of shares without the dust of adding them up."""
    return 1.0 if abs(value - 1.0) < 1e-9 else value


def _report(
    result: TransferResult, path: str | Path | None, overwrite: bool, dry_run: bool
) -> None:
    if path is None or dry_run:
        return
    from regraft.report import write_report

    result.report = str(path)
    write_report(result, Path(path), overwrite=overwrite)
