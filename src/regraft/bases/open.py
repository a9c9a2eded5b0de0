"""Opening a base: hub id, pipeline folder, model folder (sharded or not), or single file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regraft.adapters import Site
from regraft.bases.base import Base, Weight
from regraft.bases.unet_names import to_diffusers
from regraft.errors import MalformedFile, NotABase
from regraft.files import Located, TensorFile, locate
from regraft.files.locate import COMPONENTS, weight_files

#: Where single-file checkpoints keep their parts. Order matters: longest prefix first.
_SINGLE_FILE_PARTS = (
    ("model.diffusion_model.", "unet"),
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("cond_stage_model.model.", "text_encoder"),
    ("first_stage_model.", "vae"),
)
_ADAPTER_MARKS = (".lora_", ".lora.", "lora_unet_", "lora_te", ".hada_", ".lokr_", ".dora_scale")


def open_base(ref: str | Path) -> Base:
    """Open a base without reading its weights.

    Parameters
    ----------
    ref : str or Path
        Hub id ``org/name[@revision]``, diffusers or transformers folder (sharded or not), or a
        single ``.safetensors`` file (diffusers names or the original names of SD 1.x, 2.x, SDXL).

    Returns
    -------
    Base

    Raises
    ------
    InputNotFound, HubUnavailable, PickleRefused, MalformedFile, NotABase
    """
    located = locate(ref)
    if located.path.is_file():
        return _single_file(located)
    return _folder(located)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise MalformedFile(f"Not valid JSON ({error}).", file=path) from error
    return config if isinstance(config, dict) else {}


def _modules(files: Iterable[Path]) -> dict[str, tuple[TensorFile, str]]:
    """module name → (file, tensor name), for every ``.weight`` of two or more dimensions."""
    found: dict[str, tuple[TensorFile, str]] = {}
    for path in files:
        file = TensorFile(path)
        for tensor, info in file.items():
            if tensor.endswith(".weight") and len(info.shape) >= 2:
                found[tensor.removesuffix(".weight")] = (file, tensor)
    return found


def _component_of(config: dict[str, Any], modules: Iterable[str]) -> str:
    """What part of a pipeline a bare model is: "unet", "transformer" or "" (a language model)."""
    kind = str(config.get("_class_name", ""))
    if "UNet" in kind:
        return "unet"
    if "Transformer" in kind and "_diffusers_version" in config:
        return "transformer"
    if any(m.startswith(("down_blocks.", "input_blocks.")) for m in modules):
        return "unet"
    return ""


def _weights(component: str, modules: dict[str, tuple[TensorFile, str]]) -> dict[Site, Weight]:
    canonical = to_diffusers(modules) if component == "unet" else {}
    weights = {}
    for native, (file, tensor) in modules.items():
        site = Site(component, canonical.get(native, native))
        info = file[tensor]
        weights[site] = Weight(site, info.shape, info.dtype, file, tensor, native)
    return weights


def _folder(located: Located) -> Base:
    folder = located.path
    weights: dict[Site, Weight] = {}
    configs: dict[str, dict[str, Any]] = {}
    parts = [c for c in COMPONENTS if (folder / c).is_dir()]
    if parts:
        for part in parts:
            weights |= _weights(part, _modules(weight_files(folder / part)))
            configs[part] = _config(folder / part)
    else:
        config = _config(folder)
        files = weight_files(folder)
        modules = _modules(files)
        _refuse_adapter(folder, modules)
        part = _component_of(config, modules)
        weights = _weights(part, modules)
        configs[part] = config
    if not weights:
        raise NotABase(
            "The folder holds no safetensors weights.",
            file=folder,
            fix="Give a diffusers or transformers folder, or a single .safetensors checkpoint.",
        )
    return Base(located.ref, folder, weights, configs, located.repo, located.revision)


def _refuse_adapter(path: Path, modules: Iterable[str]) -> None:
    if any(mark in f".{m}." for m in modules for mark in _ADAPTER_MARKS):
        raise NotABase(
            "This is an adapter, not a base model.",
            file=path,
            fix="--from and --to take the models; the adapter is the first argument.",
        )


def _single_file(located: Located) -> Base:
    file = TensorFile(located.path)
    modules = {
        t.removesuffix(".weight"): (file, t)
        for t, info in file.items()
        if t.endswith(".weight") and len(info.shape) >= 2
    }
    _refuse_adapter(located.path, modules)
    by_part: dict[str, dict[str, tuple[TensorFile, str]]] = {}
    for name, place in modules.items():
        for prefix, part in _SINGLE_FILE_PARTS:
            if name.startswith(prefix):
                by_part.setdefault(part, {})[name.removeprefix(prefix)] = place
                break
    if not by_part:
        by_part = {_component_of({}, modules): modules}
    by_part.pop("vae", None)
    weights = {s: w for part, group in by_part.items() for s, w in _weights(part, group).items()}
    if not weights:
        raise NotABase(
            "The file holds no weights an adapter could sit on.",
            file=located.path,
            fix="Give the model itself (a U-Net, a transformer, or a whole checkpoint).",
        )
    return Base(located.ref, located.path, weights, {}, located.repo, located.revision)
