"""What results and files say of what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from regraft.adapters import Adapter, Site
from regraft.adapters.families import get_family
from regraft.bases import Base
from regraft.files import Located
from regraft.result import TransferResult
from regraft.subspaces import SubspaceLibrary


def adapter_name(located: Located, read: str) -> str:
    """What to call an adapter: its repository's own name, or what its file says."""
    return located.repo.rpartition("/")[2] if located.repo else read


def adapter_facts(located: Located, loaded: Adapter) -> dict[str, Any]:
    """What results say of the adapter; all but its ``ref`` goes into provenance."""
    return {
        "ref": located.ref,
        "name": loaded.name,
        "repo": located.repo,
        "revision": located.revision,
        "family": loaded.family,
        "dialect": loaded.dialect,
        "rank": loaded.rank,
        "sites": len(loaded.updates),
        "prefixed": loaded.prefixed,
        "sha256": loaded.sha256,
        "config_sha256": config_sha256(loaded.config),
        "trigger_words": loaded.metadata.get("modelspec.trigger_phrase", ""),
    }


def config_sha256(config: Mapping[str, Any]) -> str | None:
    """A PEFT config's hash: its scale is not in the weights file. None without one."""
    if not config:
        return None
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def other_base(loaded: Adapter, base: Base) -> list[str]:
    """A note where ΔW depends on the base and the adapter calls its base something else."""
    said = str(loaded.config.get("base_model_name_or_path") or "").rstrip("/")
    needing = sorted({f for f in loaded.families.values() if get_family(f).needs_base})
    if not needing or said.rpartition("/")[2] in ("", base.name.rpartition("/")[2]):
        return []
    return [
        f"ΔW of {', '.join(needing)} was computed from {base.name}; {loaded.name} says that it was "
        f"made for {said}. On another base it would be wrong."
    ]


def base_facts(base: Base, sites: Iterable[Site], library: SubspaceLibrary) -> dict[str, Any]:
    """What results say of a base; ``sites`` are those whose weights were used."""
    return {
        "ref": base.ref,
        "name": base.name,
        "revision": base.revision,
        "quantised": base.quantised,
        "sha256_of_used_weights": library.base_hash(base, sites),
    }


def of_transfer(result: TransferResult) -> dict[str, Any]:
    """What the file says of its own making: nothing that differs between two equal runs."""
    drop = ("ref",)
    return {
        "format": 1,
        "operation": "transfer",
        "adapter": {k: v for k, v in result.adapter.items() if k not in drop},
        "source": {k: v for k, v in result.source.items() if k not in drop},
        "target": {k: v for k, v in result.target.items() if k not in drop},
        "method": result.method,
        "parameters": result.parameters,
        "verdict": result.verdict,
        "energy_kept": round(result.energy_kept, 6),
        "sites_refused": result.sites_refused,
        "dtype": result.dtype,
        "dialect": result.dialect,
        "versions": result.versions,
    }
