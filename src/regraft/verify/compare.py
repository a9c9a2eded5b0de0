"""An output beside its replay: bytes first, then tensors, metadata and settings."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.files import TensorFile, TensorInfo
from regraft.merge.folder import PROVENANCE, is_weights, walk
from regraft.result import Check
from regraft.versions import versions

#: Largest difference of a tensor, as a share of its largest entry, that rounding may make.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
#: The same of a merged weight in fp32 or fp64: nearly all of it is the base's, so the change may be
#: small beside it.
MERGED = 1e-5
#: Half-precision numbers of a merged weight that may be rounded the other way, by one step.
MERGED_SHARE = 0.01
#: Numbers of a tensor that are compared at a time.
_BLOCK = 1 << 22
#: Metadata that follow from the bytes of the tensors, or hold the versions.
_FOLLOWS = ("sshs_model_hash", "modelspec.hash_sha256", "regraft")


def sha256_of(path: Path, skip: int = 0) -> str:
    """SHA-256 of a file, less its first ``skip`` bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        stream.seek(skip)
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def integrity(path: Path) -> Check:
    """The hash of its data that every file of Regraft's holds, against the data."""
    said = TensorFile(path).metadata.get("sshs_model_hash")
    if said is None:
        return Check("integrity", "inconclusive", "the file holds no hash of its data")
    with open(path, "rb") as stream:
        head = 8 + int.from_bytes(stream.read(8), "little")
    if said == sha256_of(path, head):
        return Check("integrity", "passed", "the data have the hash that the file says")
    return Check("integrity", "failed", "the data do not have the hash that the file says")


def compare(path: Path, again: Path, story: Mapping[str, Any]) -> list[Check]:
    """Every difference between an output and its replay.

    Parameters
    ----------
    path, again : Path
        The two weights files, or a merge's two folders. For a PEFT folder the settings beside its
        file are compared as well.
    story : mapping
        The output's provenance: what its versions allow to differ.
    """
    said = story.get("versions")
    known = said if isinstance(said, dict) else {}
    here = versions()
    apart = ", ".join(
        f"{k} {str(known.get(k))[:30]}, here {v}" for k, v in here.items() if known.get(k) != v
    )
    suffix = f", with other versions ({apart})" if apart else ""
    # Another regraft may write other metadata, the same one may not.
    strict = "failed" if known.get("regraft") == here["regraft"] else "inconclusive"
    merged = story.get("operation") == "merge"
    if path.is_dir():
        checks, pairs, worst = _files(path, again, strict)
        text = (again / PROVENANCE).read_text(encoding="utf-8")
    else:
        checks, pairs, worst = _settings(path, again, strict), {"": (path, again)}, []
        text = TensorFile(again).metadata["regraft"]
    unequal = {k: (a, b) for k, (a, b) in pairs.items() if sha256_of(a) != sha256_of(b)}
    differ = _story_that_differs(story, json.loads(text))
    largest, allowed = 0.0, 0.0
    for name, (a, b) in unequal.items():
        front = f"{name}: " if name else ""
        if not b.name.endswith(".safetensors"):
            worst.append(f"{name} differs")
            continue
        old, new = TensorFile(a), TensorFile(b)
        differ += [f"{front}{key}" for key in _metadata_that_differ(old.metadata, new.metadata)]
        most, beyond = _tensors_that_differ(old, new, _by_steps if merged else _by_share)
        largest, worst = max(largest, most), worst + [f"{front}{why}" for why in beyond]
        allowed = max([allowed, *(TOLERANCE.get(old[k].dtype, 0.0) for k in old)])
    if differ:
        checks.append(Check("metadata", strict, f"they differ in {', '.join(differ[:3])}{suffix}"))
    if worst:
        more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
        detail = f"not the same: {'; '.join(worst[:3])}{more}{suffix}"
        return [*checks, Check("replay", "failed", detail)]
    if not unequal:
        which = f"{len(pairs)} files" if path.is_dir() else f"sha256 {sha256_of(path)}"
        return [*checks, Check("replay", "passed", f"byte for byte ({which})")]
    within = f"tensors within {largest:.1e} of their largest entry "
    within += "(allowed: how rounding may fall)" if merged else f"(allowed {allowed:g})"
    why = suffix or "; not byte for byte, as on another kind of processor"
    return [*checks, Check("replay", "passed", within + why)]


def _files(
    path: Path, again: Path, strict: str
) -> tuple[list[Check], dict[str, tuple[Path, Path]], list[str]]:
    """A merged folder's other files; its weights, to be compared; and those that are amiss.

    A model card may be edited, and files that hold no weights may be added.
    """
    here, wanted = set(walk(path)), set(walk(again))
    weights = sorted(name for name in wanted if is_weights(name))
    worst = [f"{name} is missing" for name in weights if name not in here]
    worst += [f"{n} does not belong" for n in sorted(here - wanted) if is_weights(n)]
    others = [n for n in wanted if not is_weights(n) and n != PROVENANCE and not n.endswith(".md")]
    amiss = sorted(
        n for n in others if n not in here or sha256_of(path / n) != sha256_of(again / n)
    )
    if amiss:
        listed = ", ".join(amiss[:3]) + (" …" if len(amiss) > 3 else "")
        check = Check("files", strict, f"missing, or not what the replay writes: {listed}")
    else:
        check = Check("files", "passed", f"{len(others)} files beside the weights are the same")
    return [check], {n: (path / n, again / n) for n in weights if n in here}, worst


def _settings(path: Path, again: Path, strict: str) -> list[Check]:
    """A PEFT folder's config holds the scale, so it is part of what the adapter means."""
    old, new = (p.parent / "adapter_config.json" for p in (path, again))
    if not new.is_file():
        return []
    if old.is_file() and _json(old) == _json(new):
        return [Check("config", "passed", "adapter_config.json says the same")]
    return [Check("config", strict, "adapter_config.json is not what the replay writes")]


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        return None


def _metadata_that_differ(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return [k for k in sorted({*old, *new} - set(_FOLLOWS)) if old.get(k) != new.get(k)]


def _story_that_differs(story: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """What the provenance says and the replay says otherwise; rounding may move the energy.

    Older provenance says less.
    """
    differ = [
        key
        for key in sorted(story.keys() - {"versions", "energy_kept"})
        if not _says(story[key], again.get(key))
    ]
    if "energy_kept" in again:
        said = story.get("energy_kept")
        if not isinstance(said, float | int) or abs(said - again["energy_kept"]) > 1e-4:
            differ.append("energy_kept")
    return [f"the provenance's {key}" for key in differ]


def _says(less: object, more: object) -> bool:
    if isinstance(less, dict) and isinstance(more, dict):
        return all(key in more and less[key] == more[key] for key in less)
    return less == more


#: Two flat tensors of one dtype, the second the replay's → the largest difference as a share of the
#: largest entry, and whether rounding can make it.
_Judge = Callable[[Tensor, Tensor], tuple[float, bool]]


def _tensors_that_differ(
    old: TensorFile, new: TensorFile, judge: _Judge
) -> tuple[float, list[str]]:
    """The largest difference within tolerance, and what is beyond it."""
    worst = [f"{k} is missing" for k in new if k not in old]
    worst += [f"{k} does not belong" for k in old if k not in new]
    largest = 0.0
    for key in sorted(set(old) & set(new)):
        a, b = old[key], new[key]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            worst.append(f"{key} is {_form(a)}, not {_form(b)}")
            continue
        x, y = (file.read(key).reshape(-1) for file in (old, new))
        if not x.numel() or x.view(torch.uint8).equal(y.view(torch.uint8)):
            continue
        share, fine = judge(x, y)
        if fine:
            largest = max(largest, share)
        else:
            worst.append(f"{key} differs by {share:.1e}")
    return largest, worst


def _by_share(x: Tensor, y: Tensor) -> tuple[float, bool]:
    size, apart, _, _ = _apart(x, y)
    share = apart / size if size else apart
    return share, share <= TOLERANCE.get(x.dtype, 0.0)


def _by_steps(x: Tensor, y: Tensor) -> tuple[float, bool]:
    """Of a merge: wide floats nearly equal; of narrow ones few differ, and by one step."""
    size, apart, differ, beyond = _apart(x, y)
    share = apart / size if size else apart
    if x.dtype in (torch.float32, torch.float64):
        return share, share <= MERGED
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    return share, narrow and not beyond and differ <= max(1, MERGED_SHARE * x.numel())


def _apart(x: Tensor, y: Tensor) -> tuple[float, float, int, int]:
    """Largest |y|, largest |x - y|, how many differ, and how many by more than one step."""
    pairs = [(x[i : i + _BLOCK], y[i : i + _BLOCK]) for i in range(0, len(x), _BLOCK)]
    size = max(float(b.double().abs().max()) for _, b in pairs)
    step = torch.finfo(x.dtype).eps if x.dtype.is_floating_point else 0.0
    apart, differ, beyond = 0.0, 0, 0
    for a, b in pairs:
        wide, near = a.double(), b.double()
        gap = (wide - near).abs()
        found = float(gap.max())
        apart = found if math.isnan(found) else max(apart, found)
        differ += int((gap != 0).sum())
        beyond += int((~(gap <= near.abs() * step + MERGED * size)).sum())
    return size, apart, differ, beyond


def _form(info: TensorInfo) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"
