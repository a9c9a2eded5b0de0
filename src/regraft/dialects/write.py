"""Writing an adapter: one writer per dialect, each right at strength 1.0.

* kohya: every module has its alpha, the same in the whole file; the rest of its scale is folded
  into ``lora_up``.
* PEFT: ``lora_alpha`` and ``alpha_pattern`` carry the scale.
* diffusers: readers outside diffusers ignore its metadata, so the scale is folded into ``lora_B``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.adapters import Adapter, LowRank, Site, Spectral, Update
from regraft.adapters.algebra import svd_of_product
from regraft.bases import Base
from regraft.bases.unet_names import to_ldm
from regraft.dialects.keys import PEFT_PREFIX
from regraft.dialects.metadata import file_metadata, model_card
from regraft.dialects.names import DIALECTS, flatten
from regraft.errors import BadOption, OutputFailed
from regraft.files import atomic_file, atomic_folder, serialize
from regraft.files.finite import is_finite

Tensors = dict[str, Tensor]
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@dataclass(frozen=True)
class Written:
    """What was written: the path, and the SHA-256 of the weights file."""

    path: Path
    sha256: str


def write_adapter(
    adapter: Adapter,
    target: Base,
    out: Path,
    *,
    dialect: str,
    dtype: torch.dtype,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> Written:
    """Write ``adapter`` (already on the target's sites) atomically, the same bytes every time.

    Parameters
    ----------
    adapter : Adapter
        On the target's sites.
    target : Base
        Gives names and shapes.
    out : Path
        A file, or for "peft" a folder.
    dialect : str
        One of :data:`regraft.dialects.DIALECTS`.
    dtype : torch.dtype
        Of the stored factors.
    provenance : mapping
        How the adapter was made; stored as one JSON value under ``regraft``.

    Raises
    ------
    BadOption
        The dialect is unknown or cannot hold this adapter.
    OutputExists, OutputFailed
    """
    makers: dict[str, Callable[[Adapter, Base, torch.dtype], Tensors]] = {
        "kohya": _kohya,
        "diffusers": _diffusers,
        "peft": _peft,
        "lora-x": _lora_x,
    }
    if dialect not in makers:
        raise BadOption(f"No dialect {dialect!r}.", fix=f"Choose one of {', '.join(DIALECTS)}.")
    if dialect == "peft":
        _one_component(adapter)
    tensors = makers[dialect](adapter, target, dtype)
    _check_range(tensors, dtype, out)
    metadata = file_metadata(adapter, target, dialect, tensors, provenance)
    if dialect == "peft":
        with atomic_folder(out, overwrite=overwrite, replaceable=PEFT_FILES) as folder:
            sha = serialize(folder / "adapter_model.safetensors", tensors, metadata)
            config = json.dumps(_peft_config(adapter, target), indent=2, sort_keys=True)
            (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
            card = model_card(adapter, target, provenance)
            (folder / "README.md").write_text(card, encoding="utf-8")
        return Written(out, sha)
    with atomic_file(out, overwrite=overwrite) as temporary:
        sha = serialize(temporary, tensors, metadata)
    return Written(out, sha)


def low_rank(update: Update) -> LowRank:
    """The update as a plain LoRA."""
    return update.low_rank()


def _check_range(tensors: Tensors, dtype: torch.dtype, out: Path) -> None:
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise OutputFailed(
                f"A factor does not fit {str(dtype).removeprefix('torch.')}.",
                file=out,
                tensor=name,
                fix="Write it with --dtype bf16 or fp32.",
            )


def _pair(update: LowRank) -> tuple[Tensor, Tensor]:
    """(A, B) in the shape files use for this layout, before any cast."""
    if len(update.shape) > 2:
        # Whatever the source was: a linear update may have come to a 1×1 convolution.
        ones = [1] * (len(update.shape) - 2)
        a = update.down.reshape(update.rank, *update.shape[1:])
        return a, update.up.reshape(*update.up.shape, *ones)
    if update.layout in ("transposed", "embedding"):
        return update.up.mT.contiguous(), update.down.mT.contiguous()
    return update.down, update.up


def kohya_names(adapter: Adapter, target: Base) -> dict[Site, str]:
    """The kohya module name of each site.

    Raises
    ------
    BadOption
        The target is not a diffusion model: kohya has no names for its modules.
    """
    many = "text_encoder_2" in target.components
    prefixes = {
        "unet": "lora_unet_",
        "transformer": "lora_unet_",
        "text_encoder": "lora_te1_" if many else "lora_te_",
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
    }
    ldm: dict[str, str] = {}
    # SDXL's readers expect the original block names; for SD 1.x and 2.x they expect diffusers',
    # whatever the input used.
    if any(s.module.startswith("add_embedding.") for s in target.weights):
        ldm = to_ldm(s.module for s in target.weights if s.component == "unet")
    names = {}
    for site in adapter.updates:
        if site.component not in prefixes:
            raise BadOption(
                "kohya files have no names for this kind of base.",
                fix="Write it with --dialect peft.",
            )
        module = ldm.get(site.module, site.module) if site.component == "unet" else site.module
        names[site] = prefixes[site.component] + flatten(module)
    return names


def _kohya(adapter: Adapter, target: Base, dtype: torch.dtype) -> Tensors:
    plain = {s: low_rank(u) for s, u in adapter.updates.items()}
    # diffusers loses the alpha of attention layers unless the whole file has the same one.
    alphas = Counter(u.scale * u.rank for u in plain.values() if u.scale)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    tensors: Tensors = {}
    for site, name in kohya_names(adapter, target).items():
        update = plain[site]
        if update.layout in ("transposed", "embedding"):
            raise BadOption(f"kohya files cannot hold {site}.", fix="Write it with --dialect peft.")
        down, up = _pair(update)
        own = update.scale * update.rank
        tensors[f"{name}.lora_down.weight"] = down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = (
            up.to(dtype) if own == alpha else (up.float() * (own / alpha)).to(dtype)
        )
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def _ab_keys(module: str, layout: str) -> tuple[str, str]:
    if layout == "embedding":
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _diffusers(adapter: Adapter, target: Base, dtype: torch.dtype) -> Tensors:
    bare = adapter.dialect == "diffusers" and not adapter.prefixed
    bare = bare and len({s.component for s in adapter.updates}) == 1
    tensors: Tensors = {}
    for site, update in adapter.updates.items():
        plain = low_rank(update)
        a, b = _pair(plain)
        key_a, key_b = _ab_keys(site.module if bare else str(site), plain.layout)
        tensors[key_a] = a.to(dtype)
        tensors[key_b] = (b.float() * plain.scale).to(dtype) if plain.scale != 1 else b.to(dtype)
    return tensors


def _one_component(adapter: Adapter) -> None:
    components = {s.component for s in adapter.updates}
    if len(components) > 1:
        raise BadOption(
            f"A PEFT folder holds one model; this adapter changes {', '.join(sorted(components))}.",
            fix="Write it with --dialect diffusers or kohya.",
        )


def _peft(adapter: Adapter, target: Base, dtype: torch.dtype) -> Tensors:
    tensors: Tensors = {}
    for site, update in adapter.updates.items():
        plain = low_rank(update)
        a, b = _pair(plain)
        key_a, key_b = _ab_keys(PEFT_PREFIX + site.module, plain.layout)
        tensors[key_a], tensors[key_b] = a.to(dtype), b.to(dtype)
    return tensors


#: Settings of the input's config that stay true on another base.
_KEPT = ("task_type", "lora_dropout", "auto_mapping")


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _key(module: str, modules: Iterable[str]) -> str:
    """The pattern key of a module; PEFT lets a key match the end of a longer name, too."""
    longer = any(other.endswith(f".{module}") for other in modules)
    return f"^{re.escape(module)}" if longer else module


def _peft_config(adapter: Adapter, target: Base) -> dict[str, Any]:
    plain = {s.module: low_rank(u) for s, u in sorted(adapter.updates.items())}
    rank, alpha = Counter((u.rank, u.scale * u.rank) for u in plain.values()).most_common(1)[0][0]
    others = [s.module for s in target.weights if s.module not in plain]
    # PEFT takes a name in the list for the end of any module's name; where that would catch more
    # than is meant, a regular expression says it exactly.
    exact = not any(o.endswith(f".{m}") for m in plain for o in others)
    modules = sorted(plain) if exact else "|".join(re.escape(m) for m in sorted(plain))
    kept = {k: adapter.config[k] for k in _KEPT if adapter.config.get(k) is not None}
    return {
        "task_type": None,
        "lora_dropout": 0.0,
        **kept,
        "peft_type": "LORA",
        "base_model_name_or_path": target.name,
        "revision": target.revision,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_key(m, plain): u.rank for m, u in plain.items() if u.rank != rank},
        "alpha_pattern": {
            _key(m, plain): _number(u.scale * u.rank)
            for m, u in plain.items()
            if u.scale * u.rank != alpha
        },
        "target_modules": modules,
        "fan_in_fan_out": any(u.layout == "transposed" for u in plain.values()),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def spectral(update: Update) -> Spectral:
    """The update as U ΔΣ Vᵀ: its own singular bases and a diagonal core. Exact."""
    if isinstance(update, Spectral):
        return update
    u, s, vh = svd_of_product(*update.factors())
    return Spectral(u, s, vh.mT.contiguous(), update.shape, update.layout)


def _lora_x(adapter: Adapter, target: Base, dtype: torch.dtype) -> Tensors:
    tensors: Tensors = {}
    for site, update in adapter.updates.items():
        if update.layout in ("transposed", "embedding"):
            raise BadOption(
                f"LoRA-X files cannot hold {site}.", fix="Write it with --dialect peft."
            )
        form = spectral(update)
        parts = {"U": form.u, "S": form.core, "V": form.v}
        # The core stays fp32: it is small, and U and V fix its meaning.
        for letter, tensor in parts.items():
            kind = torch.float32 if letter == "S" else dtype
            tensors[f"{site}.lora_x_{letter}"] = tensor.to(kind)
    return tensors
