"""The battery over every family: one task, one recipe, each family's own reference."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.retention.battery import VERSION, Battery, Unit, means_of
from benchmarks.retention.family import Family
from benchmarks.retention.references import References, Scores
from benchmarks.retention.rows import SHARED, Row
from benchmarks.retention.variants import (
    COMPARED,
    DELTAS,
    INSERTS,
    RANDOM,
    RETRAINED,
    Variant,
)
from lab import families_plan
from lab.families_plan import RECIPES, SEEDS, Workshop
from regraft.adapters import Adapter
from regraft.dialects import load_adapter
from regraft.errors import BadOption, RegraftError
from regraft.files import TensorFile
from regraft.files.select import weight_files
from regraft.inserts.attached import attached, random_insert
from regraft.inserts.insert import InsertAdapter
from regraft.running import Model, applied, random_like
from regraft.subspaces import SubspaceLibrary
from regraft.transfer import transfer

#: raise it when the way families are carried changes
FORM = 1
#: drawing pictures is dear: style is judged for these methods, loss for all; and for LoRA-X's own
#: method where its paper's comparison asks for it
DRAWN = ("auto", "copy", "activation-map")
PROJECTED = ("lora-x", "lora-x, 32 directions")
RELATED = ("fine-tune", "continued", "pruned")
#: what a quick run tries
QUICK = ("lora-x", "dora", "bottleneck", "prompt")


class Families(Battery):
    """Every family on one kind of base.

    Parameters
    ----------
    workshop : Workshop
        Where trained adapters lie. Those on v1 are trained when they are missing; those on targets
        are measured where they are, else their kept scores are used.
    only : sequence of str, optional
        These families; default all.
    """

    def __init__(
        self,
        family: Family,
        work: Path,
        library: SubspaceLibrary,
        references: References,
        workshop: Workshop,
        only: Sequence[str] | None = None,
    ) -> None:
        super().__init__(family, work, library, references)
        self.workshop = workshop
        self.task = families_plan.TASKS[family.kind]
        self.names = [n for n in families_plan.names(family.kind) if only is None or n in only]
        if family.quick and only is None:
            self.names = [name for name in self.names if name in QUICK]

    def units(self) -> Iterator[Unit]:
        seeds = SEEDS[self.family.kind][0][: 1 if self.family.quick else None]
        for upgrade in self.family.present():
            for name in self.names:
                for seed in seeds:
                    rank = RECIPES[name].rank or 0
                    unit = Unit(upgrade, self.task, rank, seed, name, SHARED)
                    if self.reference_seeds(unit):
                        yield unit

    def reference_seeds(self, unit: Unit) -> list[int]:
        kept = self.known.seeds(self._reference_name(unit))
        found = [s for s in kept if self.known.get(*self._reference(unit, s)) is not None]
        return sorted({*found, *self._trained(unit)})

    def _trained(self, unit: Unit) -> list[int]:
        """Seeds of references whose files are there."""
        again = SEEDS[self.family.kind][1]
        return [s for s in again if self.workshop.there(unit.upgrade, unit.family, s)]

    def _reference_name(self, unit: Unit) -> str:
        size = "quick" if self.family.quick else "full"
        return f"{self.family.kind}/{unit.upgrade}/{unit.task}-{unit.family}/{size}-s"

    def _reference(self, unit: Unit, seed: int) -> tuple[str, str]:
        recipe = families_plan.settings(self.family.kind, unit.family, Path(), Path(), seed)
        parts = [str(VERSION), json.dumps(recipe), self._hash(self.data)]
        parts.append(self._hash(self.family.base(unit.upgrade)))
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        return f"{self._reference_name(unit)}{seed}", key

    @property
    def data(self) -> Path:
        """The task's held-out items."""
        return dict(zip(self.family.tasks, self.family.data, strict=True))[self.task]

    def path(self, unit: Unit) -> Path:
        """The adapter on v1; trained if it is not there."""
        if not self.workshop.there("v1", unit.family, unit.seed):
            self.workshop.make("v1", unit.family, unit.seed)
        return self.workshop.folder("v1", unit.family, unit.seed)

    def _key(self, unit: Unit) -> str:
        parts = [str((VERSION, FORM)), str(self.family.quick), repr(_variants(unit))]
        paths = [self.data, self.path(unit), *map(self.family.base, ("v1", unit.upgrade))]
        parts += [self._hash(path) for path in paths]
        for seed in self.reference_seeds(unit):
            path = self.workshop.folder(unit.upgrade, unit.family, seed)
            there = seed in self._trained(unit)
            parts.append(self._hash(path) if there else str(self._reference(unit, seed)))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def read(self, path: Path, base: str, family: str) -> Adapter | InsertAdapter:
        """An adapter from its file."""
        if family in families_plan.INSERTS:
            from regraft.inserts.read import load_insert

            return load_insert(path, self.open(base))
        return load_adapter(path, self.open(base))

    def score(self, model: Model, unit: Unit, method: str = "copy") -> Scores:
        found = self.family.scores(model, unit.task)
        asked = unit.family in COMPARED and unit.upgrade in RELATED
        drawn = method in DRAWN or (asked and method in PROJECTED)
        if drawn or self.family.kind != "diffusion":
            found |= self.family.costly_scores(model, unit.task)
        return {m: v for m, v in found.items() if m not in self.family.without_reference}

    def references(self, unit: Unit) -> dict[int, Scores]:
        found: dict[int, Scores] = {}
        for seed in self.reference_seeds(unit):
            name, key = self._reference(unit, seed)
            kept = self.known.get(name, key)
            if seed in self._trained(unit):
                path = self.workshop.folder(unit.upgrade, unit.family, seed)

                def judged(path: Path = path) -> Scores:
                    model = self.family.model(unit.upgrade)
                    with on(model, self.read(path, unit.upgrade, unit.family)):
                        return self.score(model, unit)

                what = f"{unit.family} retrained {seed}"
                found[seed] = self.once(unit.upgrade, what, unit, judged)
                self.known.keep(name, key, found[seed])
            elif kept is not None:
                found[seed] = kept
        return found

    def _measure(self, unit: Unit) -> Iterator[Row]:
        # the bare bases are the same for all families
        plain = replace(unit, rank=0, family="")
        source = self.once("v1", "bare", plain, lambda: self.score(self.family.model("v1"), unit))
        model = self.family.model(unit.upgrade)
        bare = self.once(unit.upgrade, "bare", plain, lambda: self.score(model, unit))
        references = self.references(unit)
        rows = self.writer(unit, source, bare, means_of(references.values(), bare))
        for seed, scores in references.items():
            yield from rows(RETRAINED, scores, seed=seed)
        control: Adapter | InsertAdapter | None = None
        measured: dict[str, Scores] = {}
        for variant in _variants(unit):
            if not variant.applies(unit.upgrade):
                continue
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                output = Path(folder) / _output_name(unit)
                result = self._carried(variant, unit, output)
                seconds = time.perf_counter() - began
                if isinstance(result, str):
                    # "don't" leaves the target as it is, which is what retention 0 means
                    left = bare if variant.method == "auto" else None
                    yield from rows(variant.name, left, seconds=seconds, refused=result)
                    continue
                adapter = self.read(output, unit.upgrade, unit.family)
                same, size = _content(output)
            control = control or adapter
            if same not in measured:  # auto gives what another method gave
                with on(model, adapter):
                    measured[same] = self.score(model, unit, variant.name)
            yield from rows(
                variant.name,
                measured[same],
                seconds=seconds,
                energy_kept=result.energy_kept,
                sites_refused=len(result.sites_refused),
                bytes=size,
                chosen=result.method if variant.method == "auto" else "",
            )
        if control is not None:  # where nothing was carried there is no size to take
            with on(model, _random(control, unit.seed)):
                yield from rows(RANDOM, self.score(model, unit, RANDOM))

    def _carried(self, variant: Variant, unit: Unit, output: Path) -> Any | str:
        """The result of a transfer into ``output``, or why there is none."""
        try:
            return transfer(
                self.path(unit),
                source=self.open("v1"),
                target=self.open(unit.upgrade),
                output=output,
                method=variant.method,
                library=self.library,
                **variant.options,
            )
        except BadOption:
            raise  # a mistake of the battery's, and no verdict
        except RegraftError as refusal:
            return refusal.what


def _output_name(unit: Unit) -> str:
    """A folder as PEFT's, but LoRA-X is carried as one file."""
    return "carried.safetensors" if RECIPES[unit.family].family == "lora-x" else "carried"


def _variants(unit: Unit) -> tuple[Variant, ...]:
    return INSERTS if unit.family in families_plan.INSERTS else DELTAS


def on(model: Model, adapter: Adapter | InsertAdapter) -> AbstractContextManager[Model]:
    """The model with an adapter on it."""
    if isinstance(adapter, InsertAdapter):
        return attached(model, adapter)
    return applied(model, adapter)


def _random(adapter: Adapter | InsertAdapter, seed: int) -> Adapter | InsertAdapter:
    if isinstance(adapter, InsertAdapter):
        return random_insert(adapter, seed)
    return random_like(adapter, seed)


def _content(output: Path) -> tuple[str, int]:
    """A hash of an adapter's tensors and config, and the size of its weights in bytes."""
    files = weight_files(output) if output.is_dir() else [output]
    digest = hashlib.sha256()
    for path in files:
        file = TensorFile(path)
        for key in sorted(file):
            tensor = file.read(key).contiguous()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().numpy().tobytes())
    config = output / "adapter_config.json"
    if config.exists():
        digest.update(config.read_bytes())
    return digest.hexdigest(), sum(path.stat().st_size for path in files)
