"""Opening a base: hub id, pipeline folder, model folder (sharded or not), or single file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.adapters import Site
from regraft.bases.base import Base, Weight
from regraft.bases.open_clip import is_open_clip, to_transformers
from regraft.bases.unet_names import to_diffusers
from regraft.errors import MalformedFile, NotABase
from regraft.files import Located, TensorFile, locate
from regraft.files.select import COMPONENTS, weight_files

#: Where single-file checkpoints keep their parts.
_SINGLE_FILE_PARTS = (
    ("model.diffusion_model.", "unet"),
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("cond_stage_model.model.", "text_encoder"),
    ("first_stage_model.", "vae"),
)
_ADAPTER_MARKS = (
    ".lora_",
    "lora.up.",
    "lora.down.",
    "lora_unet_",
    "lora_te",
    "lycoris_",
    ".hada_",
    ".lokr_",
    ".dora_scale",
)
#: Tensors beside a weight that mean: the weight alone is not the number it stands for.
_QUANTISED_MARKS = (
    ".absmax",
    ".quant_map",
    ".SCB",
    ".qweight",
    ".weight_scale",
    ".scale_weight",
    ".weight_scale_inv",
    ".weight_packed",
)
#: Language models whose hub checkpoints leave out the wrapper that their class puts in front.
_WRAPPERS = {"gpt2": "transformer.", "bloom": "transformer.", "gpt_neo": "transformer."}

Modules = dict[str, Weight]


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
    weights, configs = (_file if located.path.is_file() else _folder)(located)
    if not weights:
        raise NotABase(
            "It holds no weights an adapter could sit on.",
            file=located.path,
            fix="Give a diffusers or transformers folder, or a single .safetensors checkpoint.",
        )
    return Base(located.ref, located.path, weights, configs, located.repo, located.revision)


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


def _tensors(files: Iterable[Path]) -> dict[str, TensorFile]:
    """tensor name → the file that holds it.

    Raises
    ------
    MalformedFile
        Two shards hold the same tensor.
    NotABase
        It is an adapter, or quantised.
    """
    found: dict[str, TensorFile] = {}
    for path in files:
        file = TensorFile(path)
        for tensor, info in file.items():
            if tensor in found:
                raise MalformedFile(
                    f"The tensor is in {found[tensor].path.name} as well.", file=path, tensor=tensor
                )
            found[tensor] = file
            dotted = f".{tensor}"
            if any(mark in dotted for mark in _ADAPTER_MARKS):
                raise NotABase(
                    "This is an adapter, not a base model.",
                    file=path,
                    tensor=tensor,
                    fix="--from and --to take the models; the adapter is the first argument.",
                )
            whole = tensor.endswith(".weight") and len(info.shape) >= 2
            if (whole and not info.dtype.is_floating_point) or any(
                mark in tensor for mark in _QUANTISED_MARKS
            ):
                raise NotABase(
                    "This checkpoint is quantised; quantised bases are not read yet.",
                    file=path,
                    tensor=tensor,
                    fix="Give the 16-bit or 32-bit checkpoint it was made from.",
                )
    return found


def _modules(tensors: Mapping[str, TensorFile], inside: str = "") -> Modules:
    """Module name as the file has it → its weight (two or more dimensions), without ``inside``."""
    found: Modules = {}
    own = {t.removeprefix(inside): (t, f) for t, f in tensors.items() if t.startswith(inside)}
    open_clip = any(map(is_open_clip, own))
    for name, (tensor, file) in own.items():
        info = file[tensor]
        if open_clip:
            native = name.removesuffix(".weight")
            for module, rows in to_transformers(name, info.shape):
                part = tensor if rows is None else file.rows_of(tensor, *rows)
                found[module] = _weight(module, file, part, module if rows else native)
        elif name.endswith(".weight") and len(info.shape) >= 2:
            module = name.removesuffix(".weight")
            found[module] = _weight(module, file, tensor, module)
    return found


def _weight(module: str, file: TensorFile, tensor: str, native: str) -> Weight:
    info = file[tensor]
    return Weight(Site("", module), info.shape, info.dtype, file, tensor, native)


def _component_of(config: Mapping[str, Any], modules: Iterable[str]) -> str:
    """What part of a pipeline a bare model is: "unet", "transformer" or "" (a language model)."""
    kind = str(config.get("_class_name", ""))
    if "UNet" in kind:
        return "unet"
    if "Transformer" in kind and "_diffusers_version" in config:
        return "transformer"
    if any(m.startswith(("down_blocks.", "input_blocks.")) for m in modules):
        return "unet"
    return ""


def _canonical(component: str, modules: Modules, config: Mapping[str, Any]) -> dict[str, str]:
    """Module name as the file has it → the name adapters use, where they differ."""
    if component == "unet":
        return to_diffusers(modules)
    wrapper = ""
    if component.startswith("text_encoder"):
        # transformers 5 leaves out CLIP's wrapper; adapter files keep it.
        clip = any(m.startswith("encoder.layers.") for m in modules)
        wrapper = "text_model." if clip and "embeddings.token_embedding" in modules else ""
    elif component == "":
        named = [str(n) for n in config.get("architectures") or []]
        bare = bool(named) and named[0].endswith("Model") and "LMHead" not in named[0]
        wrapper = "" if bare else _WRAPPERS.get(str(config.get("model_type")), "")
    if not wrapper or any(m.startswith(wrapper) for m in modules):
        return {}
    return {m: wrapper + m for m in modules if not m.startswith("lm_head")}


def _weights(component: str, modules: Modules, config: Mapping[str, Any]) -> dict[Site, Weight]:
    names = _canonical(component, modules, config)
    weights = {}
    for native, weight in modules.items():
        site = Site(component, names.get(native, native))
        weights[site] = replace(weight, site=site)
    return weights


def _folder(located: Located) -> tuple[dict[Site, Weight], dict[str, dict[str, Any]]]:
    folder = located.path
    weights: dict[Site, Weight] = {}
    configs: dict[str, dict[str, Any]] = {}
    parts = [c for c in COMPONENTS if (folder / c).is_dir()]
    for part in parts:
        configs[part] = _config(folder / part)
        modules = _modules(_tensors(weight_files(folder / part)))
        weights |= _weights(part, modules, configs[part])
    if not parts:
        config = _config(folder)
        modules = _modules(_tensors(weight_files(folder)))
        part = _component_of(config, modules)
        weights, configs[part] = _weights(part, modules, config), config
    return weights, configs


def _file(located: Located) -> tuple[dict[Site, Weight], dict[str, dict[str, Any]]]:
    tensors = _tensors([located.path])
    weights: dict[Site, Weight] = {}
    known = [(p, c) for p, c in _SINGLE_FILE_PARTS if any(t.startswith(p) for t in tensors)]
    for prefix, part in known:
        if part != "vae":
            weights |= _weights(part, _modules(tensors, prefix), {})
    if not known:
        modules = _modules(tensors)
        config: dict[str, Any] = {}
        if located.path.stem in ("model", "diffusion_pytorch_model"):
            config = _config(located.path.parent)  # the one file of a model's folder
        part = _component_of(config, modules)
        weights = _weights(part, modules, config)
        return weights, {part: config} if config else {}
    return weights, {}
