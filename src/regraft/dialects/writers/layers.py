"""What PEFT's LoRA layers hold: the modules of a ``peft`` folder and of a ``diffusers`` file.

A bias travels as ``lora_B.bias``. PEFT has one setting for it, ``lora_bias``, for all layers of a
model: every layer of the adapter then has such a bias, and must have a bias of its own to add it
to; embedding layers refuse it (peft 0.21, ``LoraLayer.update_layer``, ``Embedding.update_layer``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.adapters import LowRank, Site, Update, delta, matrix_shape
from regraft.bases import Base
from regraft.dialects.writers.factors import (
    is_layer_bias,
    is_matrix,
    is_norm,
    is_table,
    pair,
    plain,
    scaled,
)
from regraft.dialects.writers.registry import Refused, Task, Tensors


@dataclass
class Layer:
    """One LoRA layer: its weight's site, and the updates of its weight and bias."""

    site: Site
    shape: tuple[int, ...]
    weight: Update | None = None
    bias: Update | None = None
    #: Whether every layer of the model has a bias of its LoRA.
    biased: bool = False

    @property
    def is_table(self) -> bool:
        """Whether PEFT treats it as an embedding."""
        return self.weight is not None and is_table(self.site, self.weight)

    def factors(self) -> LowRank:
        """Its LoRA; a rank of one and zeros if only its bias changes."""
        if self.weight is not None:
            return plain(self.weight)
        m, n = matrix_shape(self.shape)
        return LowRank(torch.zeros(m, 1), torch.zeros(1, n), 1.0, self.shape)

    def keys(self, name: str) -> tuple[str, str]:
        """The keys of A and B."""
        if self.is_table:
            return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight"

    def change_of_bias(self) -> Tensor:
        """Δb in fp32."""
        return torch.zeros(self.shape[0]) if self.bias is None else delta(self.bias)

    def tensors(self, name: str, dtype: torch.dtype, *, fold: bool) -> tuple[Tensors, LowRank]:
        """Its tensors under ``name``, and its LoRA. ``fold``: the scale is multiplied into B."""
        factors = self.factors()
        a, b = pair(factors, table=self.is_table)
        key_a, key_b = self.keys(name)
        a, b = scaled(a, b, factors.scale if fold else 1.0, dtype)
        held = {key_a: a, key_b: b}
        if self.biased:
            by = 1.0 if fold else factors.scale
            held[f"{name}.lora_B.bias"] = (self.change_of_bias() / (by or 1.0)).to(dtype)
        return held, factors


def layers_of(task: Task) -> list[Layer]:
    """The LoRA layers of an adapter without refused sites."""
    found: dict[Site, Layer] = {}
    with_bias = {s.component for s in task.adapter.updates if s.parameter == "bias"}
    for site, update in task.adapter.updates.items():
        weight = site.with_parameter("weight")
        shape = task.target.weights[weight].shape
        biased = site.component in with_bias
        layer = found.setdefault(weight, Layer(weight, shape, biased=biased))
        if site.parameter == "bias":
            layer.bias = update
        else:
            layer.weight = update
    return list(found.values())


def refused(task: Task) -> Refused:
    """Normalisations and bare parameters; biases, unless every layer of the adapter has one."""
    found: Refused = {}
    for site in task.adapter.updates:
        if is_matrix(site, task.target) or is_layer_bias(site, task.target):
            continue
        norm = is_norm(site, task.target)
        what = "normalisations" if norm else "bare parameters"
        found[site] = f"PEFT's LoRA layers do not exist for {what}"
    for component in task.components:
        biases = [
            s
            for s in task.adapter.updates
            if s.component == component and s not in found and s.parameter == "bias"
        ]
        problem = _bias_problem(task, component) if biases else ""
        found |= dict.fromkeys(biases, problem) if problem else {}
    return found


def _bias_problem(task: Task, component: str) -> str:
    """Why no bias of a component can be held, or nothing."""
    base: Base = task.target
    for site, update in task.adapter.updates.items():
        weight = site.with_parameter("weight")
        if site.component != component or weight not in base.weights:
            continue
        if site == weight and is_table(site, update):
            return f"PEFT holds no biases beside those of an embedding table ({site})"
        if site.with_parameter("bias") not in base:
            return (
                "PEFT holds biases for all layers of an adapter or for none, and "
                f"{weight} has no bias"
            )
    return ""
