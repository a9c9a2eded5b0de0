"""Doing again what an output's provenance says, from inputs with the recorded hashes.

What could not be checked is "inconclusive", never "passed".
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from regraft.bases import Base, open_base
from regraft.convert import convert
from regraft.crossing import Progress, silent
from regraft.errors import InputNotFound, RegraftError
from regraft.files import Located, TensorFile, locate
from regraft.files.hub import from_hub
from regraft.files.pickle_gate import original
from regraft.files.select import weight_files
from regraft.merge import merge
from regraft.merge.folder import PROVENANCE
from regraft.result import Check, VerifyResult
from regraft.subspaces import SubspaceLibrary
from regraft.transfer import transfer
from regraft.verify.compare import compare, integrity, sha256_of

#: Provenance of a later format is not understood.
FORMAT = 1
_WEIGHTS = "adapter_model.safetensors"
#: The parameters that an output records. The file is somebody else's text: no other argument, such
#: as one that names a path to write to, is taken from it.
_RECORDED = {
    "transfer": frozenset(
        {"dimension", "threshold", "filter_blocks", "cross_terms", "align", "method", "rank"}
        | {"rank_energy", "pairing", "seed", "allow_unknown", "calibration"}
    ),
    "convert": frozenset({"rank", "form", "allow_unknown"}),
    "merge": frozenset({"allow_unknown", "lossy"}),
}
_FLAGS = {"source": "--from", "target": "--to", "base": "--base", "adapter": "--adapter"}


class _Stop(Exception):
    """Nothing more can be checked; the last check says why."""


@dataclass
class _Replay:
    """One verification under way. ``bases`` are the given ones, opened.

    ``path`` is the weights file, or the folder of a merge.
    """

    result: VerifyResult
    path: Path
    adapters: list[Path]
    bases: dict[str, Base]
    progress: Progress
    library: SubspaceLibrary | None
    calibration: str | Path | None = None
    story: dict[str, Any] = field(default_factory=dict)

    def note(
        self, name: str, status: Literal["passed", "failed", "inconclusive"], detail: str
    ) -> None:
        self.result.checks.append(Check(name, status, detail))

    def stop(self, name: str, detail: str) -> _Stop:
        self.note(name, "inconclusive", detail)
        return _Stop()


def verify(
    out: str | Path,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    source: str | Path | Base | None = None,
    target: str | Path | Base | None = None,
    base: str | Path | Base | None = None,
    calibration: str | Path | None = None,
    library: SubspaceLibrary | None = None,
    progress: Progress = silent,
) -> VerifyResult:
    """Replay a transfer, a conversion or a merge from its output's provenance, and compare.

    Parameters
    ----------
    out : str or Path
        What :func:`regraft.transfer`, :func:`regraft.convert` or :func:`regraft.merge` wrote: a
        file, or a folder. A merge is made again in the system's folder for temporary files.
    adapter, source, target, base : optional
        The inputs; of a merge all its adapters, in any order. What is not given is looked for on
        the hub, if it came from there; in all cases its hash must be the recorded one.
    calibration : str or Path, optional
        The data that a transfer's map was fitted on, where the user gave any.
    library : SubspaceLibrary, optional
        Share one to share its cache.

    Returns
    -------
    VerifyResult
        "passed": the same bytes, or with other versions (or on another kind of processor) the same
        tensors within the tolerance of :mod:`regraft.verify.compare`. "failed": the file is
        damaged, or not what its provenance gives. "inconclusive": something could not be checked.

    Raises
    ------
    InputNotFound, HubUnavailable, MalformedFile, NotABase
        ``out`` cannot be read, or an input that was named.
    """
    started = time.perf_counter()
    place = locate(out).path
    path = place if (place / PROVENANCE).is_file() else _weights(out)
    given = [adapter] if isinstance(adapter, str | Path) else list(adapter or ())
    run = _Replay(
        VerifyResult(str(out)),
        path,
        [locate(one).path for one in given],
        {
            what: given if isinstance(given, Base) else open_base(given)
            for what, given in (("source", source), ("target", target), ("base", base))
            if given is not None
        },
        progress,
        library,
        calibration,
    )
    try:
        _read_story(run)
        with tempfile.TemporaryDirectory(prefix="regraft-verify-") as folder:
            run.result.checks += compare(path, _again(run, Path(folder)), run.story)
    except _Stop:
        pass
    run.result.seconds = time.perf_counter() - started
    return run.result


def _weights(out: str | Path) -> Path:
    path = locate(out).path
    if not path.is_dir():
        return path
    files = [path / _WEIGHTS] if (path / _WEIGHTS).is_file() else weight_files(path)
    if not files:
        raise InputNotFound(
            "The folder holds no .safetensors file.",
            file=path,
            fix="Give what transfer, convert or merge wrote.",
        )
    return files[0]


def _read_story(run: _Replay) -> None:
    """What it says of its making, and whether the data are what was written."""
    if run.path.is_dir():
        text: str | None = (run.path / PROVENANCE).read_text(encoding="utf-8", errors="replace")
    else:
        text = TensorFile(run.path).metadata.get("regraft")
    try:
        story = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        story = None
    # A merge holds no hash of its data: making one would take about as long as the replay.
    if not isinstance(story, dict) or story.get("operation") != "merge":
        if run.path.is_dir():
            raise run.stop("provenance", f"{PROVENANCE} does not say that it is a merge")
        run.result.checks.append(integrity(run.path))
        if run.result.status == "failed":
            raise _Stop
    if text is None:
        raise run.stop("provenance", "the file holds none: no transfer, convert or merge wrote it")
    if not isinstance(story, dict):
        raise run.stop("provenance", "it is not a JSON object")
    if story.get("format") != FORMAT:
        said = str(story.get("format"))[:20]
        raise run.stop("provenance", f"its format is {said}; this version knows {FORMAT}")
    run.story = story
    # The first outputs with provenance were transfers, and did not say so.
    run.result.operation = str(story.get("operation", "transfer"))[:40]
    if run.result.operation not in _RECORDED:
        raise run.stop("provenance", f"the operation {run.result.operation!r} is not known here")


def _again(run: _Replay, folder: Path) -> Path:
    """Do it again into ``folder``; gives the new weights file."""
    try:
        if run.result.operation == "merge":
            return _merge(run, folder / ("out" if run.path.is_dir() else "out.safetensors"))
        dialect = str(run.story.get("dialect") or _dialect(run.path))
        single = dialect != "peft"
        out = folder / ("out.safetensors" if single else "out")
        play = _transfer if run.result.operation == "transfer" else _convert
        if len(run.adapters) > 1:
            raise run.stop("adapter", "it was made of one adapter, and several were given")
        play(run, _adapter(run, run.story["adapter"], run.adapters), out, dialect)
    except RegraftError as error:
        raise run.stop("replay", f"it stopped: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"it is not as this version writes it ({type(error).__name__}: {error})"
        raise run.stop("provenance", why) from None
    return out if single else out / _WEIGHTS


def _dialect(path: Path) -> str:
    """The dialect of an output whose provenance does not name it."""
    if path.name == _WEIGHTS and (path.parent / "adapter_config.json").is_file():
        return "peft"
    keys = list(TensorFile(path))
    if any(key.endswith(".lora_x_S") for key in keys):
        return "lora-x"
    return "kohya" if any(key.endswith(".lora_down.weight") for key in keys) else "diffusers"


def _from_hub(run: _Replay, what: str, facts: Mapping[str, Any], **options: bool) -> Path:
    """An input that was not given, as recorded."""
    repo = facts.get("repo") if what == "adapter" else facts["name"]
    if not facts.get("revision") or not repo:
        raise run.stop(what, f"{facts['name']} was a local file; name it with {_FLAGS[what]}")
    return from_hub(str(repo), str(facts["revision"]), **options)


def _adapter(run: _Replay, facts: Mapping[str, Any], given: Sequence[Path]) -> Located:
    """The adapter of these facts among the given ones, as if from where it was recorded to come."""
    paths = given or [_from_hub(run, "adapter", facts)]
    # Hashed as what the user has, not as a pickle's copy.
    found = next((p for p in paths if sha256_of(original(_weights(p))) == facts["sha256"]), None)
    if found is None:
        named = ", ".join(original(_weights(p)).name for p in paths)
        raise run.stop("adapter", f"not the adapter that was used: {named}; {_hash_of(facts)}")
    return Located(str(found), found, facts.get("repo"), facts.get("revision"))


def _check_adapter(run: _Replay, said: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Its settings: the scale of a PEFT folder is not in the weights file."""
    if "config_sha256" in said and said["config_sha256"] != found["config_sha256"]:
        raise run.stop("adapter", "its adapter_config.json is not the one that was used")
    run.note("adapter", "passed", _hash_of(said))


def _hash_of(facts: Mapping[str, Any]) -> str:
    return f"sha256 {str(facts['sha256'])[:64]}"


def _base(run: _Replay, what: str) -> Base:
    """A base under its recorded name and revision: metadata hold them, nothing depends on them."""
    facts = run.story[what]
    # All files of a merge's base are in its output.
    options = {"to_run": True} if run.result.operation == "merge" else {}
    opened = run.bases.get(what)
    if opened is None:
        opened = open_base(_from_hub(run, what, facts, **options))
    elif opened.repo and options:
        opened = open_base(from_hub(opened.repo, opened.revision, **options))
    return replace(opened, repo=_text(facts["name"]), revision=facts.get("revision"))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:20]!r} is no name")
    return value


def _check_base(run: _Replay, what: str, found: Mapping[str, Any] | None) -> None:
    said = run.story[what]["sha256_of_used_weights"]
    if found is None or found["sha256_of_used_weights"] != said:
        raise run.stop(what, f"this is not the base that was used (hash of its weights {said})")
    used = "only its names and shapes were used" if said is None else f"hash of its weights {said}"
    run.note(what, "passed", used)


def _library(run: _Replay, device: str) -> SubspaceLibrary:
    if device != "cpu" and not torch.cuda.is_available():
        raise run.stop("device", f"it was made on {device[:20]}, which is not here")
    if run.library is not None and run.library.device.type == device:
        return run.library
    return SubspaceLibrary(device=device)


def _parameters(run: _Replay) -> dict[str, Any]:
    """The recorded parameters, the device left out.

    Raises
    ------
    TypeError
        Some are none that an output records.
    """
    said = {k: v for k, v in run.story["parameters"].items() if k != "device"}
    strange = sorted(said.keys() - _RECORDED[run.result.operation])
    if strange:
        raise TypeError(f"{strange[0][:40]!r} is no parameter")
    return said


def _transfer(run: _Replay, adapter: Located, out: Path, dialect: str) -> None:
    story, said = run.story, _parameters(run)
    said.setdefault("method", story["method"])
    data = said.pop("calibration", None)
    if data is not None:
        if run.calibration is None:
            why = "the map was fitted on data of its user's; name them with --calibration"
            raise run.stop("calibration", why)
        said["calibration"] = run.calibration
    library = _library(run, str(story["parameters"].get("device", "cpu")))
    source, target = _base(run, "source"), _base(run, "target")
    try:
        found = transfer(
            adapter,
            source=source,
            target=target,
            output=out,
            dialect=dialect,
            dtype=story["dtype"],
            name=_text(story["adapter"]["name"]),
            library=library,
            progress=run.progress,
            **said,
        )
    except RegraftError as error:
        refused = getattr(error, "result", None)
        if refused is not None:  # "don't": is it because these are other bases?
            _check_base(run, "source", refused.source)
            _check_base(run, "target", refused.target)
        raise
    _check_adapter(run, story["adapter"], found.adapter)
    if data is not None:
        if found.parameters["calibration"] != data:
            raise run.stop("calibration", f"these are not the data that were used ({data})")
        run.note("calibration", "passed", f"hash of its items {data}")
    _check_base(run, "source", found.source)
    _check_base(run, "target", found.target)


def _convert(run: _Replay, adapter: Located, out: Path, dialect: str) -> None:
    story = run.story
    found = convert(
        adapter,
        output=out,
        base=None if story["base"] is None else _base(run, "base"),
        dialect=dialect,
        dtype=story["dtype"],
        name=_text(story["adapter"]["name"]),
        library=run.library,
        progress=run.progress,
        **_parameters(run),
    )
    _check_adapter(run, story["adapter"], found.adapter)
    if story["base"] is not None:
        _check_base(run, "base", found.base)


def _merge(run: _Replay, out: Path) -> Path:
    said = run.story["adapters"]
    left = list(run.adapters)
    located = []
    for facts in said:
        # What is not among the given ones may still be on the hub.
        here = [p for p in left if sha256_of(original(_weights(p))) == facts["sha256"]]
        one = _adapter(run, facts, here or ([] if facts.get("repo") else left))
        if here[1:]:  # equal weights with other settings: one after the other
            left.remove(one.path)
        located.append(one)
    for path in run.adapters:
        if path not in {one.path for one in located}:
            raise run.stop("adapter", f"{path.name} is none of those that were merged")
    found = merge(
        located,
        base=_base(run, "base"),
        output=out,
        strength=[facts["strength"] for facts in said],
        dtype=run.story["dtype"],
        name=[_text(facts["name"]) for facts in said],
        library=run.library,
        progress=run.progress,
        **_parameters(run),
    )
    for facts, again in zip(said, found.adapters, strict=True):
        _check_adapter(run, facts, again)
    _check_base(run, "base", found.base)
    return out
