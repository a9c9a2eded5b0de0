"""Metadata of the output: what users' tools read, what the input said, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regraft.adapters import Adapter
from regraft.bases import Base, architecture
from regraft.dialects.names import LORA_X_FORMAT
from regraft.dialects.writers.naming import model_of
from regraft.dialects.writers.registry import Task
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
#: Model → the module of sd-scripts or musubi-tuner that reads its kohya files.
NETWORK_MODULES = {
    "sd": "networks.lora",
    "sdxl": "networks.lora",
    "flux": "networks.lora_flux",
    "chroma": "networks.lora_flux",
    "sd3": "networks.lora_sd3",
    "lumina-2": "networks.lora_lumina",
    "hunyuan-video": "networks.lora",
    "framepack": "networks.lora_framepack",
    "wan": "networks.lora_wan",
    "flux-2": "networks.lora_flux_2",
    "qwen-image": "networks.lora_qwen_image",
    "z-image": "networks.lora_zimage",
}
#: LyCORIS reads whole changes and normalisations, which sd-scripts' own modules do not.
_LYCORIS = "lycoris.kohya"
_WHOLE = (".diff", ".diff_b", ".w_norm", ".b_norm")
#: Network arguments that are about training alone, and stay true of any form of the result.
_TRAINING_ARGS = ("dropout", "rank_dropout", "module_dropout", "loraplus_")
_IMPLEMENTATIONS = {
    "flux": "https://github.com/black-forest-labs/flux",
    "chroma": "https://huggingface.co/lodestones/Chroma",
    "lumina-2": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
    "sd": "https://github.com/Stability-AI/generative-models",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}


def file_metadata(
    task: Task, dialect: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> dict[str, str]:
    """The ``__metadata__`` of the output file.

    The input's metadata survive (trigger words, tags, training settings) except what describes its
    own bytes, its own base, or a form it no longer has. Values are text, as the format demands.
    """
    kept = {k: v for k, v in task.adapter.metadata.items() if k not in _DROPPED}
    digest = data_sha256(tensors)
    found = architecture(task.target)
    meta = {**kept, "format": "pt", "sshs_model_hash": digest}
    meta["regraft"] = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
    if dialect == "lora-x":
        meta["regraft.format"] = LORA_X_FORMAT
    if dialect == "kohya" or any(k.startswith("ss_") for k in kept):
        meta |= _network(task, kept, tensors)
        for key in ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"):
            if not meta.get(key):
                meta.pop(key, None)
        if found and found.kohya:
            meta["ss_base_model_version"] = found.kohya
            meta["ss_v2"] = str(found.kohya.startswith("sd_v2"))
    if found or any(k.startswith("modelspec.") for k in kept):
        meta.setdefault("modelspec.sai_model_spec", "1.0.0")
        meta.setdefault("modelspec.title", task.adapter.name)
        implementation = _IMPLEMENTATIONS.get(model_of(task.target), "diffusers")
        if found:
            meta["modelspec.implementation"] = implementation
        meta.setdefault("modelspec.implementation", implementation)
        meta["modelspec.hash_sha256"] = f"0x{digest}"
        if found and found.modelspec:
            meta["modelspec.architecture"] = f"{found.modelspec}/lora"
    return meta


def _network(
    task: Task, kept: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """kohya's words for the file as it is; an empty text stands for a key that is left out."""
    ranks = _ranks(tensors)
    whole = any(key.endswith(_WHOLE) for key in tensors)
    module = _LYCORIS if whole else NETWORK_MODULES.get(model_of(task.target), "")
    said = {"ss_network_module": module, "ss_sd_model_name": task.target.name}
    alphas = {float(t) for key, t in tensors.items() if key.endswith(".alpha")}
    if len(set(ranks.values())) == 1:
        rank = next(iter(ranks.values()))
        said["ss_network_dim"] = str(rank)
        said["ss_network_alpha"] = _text(alphas.pop() if alphas else float(rank))
    elif ranks:
        # As sd-scripts' resize_lora.py says of ranks that differ.
        said["ss_network_dim"] = said["ss_network_alpha"] = "Dynamic"
    else:
        said["ss_network_dim"] = said["ss_network_alpha"] = ""
    said["ss_network_args"] = _arguments(kept.get("ss_network_args", ""), ranks, tensors, said)
    return said


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Key of the first factor → rank."""
    firsts = (".lora_down.weight", ".lora_A.weight", ".lora_embedding_A", ".lora_x_S")
    return {key: t.shape[0] for key, t in tensors.items() if key.endswith(firsts)}


def _arguments(
    said: str, ranks: Mapping[str, int], tensors: Mapping[str, Tensor], network: Mapping[str, str]
) -> str:
    """The input's network arguments without those that describe the form it had."""
    try:
        arguments = json.loads(said) if said else {}
    except (ValueError, RecursionError):
        return ""
    if not isinstance(arguments, dict):
        return ""
    own = {k: v for k, v in arguments.items() if str(k).startswith(_TRAINING_ARGS)}
    if network["ss_network_module"] == _LYCORIS:
        # LyCORIS calls a whole change "full"; what has factors too is one of its LoCon files.
        own["algo"] = "lora" if ranks else "full"
    convolutions = {rank for key, rank in ranks.items() if tensors[key].ndim > 2 and _wide(key, tensors)}
    if len(convolutions) == 1 and network["ss_network_dim"] != "Dynamic":
        own["conv_dim"] = network["ss_network_dim"]
        own["conv_alpha"] = network["ss_network_alpha"]
    return json.dumps(own, sort_keys=True, ensure_ascii=False) if own else ""


def _wide(key: str, tensors: Mapping[str, Tensor]) -> bool:
    return max(tensors[key].shape[2:], default=1) > 1


def _text(number: float) -> str:
    return f"{number:g}" if number != int(number) else f"{number:.1f}"


def _yaml(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def model_card(adapter: Adapter, target: Base, provenance: Mapping[str, Any]) -> str:
    """A PEFT folder's README.md: what the hub shows, and where this adapter comes from."""
    source = provenance.get("source") or {}
    version = (provenance.get("versions") or {}).get("regraft", "")
    regraft = f"[Regraft](https://pypi.org/project/regraft/) {version}".strip()
    sha = (provenance.get("adapter") or {}).get("sha256", adapter.sha256)
    if source:
        title = f"{adapter.name} on {target.name}"
        story = (
            f"Carried from `{source['name']}` to `{target.name}` with {regraft}, "
            f"method `{provenance.get('method', '')}`. It was not trained on this base."
        )
    else:
        title = adapter.name
        story = f"The adapter `{adapter.name}` of `{target.name}` as plain LoRA, by {regraft}."
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
        f"# {title}",
        "",
        story,
        "",
        f"- Source adapter: `{adapter.name}`, sha256 `{sha}`",
        *([f"- Source base: `{source['name']}`"] if source else []),
        f"- Sites {'carried' if source else 'held'}: {len(adapter.updates)}",
    ]
    if "energy_kept" in provenance:
        lines.append(f"- Energy kept: {provenance['energy_kept']:.4f}")
    trigger = adapter.metadata.get("modelspec.trigger_phrase")
    if trigger:
        lines.append(f"- Trigger words: {' '.join(trigger.split())}")
    return "\n".join(lines) + "\n"
