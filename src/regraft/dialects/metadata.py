"""Metadata of the output: what users' tools read, what the input said, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from regraft.adapters import Adapter, LowRank
from regraft.bases import Base, architecture
from regraft.bases.quantised.cost import TRAINED_ON
from regraft.dialects.names import LORA_X_FORMAT
from regraft.dialects.writers.factors import alpha_of
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
_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
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


def surviving(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of an input's metadata is still true of an output."""
    return {k: v for k, v in metadata.items() if k not in _DROPPED}


def file_metadata(
    task: Task, dialect: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]
) -> dict[str, str]:
    """The ``__metadata__`` of the output file.

    The input's metadata survive (trigger words, tags, training settings) except what describes its
    own bytes, its own base, or a form it no longer has. Values are text, as the format demands.
    """
    kept = surviving(task.adapter.metadata)
    if provenance.get("operation") == "transfer":
        kept.pop(TRAINED_ON, None)  # it spoke of the source base
    digest = data_sha256(tensors)
    found = architecture(task.target)
    meta = {**kept, "format": "pt", "sshs_model_hash": digest}
    meta["regraft"] = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
    if dialect == "lora-x":
        meta["regraft.format"] = LORA_X_FORMAT
    if dialect == "kohya" or any(k.startswith("ss_") for k in kept):
        meta = {k: v for k, v in meta.items() if k not in _NETWORK}
        meta |= _network(task, dialect, kept.get("ss_network_args", ""), tensors)
        meta["ss_sd_model_name"] = task.target.name
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


def _network(task: Task, dialect: str, said: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """kohya's words for the file as it is; what it has no word for is left out."""
    ranks = _ranks(tensors)
    whole = any(key.endswith(_WHOLE) for key in tensors)
    module = _LYCORIS if whole else NETWORK_MODULES.get(model_of(task.target), "")
    dim = alpha = ""
    if len(set(ranks.values())) == 1:
        rank = next(iter(ranks.values()))
        dim, alpha = str(rank), _text(_alpha(task, dialect, tensors, rank))
    elif ranks:
        # As sd-scripts' resize_lora.py says of ranks that differ.
        dim = alpha = "Dynamic"
    arguments = _training_arguments(said)
    if module == _LYCORIS:
        # LyCORIS calls a whole change "full"; what has factors too is one of its LoCon files.
        arguments["algo"] = "lora" if ranks else "full"
    if dim != "Dynamic" and any(max(tensors[k].shape[2:], default=1) > 1 for k in ranks):
        arguments |= {"conv_dim": dim, "conv_alpha": alpha}
    words = {
        "ss_network_module": module,
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments, sort_keys=True) if arguments else "",
    }
    return {key: value for key, value in words.items() if value}


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Key of the first factor → rank."""
    firsts = (".lora_down.weight", ".lora_A.weight", ".lora_embedding_A", ".lora_x_S")
    return {key: t.shape[0] for key, t in tensors.items() if key.endswith(firsts)}


def _alpha(task: Task, dialect: str, tensors: Mapping[str, Tensor], rank: int) -> float:
    """The alpha of a file with one rank; where the scale is in the factors it is the rank."""
    alphas = {float(t) for key, t in tensors.items() if key.endswith(".alpha")}
    if dialect == "peft":
        updates = task.adapter.updates.values()
        alphas = {alpha_of(u) for u in updates if isinstance(u, LowRank)}
    return alphas.pop() if len(alphas) == 1 else float(rank)


def _training_arguments(said: str) -> dict[str, Any]:
    """The input's network arguments without those that describe the form it had."""
    try:
        arguments = json.loads(said) if said else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(arguments, dict):
        return {}
    return {k: v for k, v in arguments.items() if k.startswith(_TRAINING_ARGS)}


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
