"""peft: a folder of ``adapter_config.json`` and ``adapter_model.safetensors``, for one model.

The scale is in the config: ``r`` and ``lora_alpha`` are the most frequent pair, others are in
``rank_pattern`` and ``alpha_pattern``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from regraft.adapters import LowRank, Update
from regraft.dialects.keys import PEFT_PREFIX
from regraft.dialects.writers import layers
from regraft.dialects.writers.factors import alpha_of
from regraft.dialects.writers.layers import Layer, layers_of
from regraft.dialects.writers.registry import Refused, Task, Tensors, Writer, register
from regraft.errors import BadOption
from regraft.parallel import in_order

#: Settings of the input's config that stay true on another base.
_KEPT = ("task_type", "lora_dropout", "auto_mapping")


def refused(task: Task) -> Refused:
    """What PEFT's LoRA layers have no place for.

    Raises
    ------
    BadOption
        The adapter changes several models.
    """
    if len(task.components) > 1:
        changed = ", ".join(task.components)
        raise BadOption(
            f"A PEFT folder holds one model; this adapter changes {changed}.",
            fix="Write it with --dialect diffusers or kohya.",
        )
    return layers.refused(task)


def tensors(task: Task) -> Tensors:
    """Every tensor of the file, one layer at a time."""

    def work(layer: Layer) -> Tensors:
        return layer.tensors(PEFT_PREFIX + layer.site.module, task.dtype, fold=False)[0]

    made = in_order(work, layers_of(task))
    return {key: tensor for part in made for key, tensor in part.items()}


def _base_of(task: Task) -> dict[str, Any]:
    """The base's name, by which PEFT loads it: the input's own word where the base is the same."""
    said = task.adapter.config.get("base_model_name_or_path")
    if task.same_base and said and not task.target.repo:
        return {"base_model_name_or_path": said, "revision": task.adapter.config.get("revision")}
    return {"base_model_name_or_path": task.target.name, "revision": task.target.revision}


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _key(module: str, modules: Iterable[str]) -> str:
    """The pattern key of a module; PEFT lets a key match the end of a longer name, too."""
    longer = any(other.endswith(f".{module}") for other in modules)
    return f"^{re.escape(module)}" if longer else module


def _rank_and_alpha(layer: Layer, held: Mapping[str, Tensor]) -> tuple[int, float]:
    """(rank, alpha) of a layer as it was written."""
    a = held[layer.keys(PEFT_PREFIX + layer.site.module)[0]]
    update: Update | None = layer.weight
    if isinstance(update, LowRank):
        return update.rank, alpha_of(update)
    return a.shape[0], float(a.shape[0])


def config(task: Task, held: Mapping[str, Tensor]) -> dict[str, Any]:
    """``adapter_config.json`` for tensors that were written."""
    own = sorted(layers_of(task), key=lambda layer: layer.site)
    found = {layer.site.module: _rank_and_alpha(layer, held) for layer in own}
    rank, alpha = Counter(found.values()).most_common(1)[0][0]
    component = own[0].site.component
    others = [
        s.module for s in task.target.weights if s.component == component and s.module not in found
    ]
    # PEFT takes a name in the list for the end of any module's name; where that would catch more
    # than is meant, a regular expression says it exactly.
    ends = tuple(f".{module}" for module in found)
    exact = not any(other.endswith(ends) for other in others)
    modules = sorted(found) if exact else "|".join(re.escape(m) for m in sorted(found))
    adapter = task.adapter
    kept = {k: adapter.config[k] for k in _KEPT if adapter.config.get(k) is not None}
    settings = {
        "task_type": None,
        "lora_dropout": 0.0,
        **kept,
        "peft_type": "LORA",
        **_base_of(task),
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_key(m, found): r for m, (r, _) in found.items() if r != rank},
        "alpha_pattern": {_key(m, found): _number(a) for m, (_, a) in found.items() if a != alpha},
        "target_modules": modules,
        "fan_in_fan_out": any(
            layer.weight is not None and layer.weight.layout == "transposed" for layer in own
        ),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    if any(layer.biased for layer in own):
        settings["lora_bias"] = True
    return settings


WRITER = register(
    Writer(
        name="peft",
        read_by="PEFT folder (adapter_config.json + adapter_model.safetensors)",
        refused=refused,
        tensors=tensors,
        folder=True,
        config=config,
        holds="weights of linear layers, Conv1D, convolutions and embedding tables; biases where "
        "every layer of the adapter has one",
        instead="kohya",
    )
)
