"""Opening a base: hub id, pipeline folder, model folder (sharded or not), or single file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.adapters import Site
from regraft.bases.base import Base, Rows, Weight
from regraft.bases.native import to_canonical
from regraft.bases.native_tables import recognise
from regraft.bases.open_clip import is_open_clip, to_transformers
from regraft.bases.parameters import Parameters, parameters, tensors_of
from regraft.bases.single_file import denoiser, parts_of
from regraft.bases.unet_names import to_diffusers
from regraft.errors import MalformedFile, NotABase
from regraft.files import Located, locate
from regraft.files.select import COMPONENTS, weight_files

#: Language models whose hub checkpoints leave out the wrapper that their class puts in front.
_WRAPPERS = {"gpt2": "transformer.", "bloom": "transformer.", "gpt_neo": "transformer."}

Weights = dict[Site, Weight]
Configs = dict[str, dict[str, Any]]
#: Sites (without component) that one stored parameter holds, and which of its rows each is.
Named = list[tuple[Site, Rows]]


def open_base(ref: str | Path) -> Base:
    """Open a base without reading its weights.

    Parameters
    ----------
    ref : str or Path
        Hub id ``org/name[@revision]``, diffusers or transformers folder (sharded or not), or a
        single file (diffusers names or those of the original checkpoint).

    Returns
    -------
    Base

    Raises
    ------
    InputNotFound, HubUnavailable, PickleRefused, MalformedFile, NotABase
    """
    located = locate(ref)
    weights, configs = (_file if located.path.is_file() else _folder)(located)
    if not any(map(_is_matrix, weights.values())):
        raise NotABase(
            "It holds no weights an adapter could sit on.",
            file=located.path,
            fix="Give a diffusers or transformers folder, or a single .safetensors checkpoint.",
        )
    matrices = {s: w for s, w in weights.items() if _is_matrix(w)}
    others = {s: w for s, w in weights.items() if s not in matrices}
    return Base(
        located.ref, located.path, matrices, configs, others, located.repo, located.revision
    )


def _is_matrix(weight: Weight) -> bool:
    return weight.site.parameter == "weight" and len(weight.shape) >= 2


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise MalformedFile(f"Not valid JSON ({error}).", file=path) from error
    if not isinstance(config, dict):
        raise MalformedFile("Not a JSON object.", file=path)
    return config


def _component_of(config: Mapping[str, Any], modules: Iterable[str]) -> str:
    """What part of a pipeline a bare model is: "unet", "transformer" or "" (a language model)."""
    kind = str(config.get("_class_name", ""))
    if "UNet" in kind:
        return "unet"
    if "Transformer" in kind and "_diffusers_version" in config:
        return "transformer"
    return denoiser(modules)


def _wrapper(component: str, modules: set[str], config: Mapping[str, Any]) -> str:
    """What adapter files put in front of every module and this checkpoint leaves out."""
    wrapper = ""
    if component.startswith("text_encoder"):
        # transformers 5 leaves out CLIP's wrapper; adapter files keep it.
        clip = any(m.startswith("encoder.layers.") for m in modules)
        wrapper = "text_model." if clip and "embeddings.token_embedding" in modules else ""
    elif component == "":
        named = [str(n) for n in config.get("architectures") or []]
        bare = bool(named) and named[0].endswith("Model") and "LMHead" not in named[0]
        wrapper = "" if bare else _WRAPPERS.get(str(config.get("model_type")), "")
    return "" if any(m.startswith(wrapper) for m in modules if wrapper) else wrapper


def _named(component: str, native: Parameters, config: Mapping[str, Any]) -> dict[Site, Named]:
    """The sites of each stored parameter, under the names adapters use.

    A parameter that fuses several is several sites, each with its rows.
    """
    if any(is_open_clip(s) for s in native):
        return {s: to_transformers(s, w.shape) for s, w in native.items()}
    modules = {s.module for s in native}
    if component == "unet":
        names = to_diffusers(modules)
        return {s: [(replace(s, module=names.get(s.module, s.module)), ())] for s in native}
    known = recognise(modules) if component == "transformer" else None
    if known and known[1]:
        return to_canonical(known[0], {s: w.shape for s, w in native.items()})
    front = _wrapper(component, modules, config)
    plain = {s: "" if s.module.startswith("lm_head") else front for s in native}
    return {s: [(replace(s, module=front + s.module), ())] for s, front in plain.items()}


def _weights(component: str, native: Parameters, config: Mapping[str, Any]) -> Weights:
    weights: Weights = {}
    for stored, named in _named(component, native, config).items():
        weight = native[stored]
        for bare, rows in named:
            site = replace(bare, component=component)
            # A site cut out of a fused weight has no name of its own in the file.
            own = site.module if rows else weight.native
            shape = (sum(last - first for first, last in rows), *weight.shape[1:])
            weights[site] = replace(
                weight, site=site, rows=rows, native=own, shape=shape if rows else weight.shape
            )
    return weights


def _folder(located: Located) -> tuple[Weights, Configs]:
    folder = located.path
    weights: Weights = {}
    configs: Configs = {}
    parts = [c for c in COMPONENTS if (folder / c).is_dir()]
    for part in parts:
        configs[part] = _config(folder / part)
        native = parameters(tensors_of(weight_files(folder / part)))
        weights |= _weights(part, native, configs[part])
    if not parts:
        config = _config(folder)
        native = parameters(tensors_of(weight_files(folder)))
        part = _component_of(config, {s.module for s in native})
        weights, configs[part] = _weights(part, native, config), config
    return weights, configs


def _file(located: Located) -> tuple[Weights, Configs]:
    tensors = tensors_of([located.path])
    weights: Weights = {}
    known = parts_of(tensors)
    for prefix, part in known:
        weights |= _weights(part, parameters(tensors, prefix), {})
    if not known:
        native = parameters(tensors)
        config: dict[str, Any] = {}
        if located.path.stem in ("model", "diffusion_pytorch_model"):
            config = _config(located.path.parent)  # the one file of a model's folder
        part = _component_of(config, {s.module for s in native})
        weights = _weights(part, native, config)
        return weights, {part: config} if config else {}
    return weights, {}
