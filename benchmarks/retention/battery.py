"""Running the battery: one unit is one adapter over one upgrade, with every method."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.retention.family import Family
from benchmarks.retention.references import References, Scores
from benchmarks.retention.rows import Row
from benchmarks.retention.variants import RANDOM, RETRAINED, STRENGTHS, VARIANTS, Variant
from regraft.adapters import Adapter
from regraft.bases import Base, open_base
from regraft.dialects import load_adapter
from regraft.errors import RegraftError
from regraft.parallel import single_threaded
from regraft.retention.figure import retention
from regraft.running import Model, applied, random_like
from regraft.subspaces import SubspaceLibrary
from regraft.subspaces.intruder import adapter_intruders
from regraft.transfer import transfer

#: part of every unit's key: raise it when a metric or the battery itself changes
VERSION = 1


def means_of(found: Iterable[Scores], metrics: Iterable[str]) -> Scores:
    """The mean of each metric over the seeds that have it."""
    scores = list(found)
    there = [metric for metric in metrics if any(metric in s for s in scores)]
    return {m: fmean(s[m] for s in scores if m in s) for m in there}


@dataclass(frozen=True)
class Unit:
    """One adapter over one upgrade."""

    upgrade: str
    task: str
    rank: int
    seed: int
    family: str = "lora"
    recipe: str = ""

    @property
    def name(self) -> str:
        which = self.family if self.recipe else f"r{self.rank}"
        return f"{self.upgrade}-{self.task}-{which}-s{self.seed}"

    @property
    def full(self) -> bool:
        """Whether strength curves and costly metrics are measured too."""
        return self.rank == 8 and self.seed == 0


class Battery:
    """Runs units of one family; each finished unit is kept, and reused while its inputs stand.

    Parameters
    ----------
    work : Path
        Finished units.
    references : References
        Scores of retrained adapters from earlier runs; renewed where the files are there.
    """

    def __init__(
        self, family: Family, work: Path, library: SubspaceLibrary, references: References
    ) -> None:
        self.family = family
        self.known = references
        self.work = work / family.kind
        self.work.mkdir(parents=True, exist_ok=True)
        self.library = library
        self._bases: dict[str, Base] = {}
        self._scores: dict[tuple[str, str, str], Scores] = {}
        self._hits: dict[tuple[str, str], Sequence[bool]] = {}
        self._hashes: dict[Path, str] = {}

    def units(self) -> Iterator[Unit]:
        """Every adapter on v1 over every target that is there and has a reference."""
        family = self.family
        for upgrade in family.present():
            for task in family.tasks[:1] if family.quick else family.tasks:
                for rank in (8,) if family.quick else (8, 32):
                    seeds = family.seeds("v1", task, rank)
                    for seed in seeds[: 1 if family.quick else None]:
                        unit = Unit(upgrade, task, rank, seed)
                        if self.reference_seeds(unit):
                            yield unit

    def reference_seeds(self, unit: Unit) -> list[int]:
        """Seeds of retrained adapters: those with a file, and those with kept scores."""
        names = (unit.upgrade, unit.task, unit.rank)
        kept = self.known.seeds(self._reference_name(unit))
        there = [s for s in kept if self.known.get(*self._reference(unit, s)) is not None]
        return sorted({*self.family.seeds(*names), *there, *self.family.recorded(*names)})

    def _reference_name(self, unit: Unit) -> str:
        size = "quick" if self.family.quick else "full"
        name = f"{self.family.kind}/{unit.upgrade}/{unit.task}-r{unit.rank}"
        return f"{name}/{size}-{'all' if unit.full else 'main'}-s"

    def _reference(self, unit: Unit, seed: int) -> tuple[str, str]:
        """The name of a reference's scores, and the hash of what they depend on."""
        parts = [str(VERSION), *map(self._hash, self.family.data)]
        parts.append(self._hash(self.family.base(unit.upgrade)))
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        return f"{self._reference_name(unit)}{seed}", key

    @single_threaded()
    def run(self, unit: Unit) -> list[Row]:
        """The rows of one unit, from the work folder if its inputs have not changed."""
        key = self._key(unit)
        kept = self.work / f"{unit.name}.json"
        if kept.exists():
            found = json.loads(kept.read_text())
            if found["key"] == key:
                return [Row(**row) for row in found["rows"]]
        rows = list(self._measure(unit))
        draft = kept.with_suffix(".tmp")
        draft.write_text(json.dumps({"key": key, "rows": [asdict(r) for r in rows]}))
        draft.replace(kept)
        return rows

    def _key(self, unit: Unit) -> str:
        family = self.family
        names = ("v1", unit.upgrade)
        paths = [*family.data, family.adapter("v1", unit.task, unit.rank, unit.seed)]
        paths += [family.base(name) for name in names]
        parts = [str(VERSION), str(family.quick), repr(VARIANTS), repr(STRENGTHS)]
        parts += [self._hash(path) for path in paths]
        for seed in self.reference_seeds(unit):
            path = family.adapter(unit.upgrade, unit.task, unit.rank, seed)
            parts.append(self._hash(path) if path.exists() else str(self._reference(unit, seed)))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
            joined = "".join(hashlib.sha256(f.read_bytes()).hexdigest() for f in files)
            self._hashes[path] = joined
        return self._hashes[path]

    def open(self, name: str) -> Base:
        """The base's sites and weights; opened once."""
        if name not in self._bases:
            self._bases[name] = open_base(self.family.base(name))
        return self._bases[name]

    def load(self, base: str, unit: Unit, seed: int) -> Adapter:
        """An adapter of the unit's task and rank, trained on ``base``."""
        path = self.family.adapter(base, unit.task, unit.rank, seed)
        return load_adapter(path, self.open(base))

    def score(self, model: Model, unit: Unit) -> Scores:
        """All metrics that this unit asks for."""
        found = self.family.scores(model, unit.task)
        if unit.full:
            found |= self.family.costly_scores(model, unit.task)
        return found

    def once(self, base: str, what: str, unit: Unit, score: Callable[[], Scores]) -> Scores:
        """A score that several units share."""
        key = (base, what, f"{unit.task} {unit.rank} {unit.full}")
        if key not in self._scores:
            self._scores[key] = score()
        return self._scores[key]

    def flips(self, model: Model, unit: Unit) -> Scores:
        """What got worse item by item, against the bare target."""
        if not unit.full:
            return {}
        key = (unit.upgrade, unit.task)
        if key not in self._hits:
            raise RuntimeError("the bare target was not scored first")
        if not self._hits[key]:
            return {}
        return self.family.against_bare(self._hits[key], self.family.hits(model, unit.task))

    def adapted(self, model: Model, unit: Unit) -> Scores:
        """All metrics of the target with an adapter applied."""
        return self.score(model, unit) | self.flips(model, unit)

    def references(self, unit: Unit) -> dict[int, Scores]:
        """Scores of the adapters retrained on the target, by seed."""
        names = (unit.upgrade, unit.task, unit.rank)
        found = self.family.recorded(*names)
        for seed in self.reference_seeds(unit):
            name, key = self._reference(unit, seed)
            kept = self.known.get(name, key)
            if seed in self.family.seeds(*names):
                model = self.family.model(unit.upgrade)

                def judged(seed: int = seed, model: Model = model) -> Scores:
                    with applied(model, self.load(unit.upgrade, unit, seed)):
                        return self.adapted(model, unit)

                found[seed] = self.once(unit.upgrade, f"retrained {seed}", unit, judged)
                self.known.keep(name, key, found[seed])
            elif kept is not None:
                found[seed] = kept
        return found

    def _measure(self, unit: Unit) -> Iterator[Row]:
        source = self.once("v1", "bare", unit, lambda: self.score(self.family.model("v1"), unit))
        model = self.family.model(unit.upgrade)
        target = self.once(unit.upgrade, "bare", unit, lambda: self.score(model, unit))
        if unit.full and (unit.upgrade, unit.task) not in self._hits:
            self._hits[unit.upgrade, unit.task] = self.family.hits(model, unit.task)
        # an untouched target breaks nothing of itself
        bare = target | self.flips(model, unit)
        references = self.references(unit)
        means = means_of(references.values(), bare)
        rows = self.writer(unit, source, bare, means)
        for seed, scores in references.items():
            yield from rows(RETRAINED, scores, seed=seed)
        control: Adapter | None = None
        for variant in VARIANTS:
            if not variant.applies(unit.upgrade):
                continue
            began = time.perf_counter()
            carried = self._carry(variant, unit)
            seconds = time.perf_counter() - began
            if isinstance(carried, str):
                # "don't" leaves the target as it is, which is what retention 0 means
                left = bare if variant.method == "auto" else None
                yield from rows(variant.name, left, seconds=seconds, refused=carried)
                continue
            adapter, result = carried
            control = control or adapter
            facts: dict[str, Any] = {
                "seconds": seconds,
                "energy_kept": result.energy_kept,
                "sites_refused": len(result.sites_refused),
            }
            with applied(model, adapter):
                if variant.method == "auto":  # the method it chose is among the others
                    scores = self.family.scores(model, unit.task)
                else:
                    scores = self.adapted(model, unit)
            if variant.method != "auto":
                facts["intruders"] = self._intruders(unit, adapter)
            yield from rows(variant.name, scores, **facts)
            if unit.full and variant.curve and not self.family.quick:
                for strength in STRENGTHS:
                    with applied(model, adapter, strength):
                        cheap = self.family.scores(model, unit.task)
                    yield from rows(variant.name, cheap, strength=strength, seconds=seconds)
        if control is not None:  # where nothing was carried there is no size to take
            with applied(model, random_like(control, seed=unit.seed)):
                yield from rows(RANDOM, self.adapted(model, unit))

    def writer(
        self, unit: Unit, source: Scores, bare: Scores, means: Scores
    ) -> Callable[..., Iterator[Row]]:
        """What makes the rows of one unit: one per metric of the scores it is given."""

        def rows(
            name: str,
            scores: Scores | None,
            seed: int = unit.seed,
            strength: float = 1.0,
            **facts: Any,
        ) -> Iterator[Row]:
            for metric in bare if scores is None else scores:
                value = None if scores is None else scores[metric]
                found = self._r(metric, bare[metric], value, means.get(metric))
                yield Row(
                    kind=self.family.kind,
                    upgrade=unit.upgrade,
                    family=unit.family,
                    adapter=unit.task,
                    rank=unit.rank,
                    seed=seed,
                    method=name,
                    metric=metric,
                    strength=strength,
                    base=source.get(metric),
                    target=bare[metric],
                    transferred=value,
                    retrained=means.get(metric),
                    retention=found,
                    recipe=unit.recipe,
                    **{"seconds": 0.0, **facts},
                )

        return rows

    def _r(
        self, metric: str, target: float, transferred: float | None, retrained: float | None
    ) -> float | None:
        if transferred is None or retrained is None or metric in self.family.without_reference:
            return None
        margin = self.family.margins.get(metric, 0.0)
        found = retention(
            target=target,
            transferred=transferred,
            retrained=retrained,
            margin=margin,
            better="higher" if metric in self.family.higher_is_better else "lower",
        )
        return found.value

    def _carry(self, variant: Variant, unit: Unit) -> tuple[Adapter, Any] | str:
        """The adapter that a user would get in a file, or why there is none."""
        path = self.family.adapter("v1", unit.task, unit.rank, unit.seed)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / path.name
            try:
                result = transfer(
                    path,
                    source=self.open("v1"),
                    target=self.open(unit.upgrade),
                    output=output,
                    method=variant.method,
                    library=self.library,
                    **variant.options,
                )
            except RegraftError as refusal:
                return refusal.what
            return load_adapter(output, self.open(unit.upgrade)), result

    def _intruders(self, unit: Unit, adapter: Adapter) -> float:
        found = adapter_intruders(adapter, self.open(unit.upgrade))
        return fmean(site.count() for site in found.values())
