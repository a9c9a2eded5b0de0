"""Files: modules put together under a dialect's names, or saved by the library that writes them."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.wild.case import Made
from tests.wild.pieces import Layer, Maker, Tensors
from tests.wild.places import Place
from tests.wild.worlds import World, world

Make = Callable[[Path], Made]


def layer_at(place: Place) -> tuple[Layer, list[int]]:
    """The layer of a place, its sites put together, and how many rows each site has."""
    base = world(place.world)
    weights = [base.parameter(f"{site}.weight") for site in place.sites]
    biases: list[Tensor] = []
    for site in place.sites:
        try:
            biases.append(base.parameter(f"{site}.bias"))
        except KeyError:
            break
    bias = torch.cat(biases) if len(biases) == len(place.sites) else None
    return Layer("", torch.cat(weights), bias), [len(w) for w in weights]


def spread(change: Tensors, place: Place, rows: list[int]) -> Tensors:
    """A change of the whole, at each site's own rows."""
    wanted: Tensors = {}
    for parameter, value in change.items():
        for site, part in zip(place.sites, value.split(rows), strict=True):
            wanted[site if parameter == "weight" else f"{site}.bias"] = part
    return wanted


def filed(*places: Place, maker: Maker, metadata: dict[str, str] | None = None) -> Make:
    """One safetensors file with a module at each place."""

    def make(folder: Path) -> Made:
        tensors: Tensors = {}
        wanted: Tensors = {}
        meta = dict(metadata or {})
        for place in places:
            torch.manual_seed(crc32(place.name.encode()))
            layer, rows = layer_at(place)
            piece = maker(layer)
            tensors |= {place.name + end: t.contiguous() for end, t in piece.tensors.items()}
            wanted |= spread(piece.change, place, rows)
            meta |= piece.metadata or {}
        path = folder / "adapter.safetensors"
        save_file(tensors, path, meta)
        return Made(path, world(places[0].world).path, wanted)

    return make


def refused(tensors: dict[str, tuple[int, ...]], base: str, config: Any = None) -> Make:
    """A file of the given keys and shapes, beside a PEFT config if there is one."""

    def make(folder: Path) -> Made:
        state = {key: torch.ones(shape) for key, shape in tensors.items()}
        path = folder / "adapter_model.safetensors"
        save_file(state, path)
        if config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(config))
        return Made(folder if config is not None else path, world(base).path, {})

    return make


def _changes(before: nn.Module, after: nn.Module) -> Tensors:
    """What merging changed: the text of each site → its change."""
    state = before.state_dict()
    found = {}
    for name, value in after.state_dict().items():
        change = value.double() - state[name].double()
        if change.any():
            found[name.removesuffix(".weight")] = change
    return found


def _train(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            near_one = "ia3" in name or "magnitude" in name
            small = torch.randn_like(parameter) * 0.1
            parameter.data = parameter.data * (1 + small) if near_one else parameter.data + small


def peft(
    base: str,
    config: Callable[[], Any],
    *,
    component: str = "",
    form: str = "folder",
    only: str = "",
) -> Make:
    """What PEFT saves, and the difference that its ``merge_and_unload`` makes.

    ``form`` is "folder", "file" (the weights alone) or "named" (a state dict saved by hand, with
    the adapter's name in it).
    """

    def make(folder: Path) -> Made:
        from peft import get_peft_model

        whole: World = world(base)
        model = copy.deepcopy(whole.models[component])
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned: Any = get_peft_model(model, config())
            _train(tuned)
            tuned.save_pretrained(str(folder / "peft"))
            state = {k: v.clone() for k, v in tuned.state_dict().items() if ".default" in k}
            merged = tuned.merge_and_unload()
        wanted = _changes(whole.models[component], merged)
        if component:
            wanted = {f"{component}.{name}": change for name, change in wanted.items()}
        path = folder / "peft"
        if form == "file":
            shutil.copy(path / "adapter_model.safetensors", folder / "adapter.safetensors")
            path = folder / "adapter.safetensors"
        if form == "named":
            path = folder / "adapter.safetensors"
            save_file(state, path)
        return Made(path, whole.path, wanted)

    return make


def diffusers(base: str, pipeline: str, part: str, target: str, **options: Any) -> Make:
    """What a diffusers pipeline saves, metadata included, and PEFT's own ΔW."""

    def make(folder: Path) -> Made:
        import diffusers as library
        from peft import LoraConfig, get_peft_model_state_dict
        from peft.tuners.lora import LoraLayer

        whole = world(base)
        model: Any = copy.deepcopy(whole.models[part])
        torch.manual_seed(4)
        config = LoraConfig(r=3, lora_alpha=5, target_modules=[target], **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter(config)
            _train(model)
            state = get_peft_model_state_dict(model)
            getattr(library, pipeline).save_lora_weights(
                str(folder),
                **{f"{part}_lora_layers": state},
                **{f"{part}_lora_adapter_metadata": config.to_dict()},
            )
        wanted = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                plain: Any = module.get_base_layer()
                before = plain.weight.detach().clone()
                module.merge()
                wanted[f"{part}.{name}"] = plain.weight.detach().double() - before.double()
        path = folder / "pytorch_lora_weights.safetensors"
        assert load_file(path)
        return Made(path, whole.path, wanted)

    return make
