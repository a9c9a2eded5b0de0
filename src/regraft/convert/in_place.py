"""Writing a converted adapter under the very names its file has: no base is needed for that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.adapters import Adapter, LowRank, Site, Spectral, Update, delta
from regraft.convert.stand_in import StandIn
from regraft.dialects.metadata import file_metadata
from regraft.dialects.source import AdapterSource
from regraft.dialects.write import check_range
from regraft.dialects.writers.factors import alpha_of, file_alpha, folded, with_alpha
from regraft.dialects.writers.registry import Form, Task
from regraft.files import atomic_file, serialize

#: Modules with these roles only are copied as they are when their update was not changed.
_PLAIN = {"down", "up", "alpha", "embedding_a", "embedding_b", "diff", "diff_b", "w_norm", "b_norm"}
#: What the file says of its base; it is true of the output, too.
_OF_THE_BASE = (
    "ss_sd_model_name",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "ss_vae_name",
    "ss_vae_hash",
    "ss_new_vae_hash",
)


def write_in_place(
    source: AdapterSource,
    base: StandIn,
    before: Mapping[Site, Update],
    adapter: Adapter,
    out: Path,
    *,
    dtype: torch.dtype,
    form: Form,
    provenance: Mapping[str, Any],
    overwrite: bool,
) -> str:
    """Write one file with the input's module names; what was not changed is copied as it is.

    Parameters
    ----------
    before : mapping of Site to Update
        As they were read.
    adapter : Adapter
        As they are written.

    Returns
    -------
    str
        SHA-256 of the file.

    Raises
    ------
    OutputExists, OutputFailed
    """
    tensors = _tensors(source, base, before, adapter.updates, dtype, form)
    check_range(tensors, dtype, out)
    task = Task(adapter, base, dtype, form)
    metadata = file_metadata(task, source.dialect, tensors, provenance)
    metadata.pop("ss_sd_model_name", None)
    said = source.file.metadata
    metadata |= {key: said[key] for key in _OF_THE_BASE if key in said}
    trainer = said.get("ss_network_module", "")
    if trainer and form == "lora" and not trainer.startswith("lycoris"):
        metadata["ss_network_module"] = trainer
    with atomic_file(out, overwrite=overwrite) as temporary:
        return serialize(temporary, tensors, metadata)


def _tensors(
    source: AdapterSource,
    base: StandIn,
    before: Mapping[Site, Update],
    after: Mapping[Site, Update],
    dtype: torch.dtype,
    form: str,
) -> dict[str, Tensor]:
    modules: dict[str, list[Site]] = {name: [] for name in source.modules}
    for site in after:
        modules[base.names[_module(site, base)]].append(site)
    changed = {
        name: form != "lora" or not _untouched(source, name, sites, before, after)
        for name, sites in modules.items()
    }
    # Copied modules first: at equal counts the file's alpha is one that trainers chose.
    ordered = sorted(modules, key=lambda name: changed[name])
    updates = [after[site] for name in ordered for site in modules[name]]
    low = [u for u in updates if isinstance(u, LowRank)]
    alpha = file_alpha(low, [u.rank for u in low])
    tensors: dict[str, Tensor] = {}
    for name, sites in modules.items():
        if changed[name]:
            for site in sites:
                tensors |= _written(source, name, site, after[site], dtype, form, alpha)
        elif sites:
            tensors |= _copied(source, name, dtype)
    return tensors


def _module(site: Site, base: StandIn) -> Site:
    return site if site in base.names else site.with_parameter("weight")


def _untouched(
    source: AdapterSource,
    name: str,
    sites: list[Site],
    before: Mapping[Site, Update],
    after: Mapping[Site, Update],
) -> bool:
    """Whether a module's own tensors say its update, in a form that the output has, too."""
    roles = source.modules[name]
    same = all(after[s] is before[s] for s in sites)
    if not same or not roles.keys() <= _PLAIN or source.families[name] not in ("lora", "full"):
        return False
    # Without an alpha of its own a module's scale is 1, or kept in metadata that are not copied.
    scales = {u.scale for s in sites if isinstance(u := after[s], LowRank)}
    return "alpha" in roles or scales <= {1.0}


def _copied(source: AdapterSource, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    found = {}
    for role, key in source.modules[name].items():
        tensor = source.file.read(key)
        found[key] = tensor if role == "alpha" else tensor.to(dtype)
    return found


def _written(
    source: AdapterSource,
    name: str,
    site: Site,
    update: Update,
    dtype: torch.dtype,
    form: str,
    alpha: float,
) -> dict[str, Tensor]:
    if site.parameter == "bias":
        return {f"{name}.diff_b": delta(update).to(dtype)}
    if form == "diff" or not isinstance(update, LowRank | Spectral):
        return {f"{name}.diff": delta(update).to(dtype)}
    low = update.low_rank()
    roles = source.modules[name]
    if "embedding_a" in roles:
        a, b = folded(low, dtype)
        return {roles["embedding_a"]: a, roles["embedding_b"]: b}
    dotted = "." in name
    down = roles.get("down", f"{name}.{'lora_A' if dotted else 'lora_down'}.weight")
    up = roles.get("up", f"{name}.{'lora_B' if dotted else 'lora_up'}.weight")
    if dotted and "alpha" not in roles:
        a, b = folded(low, dtype)
        return {down: a.contiguous(), up: b.contiguous()}
    a, b = with_alpha(low, alpha, dtype)
    key = roles.get("alpha", f"{name}.alpha")
    number = torch.tensor(alpha if alpha_of(low) else 1.0, dtype=torch.float32)
    return {down: a.contiguous(), up: b.contiguous(), key: number}
