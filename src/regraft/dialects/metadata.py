"""Metadata of the output: what users' tools read, what the input said, and how it was made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regraft.adapters import Adapter, LowRank, Update
from regraft.bases import Base, architecture
from regraft.dialects.names import LORA_X_FORMAT
from regraft.files import data_sha256

#: Input metadata that describe the input file's bytes or its base, and would be false here.
_DROPPED = (
    "format",
    "lora_adapter_metadata",
    "regraft",
    "regraft.format",
    "sshs_legacy_hash",
    "sshs_model_hash",
    "modelspec.hash_sha256",
    "ss_sd_model_hash",
    "ss_new_sd_model_hash",
    "ss_sd_model_name",
    "ss_vae_name",
    "ss_vae_hash",
    "ss_new_vae_hash",
)


def file_metadata(
    adapter: Adapter,
    target: Base,
    dialect: str,
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
) -> dict[str, str]:
    """The ``__metadata__`` of the output file.

    The input's metadata survive (trigger words, tags, training settings) except what describes its
    own bytes or its own base. Values are text, as the format demands.
    """
    kept = {k: v for k, v in adapter.metadata.items() if k not in _DROPPED}
    digest = data_sha256(tensors)
    found = architecture(target)
    meta = {**kept, "format": "pt", "sshs_model_hash": digest}
    meta["regraft"] = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
    if dialect == "lora-x":
        meta["regraft.format"] = LORA_X_FORMAT
    if dialect == "kohya" or any(k.startswith("ss_") for k in kept):
        ranks = Counter(u.rank for u in adapter.updates.values())
        scales = Counter(_text(_alpha(u)) for u in adapter.updates.values())
        meta["ss_network_module"] = kept.get("ss_network_module", "networks.lora")
        meta["ss_network_dim"] = str(ranks.most_common(1)[0][0])
        meta["ss_network_alpha"] = scales.most_common(1)[0][0]
        meta["ss_sd_model_name"] = target.name
        if found:
            meta["ss_base_model_version"] = found.kohya
            meta["ss_v2"] = str(found.kohya.startswith("sd_v2"))
    if found or any(k.startswith("modelspec.") for k in kept):
        meta.setdefault("modelspec.sai_model_spec", "1.0.0")
        meta.setdefault("modelspec.title", adapter.name)
        meta.setdefault(
            "modelspec.implementation", "https://github.com/Stability-AI/generative-models"
        )
        meta["modelspec.hash_sha256"] = f"0x{digest}"
        if found:
            meta["modelspec.architecture"] = f"{found.modelspec}/lora"
    return meta


def _alpha(update: Update) -> float:
    return update.rank * (update.scale if isinstance(update, LowRank) else 1.0)


def _text(number: float) -> str:
    return f"{number:g}" if number != int(number) else f"{number:.1f}"


def _yaml(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def model_card(adapter: Adapter, target: Base, provenance: Mapping[str, Any]) -> str:
    """A PEFT folder's README.md: what the hub shows, and where this adapter comes from."""
    source = provenance["source"]
    lines = [
        "---",
        f"base_model: {_yaml(target.name)}",
        "base_model_relation: adapter",
        "library_name: peft",
        "tags:",
        "- lora",
        "- regraft",
        "---",
        "",
        f"# {adapter.name} on {target.name}",
        "",
        f"Carried from `{source['name']}` to `{target.name}` with "
        f"[Regraft](https://pypi.org/project/regraft/) {provenance['versions']['regraft']}, "
        f"method `{provenance['method']}`. It was not trained on this base.",
        "",
        f"- Source adapter: `{adapter.name}`, sha256 `{provenance['adapter']['sha256']}`",
        f"- Source base: `{source['name']}`",
        f"- Sites carried: {len(adapter.updates)}",
        f"- Energy kept: {provenance['energy_kept']:.4f}",
    ]
    trigger = adapter.metadata.get("modelspec.trigger_phrase")
    if trigger:
        lines.append(f"- Trigger words: {' '.join(trigger.split())}")
    return "\n".join(lines) + "\n"
