"""The main line: read, open, pair, choose, carry, write, report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from regraft import provenance
from regraft.adapters import Adapter
from regraft.bases import Base, open_base
from regraft.bases.quantised.cost import TRAINED_ON
from regraft.bases.quantised.cost import notes as quantised_notes
from regraft.crossing import Crossing, Progress, energies_of, silent
from regraft.dialects import DIALECTS, load_adapter, write_adapter
from regraft.dialects.inserted import is_insert
from regraft.dialects.write import holdable
from regraft.errors import BadOption, NothingCarried, NotRecommended
from regraft.files import Located, locate
from regraft.files.atomic import check_free
from regraft.methods import MethodOptions, get_insert_method, get_method, methods
from regraft.methods.choose import Verdict, choose
from regraft.methods.predict import CURVE
from regraft.pairing import Pairing, pair_sites
from regraft.parallel import single_threaded
from regraft.result import TransferResult
from regraft.subspaces import Dimension, SubspaceLibrary
from regraft.versions import versions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DTYPE_NAMES = {v: k for k, v in DTYPES.items()}


@single_threaded()
def transfer(
    adapter: str | Path | Located,
    *,
    source: str | Path | Base,
    target: str | Path | Base,
    output: str | Path | None = None,
    method: str = "auto",
    report: str | Path | None = None,
    dialect: str | None = None,
    rank: int | Literal["full"] | None = None,
    rank_energy: float | None = None,
    dimension: int | float | str = 320,
    threshold: float | None = None,
    filter_blocks: Sequence[str] = (),
    cross_terms: bool = False,
    align: Literal["none", "rank-order"] = "none",
    pairing: Literal["auto", "name", "similarity"] = "auto",
    calibration: str | Path | None = None,
    dtype: str | None = None,
    device: str = "auto",
    seed: int = 0,
    name: str | None = None,
    allow_unknown: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    library: SubspaceLibrary | None = None,
    progress: Progress = silent,
) -> TransferResult:
    """Carry an adapter from the base it was trained on to another base.

    Parameters
    ----------
    adapter : str, Path or Located
        Hub id, PEFT folder, or single ``.safetensors`` file; or where one was found. Prompts,
        prefixes and bottlenecks take :mod:`regraft.inserts`' own line: options that speak of a
        change of weights are errors there.
    source, target : str, Path or Base
        The base it was trained on, and the base it shall work on.
    output : str or Path, optional
        File, or folder for the "peft" dialect. Without it nothing is written.
    method : str
        "auto", or a name from :func:`regraft.methods`.
    report : str or Path, optional
        Write a self-contained HTML page there.
    dialect : str, optional
        "peft", "diffusers", "kohya", "comfyui" or "lora-x"; default the input's own.
    rank : int or "full", optional
        Largest output rank per site. Default: a LoRA's own rank; of other families every
        direction, or 99 % of the energy where that would be larger than ΔW. "full" never cuts.
    rank_energy : float, optional
        Instead of a rank: the share of each site's energy to keep, in (0, 1].
    dimension : int, float or "full"
        Of the singular subspaces: a number (paper: 320), a share of energy, or everything.
    threshold : float, optional
        Smallest min(Φ_l, Φ_r) a site may have; default the method's.
    filter_blocks : sequence of str
        Regular expressions; matching target sites are left out.
    cross_terms, align
        See :class:`regraft.methods.MethodOptions`.
    pairing : str
        "auto", "name" or "similarity".
    calibration : str or Path, optional
        For activation-map: texts, or pictures with captions, to fit the map on; see
        :func:`regraft.running.data.read_data`. Default: samples of the source base itself.
    dtype : "fp32", "fp16" or "bf16", optional
        Of the output; default the input's.
    device : str
        Where weights are decomposed: "auto", "cpu", "cuda", …
    seed : int
        Of the samples that activation-map is fitted on. No other method draws random numbers.
    name : str, optional
        What the output's metadata call the adapter; default its repository's or file's own name.
    allow_unknown : bool
        Leave out tensors that fit no rule, and record them; else they are an error.
    overwrite, dry_run : bool
    library : SubspaceLibrary, optional
        Share one between calls to share its cache.

    Returns
    -------
    TransferResult

    Raises
    ------
    NotRecommended
        ``method="auto"`` and the verdict is "don't".
    NothingCarried
        The result would change nothing on the target.
    RegraftError
        Any unreadable input, bad option or failed write; see :mod:`regraft.errors`.
    """
    started = time.perf_counter()
    options = MethodOptions(
        dimension=Dimension.parse(dimension),
        threshold=None if threshold is None else float(threshold),
        filter_blocks=tuple(filter_blocks),
        cross_terms=cross_terms,
        align=align,
    )
    check_output(dialect, dtype, None if dry_run else output)
    _check_rank(rank, rank_energy)
    for path in (output, report):
        if path is not None and not dry_run:
            check_free(Path(path), overwrite=overwrite)
    located = adapter if isinstance(adapter, Located) else locate(adapter)
    if is_insert(located):
        given = {
            "dialect": dialect not in (None, "peft"),
            "rank": rank,
            "pairing": pairing != "auto",
        }
        _check_insert(method, options, {**given, "rank_energy": rank_energy}, output)
        from regraft.inserts.transfer import transfer_insert

        return transfer_insert(
            located,
            source=source,
            target=target,
            library=library or SubspaceLibrary(device=device),
            output=output,
            method=method,
            calibration=calibration,
            report=report,
            dtype=DTYPES[dtype] if dtype else None,
            seed=seed,
            name=name,
            allow_unknown=allow_unknown,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if method != "auto":
        get_method(method).check(options)
    if calibration is not None:
        raise BadOption(
            "Calibration data are for activation-map; this adapter changes weights.",
            fix="Leave out --calibration.",
        )
    source_base = source if isinstance(source, Base) else open_base(source)
    target_base = target if isinstance(target, Base) else open_base(target)
    library = library or SubspaceLibrary(device=device)
    before = library.decompositions
    loaded = load_adapter(located.path, source_base, allow_unknown=allow_unknown)
    loaded.name = name or provenance.adapter_name(located, loaded.name)
    energies = energies_of(loaded)
    total = sum(energies.values())
    if total == 0:
        raise NothingCarried(
            "The adapter changes nothing: every update it holds is zero.", file=located.ref
        )
    paired = pair_sites(source_base, target_base, loaded.updates, how=pairing)
    crossing = Crossing(loaded, source_base, target_base, library, paired, energies, progress)
    verdict = choose(crossing.facts())
    library.cache.commit()
    result = _empty_result(located, loaded, source_base, target_base, verdict, paired, library)
    result.parameters = {
        **options.to_dict(),
        "method": method,
        "rank": rank,
        "rank_energy": rank_energy,
        "pairing": pairing,
        "seed": seed,
        "allow_unknown": allow_unknown,
        "device": library.device.type,
    }
    chosen = verdict.method if method == "auto" else method
    if chosen is None:
        result.seconds = time.perf_counter() - started
        if report is not None and not dry_run:
            _report(result, Path(report), overwrite)
        refusal = NotRecommended(
            f"Verdict: don't. {verdict.why}",
            fix="Nothing was written. To do it all the same, name a method (--method copy).",
        )
        refusal.result = result
        raise refusal
    used = get_method(chosen)
    result.method = used.name
    carried = crossing.carry(used, options, rank, rank_energy)
    result.sites = carried.sites
    result.sites_refused |= carried.refused
    result.energy_kept = carried.energy_kept
    result.energy_kept_by_copy = carried.energy_kept_by_copy
    result.predicted[used.name] = CURVE.retention(verdict.cosine, carried.energy_kept)
    library.cache.commit()
    result.dialect = dialect or default_dialect(loaded.dialect, output)
    if carried.adapter.updates:
        _leave_out(result, holdable(carried.adapter, target_base, result.dialect))
    if not result.sites or result.energy_kept == 0:
        reasons = sorted(set(result.sites_refused.values()))[:3]
        raise NothingCarried(
            "Nothing could be carried, so nothing was written: " + "; ".join(reasons) + ".",
            fix="`regraft compare` shows how the two bases relate.",
        )
    result.decompositions = library.decompositions - before
    stored = DTYPES[dtype] if dtype else _stored_dtype(loaded)
    result.dtype = _DTYPE_NAMES[stored]
    if output is not None and not dry_run:
        written = write_adapter(
            carried.adapter,
            target_base,
            Path(output),
            dialect=result.dialect,
            dtype=stored,
            provenance=provenance.of_transfer(result),
            overwrite=overwrite,
        )
        result.output, result.sha256 = str(output), written.sha256
    result.dry_run = dry_run
    result.seconds = time.perf_counter() - started
    if report is not None and not dry_run:
        _report(result, Path(report), overwrite)
    return result


def _check_insert(
    method: str, options: MethodOptions, given: Mapping[str, object], output: str | Path | None
) -> None:
    """Raise :class:`BadOption` for what means nothing to an adapter that changes no weight."""
    if method != "auto":
        get_insert_method(method, tuple(m.name for m in methods()))
    plain, told = MethodOptions().to_dict(), options.to_dict()
    named = [name for name, value in given.items() if value]
    named += [name for name, value in told.items() if value != plain[name]]
    if named:
        raise BadOption(
            f"The option {named[0].replace('_', '-')} speaks of changes of weights, and this "
            "adapter changes none.",
            fix="Leave it out.",
        )
    check_output("peft", None, output)


def _leave_out(result: TransferResult, refused: Mapping[str, str]) -> None:
    """Record what the output's dialect cannot hold as not carried."""
    lost = [site for site in result.sites if site.site in refused]
    result.sites = [site for site in result.sites if site.site not in refused]
    result.sites_refused |= refused
    if lost:
        result.energy_kept -= sum(site.share * site.kept for site in lost)


def _check_rank(rank: int | str | None, rank_energy: float | None) -> None:
    if rank is not None and rank != "full" and (not isinstance(rank, int) or rank < 1):
        raise BadOption(f"The rank {rank!r} is not a positive number.", fix="Or say full.")
    if rank_energy is not None and not 0 < rank_energy <= 1:
        raise BadOption(f"The rank energy {rank_energy} is not in (0, 1].")
    if rank is not None and rank_energy is not None:
        raise BadOption("A rank and a rank energy were both given.", fix="Give one of them.")


def check_output(dialect: str | None, dtype: str | None, output: str | Path | None) -> None:
    """Whether a dialect and a dtype exist, and the output's name fits the dialect.

    Raises
    ------
    BadOption
    """
    if dialect is not None and dialect not in DIALECTS:
        raise BadOption(f"No dialect {dialect!r}.", fix=f"Choose one of {', '.join(DIALECTS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise BadOption(f"No dtype {dtype!r}.", fix=f"Choose one of {', '.join(DTYPES)}.")
    single = str(output).endswith(".safetensors")
    if dialect == "peft" and single:
        raise BadOption(
            "The peft dialect is a folder.", file=str(output), fix="Name it without .safetensors."
        )
    if dialect not in (None, "peft") and output is not None and not single:
        raise BadOption(
            f"The {dialect} dialect is one file.",
            file=str(output),
            fix="End its name in .safetensors.",
        )


def default_dialect(loaded: str, output: str | Path | None) -> str:
    """The input's own dialect, unless the output's name asks for a file or a folder."""
    if output is None:
        return loaded
    single = str(output).endswith(".safetensors")
    if loaded == "peft" or (loaded == "lora-x" and not single):  # trained, it is a PEFT folder
        return "diffusers" if single else "peft"
    if not single:
        raise BadOption(
            f"The input is one {loaded} file, but the output does not end in .safetensors.",
            file=str(output),
            fix="Rename the output, or pass --dialect peft for a folder.",
        )
    return loaded


def _stored_dtype(loaded: Adapter) -> torch.dtype:
    """What most of its updates are stored in."""
    dtype = Counter(update.dtype for update in loaded.updates.values()).most_common(1)[0][0]
    return dtype if dtype in _DTYPE_NAMES else torch.float32


def _empty_result(
    located: Located,
    loaded: Adapter,
    source: Base,
    target: Base,
    verdict: Verdict,
    paired: Pairing,
    library: SubspaceLibrary,
) -> TransferResult:
    evidence = verdict.to_dict()
    evidence.pop("why")
    evidence.pop("word")
    predicted = evidence.pop("predicted")
    refused = {**loaded.refused, **{str(s): why for s, why in paired.unpaired.items()}}
    targets = [p.target for p in paired.pairs]
    return TransferResult(
        verdict=verdict.word,
        why=verdict.why,
        method="none",
        parameters={},
        adapter=provenance.adapter_facts(located, loaded),
        source=provenance.base_facts(source, loaded.updates, library),
        target=provenance.base_facts(target, targets, library),
        evidence=evidence,
        pairing=paired.how,
        predicted={"copy": predicted},
        sites_refused=refused,
        notes=[
            *loaded.notes,
            *quantised_notes(source, target, loaded.metadata.get(TRAINED_ON)),
        ],
        versions=versions(),
    )


def _report(result: TransferResult, path: Path, overwrite: bool) -> None:
    from regraft.report import write_report

    result.report = str(path)
    write_report(result, path, overwrite=overwrite)
