"""The line of a conversion: read, cut, write. One site at a time, exact before it is cut."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.adapters import Adapter, LowRank, RankRule, Site, Spectral, Update, cut
from regraft.adapters.update import Dense
from regraft.bases import Base, open_base
from regraft.convert.in_place import write_in_place
from regraft.convert.stand_in import StandIn, check_dialect, parameters, stand_in
from regraft.crossing import Progress, silent
from regraft.dialects import load_adapter, write_adapter
from regraft.dialects.source import AdapterSource, open_source
from regraft.dialects.write import holdable
from regraft.dialects.writers import Form
from regraft.errors import BadOption, MalformedFile, NonFiniteTensor, NothingCarried
from regraft.files import Located, locate
from regraft.files.atomic import check_free
from regraft.parallel import in_order, single_threaded
from regraft.provenance import adapter_facts, adapter_name, other_base
from regraft.result import ConvertedSite, ConvertResult
from regraft.subspaces import SubspaceLibrary
from regraft.transfer import DTYPES, check_output, default_dialect
from regraft.versions import versions

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: A share of the energy this close to 1 is all of it, but for the rounding of fp32.
_ALL = 1 - 1e-6


@single_threaded()
def convert(
    adapter: str | Path | Located,
    *,
    output: str | Path | None = None,
    base: str | Path | Base | None = None,
    dialect: str | None = None,
    rank: int | float | str | RankRule | None = None,
    form: Form = "lora",
    dtype: str | None = None,
    name: str | None = None,
    allow_unknown: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    library: SubspaceLibrary | None = None,
    progress: Progress = silent,
) -> ConvertResult:
    """Write an adapter in another dialect, at another rank, as a LoRA, or as full differences.

    Parameters
    ----------
    adapter : str, Path or Located
        Hub id, PEFT folder, or single ``.safetensors`` file; or where one was found.
    output : str or Path, optional
        File, or folder for the "peft" dialect. Without it nothing is written.
    base : str, Path or Base, optional
        The base it was trained on. Needed where ΔW depends on the base's weights, and where the
        output's names cannot be told from the input's; an error says so.
    dialect : str, optional
        Default the input's own.
    rank : int, float, str or RankRule, optional
        As in :class:`regraft.adapters.RankRule`: 16, "exact", 0.99, "sv_fro=0.9", … Default: a
        LoRA keeps its rank; other families keep every direction if the factors hold no more
        numbers than ΔW, else 99 % of the energy.
    form : "lora" or "diff"
        Two factors, or ΔW in full.
    dtype : "fp32", "fp16" or "bf16", optional
        Default the input's.
    name : str, optional
        What the output's metadata call the adapter; default its repository's or file's own name.
    allow_unknown : bool
        Leave out tensors that fit no rule, and record them; else they are an error.
    overwrite, dry_run : bool
    library : SubspaceLibrary, optional
        Remembers hashes of the base's weights.

    Returns
    -------
    ConvertResult

    Raises
    ------
    BadOption
        An option cannot be used, or the conversion needs the base.
    NothingCarried
        The adapter changes nothing.
    RegraftError
        Any unreadable input or failed write; see :mod:`regraft.errors`.
    """
    started = time.perf_counter()
    rule = None if rank is None else RankRule.parse(rank)
    if form not in ("lora", "diff"):
        raise BadOption(f"No form {form!r}.", fix="Choose lora or diff.")
    check_output(dialect, dtype, None if dry_run else output)
    if output is not None and not dry_run:
        check_free(Path(output), overwrite=overwrite)
    located = adapter if isinstance(adapter, Located) else locate(adapter)
    source = open_source(located.path, allow_unknown=allow_unknown)
    dialect = dialect or default_dialect(source.dialect, output)
    watched = stand_in(source) if base is None else _watched(base)
    if isinstance(watched, StandIn):
        check_dialect(source, watched, dialect)
    loaded = load_adapter(located.path, watched, allow_unknown=allow_unknown)
    loaded.name = name or adapter_name(located, loaded.name)
    result = _empty_result(located, loaded, source)
    result.parameters = {
        "rank": None if rule is None else str(rule),
        "form": form,
        "allow_unknown": allow_unknown,
    }
    in_place = isinstance(watched, StandIn) and dialect == source.dialect and dialect not in _OWN
    lost = {} if in_place else holdable(loaded, watched, dialect, form)
    result.sites_refused |= lost
    after = _cut(loaded, rule, form, lost, result, progress)
    if isinstance(watched, _Watched):
        result.notes += other_base(loaded, watched)
    result.dialect = dialect
    stored = DTYPES[dtype] if dtype else _stored(source)
    result.dtype = _NAMES[stored]
    if isinstance(watched, _Watched):
        result.base = watched.facts(library)
    result.dry_run = dry_run
    if output is not None and not dry_run:
        made = replace(loaded, updates=after)
        out = Path(output)
        if isinstance(watched, StandIn) and in_place:
            result.sha256 = write_in_place(
                source,
                watched,
                loaded.updates,
                made,
                out,
                dtype=stored,
                form=form,
                provenance=_provenance(result),
                overwrite=overwrite,
            )
        else:
            result.sha256 = write_adapter(
                made,
                watched,
                out,
                dialect=dialect,
                dtype=stored,
                provenance=_provenance(result),
                overwrite=overwrite,
                form=form,
                same_base=True,
            ).sha256
        result.output = str(output)
        file = out / "adapter_model.safetensors" if out.is_dir() else out
        result.bytes_out = file.stat().st_size
    result.seconds = time.perf_counter() - started
    return result


#: Dialects whose writers keep the names of a stand-in's sites as they are.
_OWN = ("peft", "lora-x")


class _Watched(Base):
    """A base that remembers which of its weights were read."""

    used: set[Site]

    def read(self, site: Site) -> Tensor:
        self.used.add(site)
        return super().read(site)

    def facts(self, library: SubspaceLibrary | None) -> dict[str, Any]:
        """What results say of it; the hash is None if only names and shapes were looked at."""
        sha = None
        if self.used:
            library = library or SubspaceLibrary(device="cpu")
            sha = library.base_hash(self, self.used)
            library.cache.commit()
        return {
            "ref": self.ref,
            "name": self.name,
            "revision": self.revision,
            "sha256_of_used_weights": sha,
        }


def _watched(base: str | Path | Base) -> _Watched:
    opened = base if isinstance(base, Base) else open_base(base)
    found = _Watched(**{f.name: getattr(opened, f.name) for f in fields(Base)})
    found.used = set()
    return found


def _stored(source: AdapterSource) -> torch.dtype:
    """The dtype of most of the file's numbers."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for roles in source.modules.values():
        for role, tensor in roles.items():
            if role != "alpha":
                info = source.file[tensor]
                sizes[info.dtype] += prod(info.shape)
    most = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    return most if most in _NAMES else torch.float32


def _cut(
    loaded: Adapter,
    rule: RankRule | None,
    form: str,
    lost: Mapping[str, str],
    result: ConvertResult,
    progress: Progress,
) -> dict[Site, Update]:
    """Every update as it is written; the result gets its account."""

    def work(item: tuple[Site, Update]) -> tuple[Update | None, float, float]:
        site, update = item
        if 0 in update.shape:
            raise MalformedFile(
                f"The change of {site} is empty: its shape is {tuple(update.shape)}.",
                file=result.adapter["ref"],
                fix="The file is damaged; download it again or ask its author.",
            )
        if isinstance(update, Dense):  # made once, and let go with this site
            matrix = update.make()
            held: Update = replace(update, make=lambda: matrix)
        else:
            held = update
        before = held.energy()
        if not math.isfinite(before):
            raise NonFiniteTensor(
                f"The change at {site} is beyond what fp32 can hold.",
                file=result.adapter["ref"],
                fix="The file is damaged or its training diverged; use an earlier checkpoint.",
            )
        if str(site) in lost:
            return None, before, 0.0
        if form == "diff" and rule is None:
            return update, before, before
        shorter = cut(held, rule)
        return (update, before, before) if shorter is held else (shorter, before, shorter.energy())

    after: dict[Site, Update] = {}
    energies: dict[Site, tuple[float, float]] = {}
    pairs = zip(loaded.updates, in_order(work, loaded.updates.items()), strict=True)
    for done, (site, (cut_to, before, kept)) in enumerate(pairs, 1):
        energies[site] = before, kept
        if cut_to is not None:
            after[site] = cut_to
        progress("converting", done, len(loaded.updates))
    total = sum(before for before, _ in energies.values())
    if total == 0:
        raise NothingCarried(
            "The adapter changes nothing: every update it holds is zero.",
            file=result.adapter["ref"],
        )
    for site, update in after.items():
        before, kept = energies[site]
        own = loaded.families.get(site, loaded.family)
        result.sites.append(
            ConvertedSite(
                site=str(site),
                family=own,
                shape=tuple(update.shape),
                rank_in=_rank(loaded.updates[site]),
                rank_out=update.rank,
                parameters_out=_numbers(update, form),
                share=before / total,
                kept=_all(kept / before if before else 1.0),
            )
        )
    result.energy_kept = _all(sum(kept for _, kept in energies.values()) / total)
    result.parameters_out = sum(site.parameters_out for site in result.sites)
    result.families = _by_family(result.sites)
    return after


def _all(share: float) -> float:
    return 1.0 if share > _ALL else share


def _rank(update: Update) -> int:
    trained = update.trained_rank if isinstance(update, Dense) else None
    return update.rank if trained is None else trained


def _numbers(update: Update, form: str) -> int:
    if form == "diff" or len(update.shape) < 2 or not isinstance(update, LowRank | Spectral):
        return prod(update.shape)
    return update.rank * (update.shape[0] + prod(update.shape[1:]))


def _by_family(sites: list[ConvertedSite]) -> dict[str, dict[str, Any]]:
    found: dict[str, list[ConvertedSite]] = defaultdict(list)
    for site in sites:
        found[site.family].append(site)
    return {
        family: {
            "sites": len(own),
            "energy_kept": _all(
                sum(s.kept * s.share for s in own) / (sum(s.share for s in own) or 1.0)
            )
            if any(s.share for s in own)
            else 1.0,
            "rank_in": [min(s.rank_in for s in own), max(s.rank_in for s in own)],
            "rank_out": [min(s.rank_out for s in own), max(s.rank_out for s in own)],
        }
        for family, own in found.items()
    }


def _empty_result(located: Located, loaded: Adapter, source: AdapterSource) -> ConvertResult:
    return ConvertResult(
        adapter=adapter_facts(located, loaded),
        base=None,
        parameters={},
        sites_refused=dict(loaded.refused),
        parameters_in=parameters(source),
        bytes_in=source.path.stat().st_size,
        notes=list(loaded.notes),
        versions=versions(),
    )


def _provenance(result: ConvertResult) -> dict[str, Any]:
    """What the file says of its own making: nothing that differs between two equal runs."""
    base = result.base
    return {
        "format": 1,
        "operation": "convert",
        "adapter": {k: v for k, v in result.adapter.items() if k != "ref"},
        "base": None if base is None else {k: v for k, v in base.items() if k != "ref"},
        "parameters": result.parameters,
        "energy_kept": round(result.energy_kept, 6),
        "sites_refused": result.sites_refused,
        "dtype": result.dtype,
        "dialect": result.dialect,
        "versions": result.versions,
    }
