"""The line of a merge: load the adapters, plan, write the base with the changes, one pass."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from regraft.adapters import Adapter, Site
from regraft.bases import Base, open_base
from regraft.crossing import Progress, silent
from regraft.dialects import load_adapter
from regraft.dialects.source import open_source
from regraft.errors import BadOption, NothingCarried, OutputExists, PickleRefused
from regraft.files import Located, TensorFile, atomic_file, atomic_folder, locate
from regraft.files.atomic import check_free
from regraft.merge.account import account, empty_result, provenance
from regraft.merge.added import Measured
from regraft.merge.folder import (
    PROVENANCE,
    Layout,
    check_space,
    edit_dtypes,
    finish,
    lay_out,
    left_out,
    lost_parts,
)
from regraft.merge.plan import changes_of, moves_zeros, pickled_base, refuse_base, refuse_insert
from regraft.merge.stream import Changes, rewrite, size_of
from regraft.merge.zeros import merge_into_zeros
from regraft.parallel import single_threaded
from regraft.provenance import adapter_name
from regraft.result import MergeResult
from regraft.subspaces import SubspaceLibrary
from regraft.transfer import DTYPES


@single_threaded()
def merge(
    adapter: str | Path | Located | Sequence[str | Path | Located],
    *,
    base: str | Path | Base,
    output: str | Path,
    strength: float | Sequence[float] = 1.0,
    dtype: str | None = None,
    name: str | Sequence[str] | None = None,
    allow_unknown: bool = False,
    lossy: bool = False,
    overwrite: bool = False,
    library: SubspaceLibrary | None = None,
    progress: Progress = silent,
) -> MergeResult:
    """Write a base whose weights are W + strength · ΔW.

    ΔW is exact, in fp32, from the bare base's weights where its family needs them. It is added in
    fp32, and the sum is rounded once to the dtype that the weight is stored in. With several
    adapters all their changes are added before the rounding.

    Parameters
    ----------
    adapter : str, Path or Located, or a sequence of them
        Of any family that has a ΔW.
    base : str, Path or Base
        A ``.safetensors`` checkpoint, a diffusers or transformers folder, or a hub id.
    output : str or Path
        A file for a file, a folder for a folder.
    strength : float or sequence of float
        Of all adapters, or of each. Negative ones take a change away.
    dtype : "fp32", "fp16" or "bf16", optional
        Store every floating-point weight of the file, or of each component that changes, in it.
        Default: each weight as it is.
    name : str or sequence of str, optional
        What the output calls each adapter; default its repository's or file's own name.
    allow_unknown : bool
        Leave out tensors of the adapters that fit no rule, and record them; else they are an error.
    lossy : bool
        On a base quantised with zero points (torchao integers by groups, GPTQ, AWQ), merge into
        them also where they cannot hold the whole change.
    overwrite : bool
        Replace an output that is there. A folder must hold no files but those of the output.
    library : SubspaceLibrary, optional
        Remembers hashes of the base's weights.

    Returns
    -------
    MergeResult

    Raises
    ------
    CannotMerge
        An adapter has no ΔW, or the base is in a form that is not written.
    QuantisedWeight
        A quantised base cannot hold the change.
    NothingCarried
        Not one stored number would change.
    OutputExists, OutputFailed
        Also where a merged weight is beyond what its dtype can hold.
    RegraftError
        Any unreadable input or bad option; see :mod:`regraft.errors`.
    """
    started = time.perf_counter()
    given = [adapter] if isinstance(adapter, str | Path | Located) else list(adapter)
    strengths = _strengths(strength, len(given))
    names = [name] if isinstance(name, str) else list(name or [])
    if names and len(names) != len(given):
        raise BadOption(f"{len(given)} adapter(s) and {len(names)} name(s) were given.")
    if dtype is not None and dtype not in DTYPES:
        raise BadOption(f"No dtype {dtype!r}.", fix=f"Choose one of {', '.join(DTYPES)}.")
    out = Path(output)
    check_free(out, overwrite=overwrite)
    located = [one if isinstance(one, Located) else locate(one) for one in given]
    for one in located:
        refuse_insert(one)
        open_source(one.path, allow_unknown=allow_unknown)  # fails before the base is looked at
    opened = base if isinstance(base, Base) else open_whole(base)
    refuse_base(opened)
    _check_names(opened, out, located)
    loaded = [load_adapter(one.path, opened, allow_unknown=allow_unknown) for one in located]
    for i, (one, own) in enumerate(zip(located, loaded, strict=True)):
        own.name = names[i] if names else adapter_name(one, own.name)
    sites = list(dict.fromkeys(site for own in loaded for site in own.updates))
    zeros = moves_zeros(opened, loaded)
    if zeros and dtype is not None:
        raise BadOption("A quantised base keeps its form.", fix="Leave out --dtype.")
    changes = [] if zeros else changes_of(opened, loaded, strengths)
    if not sites:
        reasons = sorted({why for own in loaded for why in own.refused.values()})[:3]
        raise NothingCarried(f"Nothing of it can be merged: {'; '.join(reasons)}.")
    job = _Job(
        opened,
        sites,
        changes,
        out,
        DTYPES[dtype] if dtype else None,
        {"allow_unknown": allow_unknown, "lossy": lossy and zeros},
        overwrite,
        library or SubspaceLibrary(device="cpu"),
        progress,
    )
    result = empty_result(opened, located, loaded, strengths, dtype)
    if zeros:
        measured = _zeros(job, result, list(zip(loaded, strengths, strict=True)))
    else:
        measured = _file(job, result) if opened.path.is_file() else _folder(job, result)
    account(result, measured, opened, loaded)
    result.output = str(output)
    result.seconds = time.perf_counter() - started
    return result


@dataclass(frozen=True)
class _Job:
    """One merge under way."""

    base: Base
    sites: list[Site]
    changes: list[tuple[TensorFile, Changes]]
    out: Path
    dtype: torch.dtype | None
    parameters: dict[str, bool]
    overwrite: bool
    library: SubspaceLibrary
    progress: Progress

    def story(self, result: MergeResult, sha: str) -> str:
        """What the output says of its making, as JSON; ``sha`` is the hash of :meth:`hashing`."""
        if self.base.path.is_file():
            before = next(iter(self.base.weights.values())).file.metadata.get("regraft")
        else:
            said = self.base.path / PROVENANCE
            before = said.read_text(encoding="utf-8", errors="replace") if said.is_file() else None
        story = provenance(result, self.parameters, sha, before)
        indent = None if self.base.path.is_file() else 2
        return json.dumps(story, indent=indent, sort_keys=True, ensure_ascii=False)

    def tell(self, before: int, count: int) -> None:
        self.progress("merging", before + count, len(self.sites))

    @contextmanager
    def hashing(self) -> Iterator[Callable[[], str]]:
        """The hash of the weights that change, made beside the work; asked for at its end."""
        pool = ThreadPoolExecutor(1)
        sha = pool.submit(self.library.base_hash, self.base, self.sites)
        try:
            yield sha.result
            self.library.cache.commit()
        finally:
            pool.shutdown(cancel_futures=True)


def _strengths(strength: float | Sequence[float], count: int) -> list[float]:
    found = [strength] if isinstance(strength, int | float) else list(strength)
    if len(found) == 1:
        found *= count
    if not count or len(found) != count:
        raise BadOption(
            f"{count} adapter(s) and {len(found)} strength(s) were given.",
            fix="Give one strength for all, or one for each adapter.",
        )
    if not all(map(math.isfinite, found)):
        raise BadOption("A strength is not a finite number.")
    if not any(found):
        raise NothingCarried("At strength 0 nothing would change, so nothing was written.")
    return [float(s) for s in found]


def open_whole(ref: str | Path) -> Base:
    """The base; from the hub with all that running it needs, so that the output runs too.

    Raises
    ------
    CannotMerge
        It is a pickle.
    RegraftError
        As :func:`regraft.bases.open_base`.
    """
    try:
        located = locate(ref, to_run=True)
        opened = open_base(located.path)
    except PickleRefused as error:
        raise pickled_base(error.file) from None
    return replace(opened, ref=located.ref, repo=located.repo, revision=located.revision)


def _check_names(base: Base, out: Path, adapters: Sequence[Located]) -> None:
    single = base.path.is_file()
    if single != (out.suffix == ".safetensors"):
        raise BadOption(
            f"The base is a {'file' if single else 'folder'}, so the output is one too.",
            file=out,
            fix=f"Name it {'with' if single else 'without'} .safetensors at the end.",
        )
    here, there = out.resolve(), base.path.resolve()
    if here == there or here in there.parents or (there in here.parents and not single):
        raise OutputExists(
            "The output is the base itself, or one is inside the other.",
            file=out,
            fix="Name another place: the base is never overwritten.",
        )
    for adapter in adapters:
        own = adapter.path.resolve()
        if here == own or here in own.parents:
            raise OutputExists("The output is an adapter's own place.", file=out)


def _file(job: _Job, result: MergeResult) -> list[Measured]:
    """A single checkpoint; its provenance is in its metadata."""
    ((file, changes),) = job.changes
    check_space(job.out.parent, size_of(file, job.dtype) + (1 << 20))

    def metadata(sha: str) -> Mapping[str, str]:
        return file.metadata | {"regraft": job.story(result, sha)}

    with atomic_file(job.out, overwrite=job.overwrite) as temporary, job.hashing() as sha:
        measured = rewrite(
            file,
            temporary,
            changes,
            dtype=job.dtype,
            metadata=lambda: metadata(sha()),
            draft=metadata("0" * 64),
            done=partial(job.tell, 0),
        )
        result.base["sha256_of_used_weights"] = sha()
        _check_moved(measured, job)
    result.files = [job.out.name]
    result.bytes_out = job.out.stat().st_size
    return measured


def _folder(job: _Job, result: MergeResult) -> list[Measured]:
    """A folder, with its provenance beside the weights."""
    layout = _layout(job, result)
    by_file = {id(file): changes for file, changes in job.changes}
    measured: list[Measured] = []
    names = {*layout.names, PROVENANCE}
    with (
        atomic_folder(job.out, overwrite=job.overwrite, replaceable=names) as folder,
        job.hashing() as sha,
    ):
        for name, file in layout.made.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            measured += rewrite(
                file,
                target,
                by_file.get(id(file), {}),
                dtype=job.dtype,
                done=partial(job.tell, len(measured)),
            )
        _check_moved(measured, job)
        result.base["sha256_of_used_weights"] = sha()
        layout.edited[PROVENANCE] = f"{job.story(result, sha())}\n".encode()
        result.bytes_out = finish(layout, folder)
    result.files = list(layout.made)
    return measured


def _zeros(
    job: _Job, result: MergeResult, adapters: Sequence[tuple[Adapter, float]]
) -> list[Measured]:
    """A folder of a base whose zero points take the change; codes and scales stay."""
    with job.hashing() as sha:
        result.base["sha256_of_used_weights"] = sha()
    made = merge_into_zeros(
        adapters,
        job.base,
        job.out,
        lossy=job.parameters["lossy"],
        overwrite=job.overwrite,
        beside={PROVENANCE: f"{job.story(result, sha())}\n".encode()},
        progress=job.progress,
    )
    result.notes += made.notes
    result.files = made.files
    result.bytes_out = made.bytes_out
    return made.measured


def _layout(job: _Job, result: MergeResult) -> Layout:
    base = job.base
    held = {id(w.file): w.file for w in (*base.weights.values(), *base.others.values())}
    changed = [file for file, _ in job.changes]
    layout = lay_out(base.path, held.values(), changed, whole=job.dtype is not None)
    sizes = {name: size_of(file, job.dtype) for name, file in layout.made.items()}
    if job.dtype is not None:
        edit_dtypes(layout, sizes, job.dtype)
    copied = sum(path.stat().st_size for path in layout.copied.values())
    check_space(job.out.parent, sum(sizes.values()) + copied + (1 << 20))
    result.notes += left_out(layout)
    result.notes += lost_parts(base.path)
    return layout


def _check_moved(measured: Sequence[Measured], job: _Job) -> None:
    """Called before the output appears."""
    if any(m.moved for m in measured):
        return
    if not any(m.change for m in measured):
        raise NothingCarried("The change is zero at every site, so nothing was written.")
    narrow = any(_narrow(job.dtype or job.base.at(site).dtype) for site in job.sites)
    raise NothingCarried(
        "Every change is too small for the dtype of its weight: not one stored number would "
        "differ. Nothing was written.",
        fix="Write it with --dtype fp32." if narrow else "Give a larger --strength.",
    )


def _narrow(dtype: torch.dtype) -> bool:
    return dtype.itemsize < torch.float32.itemsize
