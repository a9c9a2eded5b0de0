"""Doing again what an output's provenance says, from inputs with the recorded hashes.

What could not be checked is "inconclusive", never "passed".
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
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
        | {"rank_energy", "pairing", "seed", "allow_unknown"}
    ),
    "convert": frozenset({"rank", "form", "allow_unknown"}),
}
_FLAGS = {"source": "--from", "target": "--to", "base": "--base", "adapter": "--adapter"}


class _Stop(Exception):
    """Nothing more can be checked; the last check says why."""


@dataclass
class _Replay:
    """One verification under way. ``bases`` are the given ones, opened."""

    result: VerifyResult
    path: Path
    adapter: Path | None
    bases: dict[str, Base]
    progress: Progress
    library: SubspaceLibrary | None
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
    adapter: str | Path | None = None,
    source: str | Path | Base | None = None,
    target: str | Path | Base | None = None,
    base: str | Path | Base | None = None,
    library: SubspaceLibrary | None = None,
    progress: Progress = silent,
) -> VerifyResult:
    """Replay a transfer or a conversion from the provenance inside its output, and compare.

    Parameters
    ----------
    out : str or Path
        What :func:`regraft.transfer` or :func:`regraft.convert` wrote: a file, or a PEFT folder.
    adapter, source, target, base : optional
        The inputs. What is not given is looked for on the hub, if it came from there; in all cases
        its hash must be the recorded one.
    library : SubspaceLibrary, optional
        Share one to share its cache.

    Returns
    -------
    VerifyResult
        "passed": the same bytes, or with other versions (or on another kind of processor) the same
        tensors within :data:`regraft.verify.compare.TOLERANCE`. "failed": the file is damaged, or
        not what its provenance gives. "inconclusive": something could not be checked.

    Raises
    ------
    InputNotFound, HubUnavailable, MalformedFile, NotABase
        ``out`` cannot be read, or an input that was named.
    """
    started = time.perf_counter()
    path = _weights(out)
    run = _Replay(
        VerifyResult(str(out)),
        path,
        None if adapter is None else locate(adapter).path,
        {
            what: given if isinstance(given, Base) else open_base(given)
            for what, given in (("source", source), ("target", target), ("base", base))
            if given is not None
        },
        progress,
        library,
    )
    try:
        run.result.checks.append(integrity(path))
        if run.result.status == "failed":
            raise _Stop
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
            fix="Give what transfer or convert wrote.",
        )
    return files[0]


def _read_story(run: _Replay) -> None:
    text = TensorFile(run.path).metadata.get("regraft")
    if text is None:
        raise run.stop("provenance", "the file holds none; Regraft did not write it")
    try:
        story = json.loads(text)
    except (ValueError, RecursionError):
        story = None
    if not isinstance(story, dict):
        raise run.stop("provenance", "it is not a JSON object")
    if story.get("format") != FORMAT:
        said = str(story.get("format"))[:20]
        raise run.stop("provenance", f"its format is {said}; this version knows {FORMAT}")
    run.story = story
    # The first outputs with provenance were transfers, and did not say so.
    run.result.operation = str(story.get("operation", "transfer"))[:40]
    if run.result.operation not in ("transfer", "convert"):
        raise run.stop("provenance", f"the operation {run.result.operation!r} is not known here")


def _again(run: _Replay, folder: Path) -> Path:
    """Do it again into ``folder``; gives the new weights file."""
    try:
        dialect = str(run.story.get("dialect") or _dialect(run.path))
        single = dialect != "peft"
        out = folder / ("out.safetensors" if single else "out")
        play = _transfer if run.result.operation == "transfer" else _convert
        play(run, _adapter(run), out, dialect)
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


def _from_hub(run: _Replay, what: str) -> Path:
    """An input that was not given, as recorded."""
    facts = run.story[what]
    repo = facts.get("repo") if what == "adapter" else facts["name"]
    if not facts.get("revision") or not repo:
        raise run.stop(what, f"{facts['name']} was a local file; name it with {_FLAGS[what]}")
    return from_hub(str(repo), str(facts["revision"]))


def _adapter(run: _Replay) -> Located:
    """The adapter, as if from where it was recorded to come."""
    path = run.adapter or _from_hub(run, "adapter")
    said = run.story["adapter"]["sha256"]
    weights = original(_weights(path))  # hashed as what the user has, not as its copy
    if sha256_of(weights) != said:
        raise run.stop(
            "adapter", f"{weights.name} is not the adapter that was used (sha256 {said})"
        )
    facts = run.story["adapter"]
    return Located(str(path), path, facts.get("repo"), facts.get("revision"))


def _check_adapter(run: _Replay, found: Mapping[str, Any]) -> None:
    """Its settings: the scale of a PEFT folder is not in the weights file."""
    said = run.story["adapter"]
    if "config_sha256" in said and said["config_sha256"] != found["config_sha256"]:
        raise run.stop("adapter", "its adapter_config.json is not the one that was used")
    run.note("adapter", "passed", f"sha256 {said['sha256']}")


def _base(run: _Replay, what: str) -> Base:
    """A base under its recorded name and revision: metadata hold them, nothing depends on them."""
    opened = run.bases.get(what) or open_base(_from_hub(run, what))
    facts = run.story[what]
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
    _check_adapter(run, found.adapter)
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
    _check_adapter(run, found.adapter)
    if story["base"] is not None:
        _check_base(run, "base", found.base)
