"""Writing an insert as the PEFT folder that ``PeftModel.from_pretrained`` loads on the target."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.bases import Base
from regraft.dialects.metadata import surviving
from regraft.dialects.write import PEFT_FILES, Written, check_range
from regraft.files import atomic_folder, data_sha256, serialize
from regraft.inserts.insert import InsertAdapter, KeysValues, Prompt
from regraft.inserts.places import attentions
from regraft.inserts.tables import of_one_width, prefix_table
from regraft.tuners.bottleneck.parts import Bottleneck, to_tensors
from regraft.tuners.config import exactly

_TABLE = "prompt_embeddings"
#: Settings of the input that stay true of a prompt or a prefix on another base.
_KEPT = ("task_type", "auto_mapping")
#: Settings of bottlenecks that name what was trained, not what is written.
_ELSEWHERE = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save")


def write_insert(
    adapter: InsertAdapter,
    target: Base,
    out: Path,
    *,
    dtype: torch.dtype,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> Written:
    """Write an insert that is on the target's sites; the folder appears whole, or not at all.

    Parameters
    ----------
    adapter : InsertAdapter
        A prefix has a part at every attention of the target.
    target : Base
    out : Path
    dtype : torch.dtype
        Of the stored numbers.
    provenance : mapping
        How it was made; stored as one JSON value under ``regraft``.
    overwrite : bool

    Raises
    ------
    OutputFailed
        The dtype cannot hold it, or the system refused to write.
    OutputExists
    """
    tensors, own = _form(adapter, target)
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    check_range(stored, dtype, out)
    config = {
        **own,
        "base_model_name_or_path": target.name,
        "revision": target.revision,
        "inference_mode": True,
    }
    metadata = {
        **surviving(adapter.metadata),
        "format": "pt",
        "sshs_model_hash": data_sha256(stored),
        "regraft": json.dumps(provenance, sort_keys=True, ensure_ascii=False),
    }
    with atomic_folder(out, overwrite=overwrite, replaceable=PEFT_FILES) as folder:
        sha = serialize(folder / "adapter_model.safetensors", stored, metadata)
        settings = json.dumps(config, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(settings + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(adapter, target, provenance), encoding="utf-8")
    return Written(out, sha)


def _form(adapter: InsertAdapter, target: Base) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings of the family."""
    if adapter.family == "bottleneck":
        return _bottlenecks(adapter)
    here = attentions(target)
    settings: dict[str, Any] = {
        **{name: adapter.config.get(name) for name in _KEPT},
        "num_transformer_submodules": 1,
        "num_layers": len(here.modules),
        "modules_to_save": None,
    }
    settings["task_type"] = settings["task_type"] or "CAUSAL_LM"
    if adapter.family == "prompt":
        (part,) = adapter.parts.values()
        assert isinstance(part, Prompt)
        tokens, width = part.vectors.shape
        settings |= {
            "peft_type": "PROMPT_TUNING",
            "num_attention_heads": here.heads or 1,
            "prompt_tuning_init": "RANDOM",
            "num_virtual_tokens": tokens,
            "token_dim": width,
        }
        return {_TABLE: part.vectors}, settings
    parts = [part for part in adapter.parts.values() if isinstance(part, KeysValues)]
    heads, tokens, each = parts[0].keys.shape
    settings |= {
        "peft_type": "PREFIX_TUNING",
        "num_attention_heads": heads,
        "prefix_projection": False,
        "encoder_hidden_size": heads * each,
        "num_virtual_tokens": tokens,
        "token_dim": heads * each,
    }
    return {_TABLE: prefix_table(parts)}, settings


def _bottlenecks(adapter: InsertAdapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    named = {s.module: p for s, p in adapter.parts.items() if isinstance(p, Bottleneck)}
    held = of_one_width(named)
    settings = dict(adapter.config) | dict.fromkeys(_ELSEWHERE) | {"base_hashes": {}}
    settings |= {
        "peft_type": "BOTTLENECK",
        "target_modules": exactly(held),
        "width": len(next(iter(held.values())).down),
        "reduction": None,
    }
    return to_tensors(held), settings


def _card(adapter: InsertAdapter, target: Base, provenance: Mapping[str, Any]) -> str:
    """README.md: what the hub shows, and where this adapter comes from."""
    source = (provenance.get("source") or {}).get("name", "")
    version = (provenance.get("versions") or {}).get("regraft", "")
    how = f"[Regraft](https://pypi.org/project/regraft/) {version}".strip()
    sha = (provenance.get("adapter") or {}).get("sha256", adapter.sha256)
    what = {"prompt": "prompt vectors", "prefix": "prefix", "bottleneck": "bottlenecks"}
    loading = ["", "Before it is loaded: `import regraft.tuners`."]
    lines = [
        "---",
        f"base_model: {json.dumps(target.name, ensure_ascii=False)}",
        "base_model_relation: adapter",
        "library_name: peft",
        "tags:",
        f"- {adapter.family}",
        "- regraft",
        "---",
        "",
        f"# {adapter.name} on {target.name}",
        "",
        f"Carried from `{source}` to `{target.name}` with {how}, method "
        f"`{provenance.get('method', '')}`. It was not trained on this base.",
        *(loading if adapter.family == "bottleneck" else []),
        "",
        f"- Source adapter: `{adapter.name}` ({what[adapter.family]}), sha256 `{sha}`",
        f"- Source base: `{source}`",
        f"- Sites carried: {len(adapter.parts)}",
    ]
    if "energy_kept" in provenance:
        lines.append(f"- Energy kept: {provenance['energy_kept']:.4f}")
    return "\n".join(lines) + "\n"
