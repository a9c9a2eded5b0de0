"""An output beside its replay: bytes first, then tensors, metadata and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from regraft.files import TensorFile, TensorInfo
from regraft.result import Check
from regraft.versions import versions

#: Largest difference of a tensor, as a share of its largest entry, that rounding may make.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}
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
        The two weights files; for a PEFT folder the settings beside them are compared as well.
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
    checks = _settings(path, again, strict)
    sha = sha256_of(path)
    if sha == sha256_of(again):
        return [*checks, Check("replay", "passed", f"byte for byte (sha256 {sha})")]
    old, new = TensorFile(path), TensorFile(again)
    differ = [
        *_metadata_that_differ(old.metadata, new.metadata),
        *_story_that_differs(story, new.metadata),
    ]
    if differ:
        checks.append(Check("metadata", strict, f"they differ in {', '.join(differ[:3])}{suffix}"))
    largest, worst = _tensors_that_differ(old, new)
    if worst:
        more = f" and {len(worst) - 3} more" if len(worst) > 3 else ""
        detail = f"not the same: {'; '.join(worst[:3])}{more}{suffix}"
        return [*checks, Check("replay", "failed", detail)]
    allowed = max((TOLERANCE.get(old[k].dtype, 0.0) for k in old), default=0.0)
    within = f"tensors within {largest:.1e} of their largest entry (allowed {allowed:g})"
    why = suffix or "; not byte for byte, as on another kind of processor"
    return [*checks, Check("replay", "passed", within + why)]


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


def _story_that_differs(story: Mapping[str, Any], new: Mapping[str, str]) -> list[str]:
    """What the provenance says and the replay says otherwise; rounding may move the energy.

    Older provenance says less.
    """
    again = json.loads(new["regraft"])
    differ = [
        key
        for key in sorted(story.keys() - {"versions", "energy_kept"})
        if not _says(story[key], again.get(key))
    ]
    said = story.get("energy_kept")
    if not isinstance(said, float | int) or abs(said - again["energy_kept"]) > 1e-4:
        differ.append("energy_kept")
    return [f"the provenance's {key}" for key in differ]


def _says(less: object, more: object) -> bool:
    if isinstance(less, dict) and isinstance(more, dict):
        return all(key in more and less[key] == more[key] for key in less)
    return less == more


def _tensors_that_differ(old: TensorFile, new: TensorFile) -> tuple[float, list[str]]:
    """The largest difference within tolerance, and what is beyond it."""
    worst = [f"{k} is missing" for k in new if k not in old]
    worst += [f"{k} does not belong" for k in old if k not in new]
    largest = 0.0
    for key in sorted(set(old) & set(new)):
        a, b = old[key], new[key]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            worst.append(f"{key} is {_form(a)}, not {_form(b)}")
            continue
        x, y = old.read(key).double(), new.read(key).double()
        size = float(y.abs().max()) if y.numel() else 0.0
        apart = float((x - y).abs().max()) if y.numel() else 0.0
        share = apart / size if size else apart
        if share <= TOLERANCE.get(a.dtype, 0.0):
            largest = max(largest, share)
        else:
            worst.append(f"{key} differs by {share:.1e}")
    return largest, worst


def _form(info: TensorInfo) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"
