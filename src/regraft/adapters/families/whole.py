"""Whole weights: what a weight becomes, saved instead of its change.

Written by PEFT beside its factors (``modules_to_save``, trained biases, trained token rows) and as
LN tuning (arXiv 2312.11420), by ComfyUI as ``set_weight``, and as the normalisations of control
LoRAs.

* ``whole``, ``whole_bias``: ΔW = saved − W0, Δb = saved − b0.
* ``tokens``: rows of an embedding (PEFT's trainable tokens; which ones, its config says):
  ΔW = Σ_i e_i (row_i − W0[i])ᵀ, of rank at most the number of rows.

No alpha, scale 1. At another strength than 1 readers blend: W0 + strength · ΔW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import changed_bias
from regraft.adapters.update import Dense, LowRank, Update
from regraft.errors import MalformedFile, ShapeMismatch


@family(
    name="whole",
    title="whole weight",
    paper="https://arxiv.org/abs/1902.00751",
    equation="ΔW = saved − W0",
    needs=[("whole",), ("whole_bias",), ("tokens",)],
    may=("whole", "whole_bias"),
    marks=("whole", "whole_bias", "tokens"),
    needs_base=True,
)
def build(module: Module) -> Built:
    """The difference to the base's own, made when it is asked for."""
    built: Built = {}
    if "whole" in module.tensors:
        built["weight"] = _difference(module, module.tensors["whole"])
    if "tokens" in module.tensors:
        built["weight"] = _rows(module, module.tensors["tokens"])
    if "whole_bias" in module.tensors:
        saved = module.tensors["whole_bias"]
        bias = changed_bias(module, lambda _: saved.float())
        if bias is None:  # no such parameter in the base: whoever places it will find that
            bias = Dense(lambda: saved.float(), tuple(saved.shape), stored=saved.dtype)
        if bias.shape != tuple(saved.shape):
            raise ShapeMismatch(f"A bias {tuple(saved.shape)} is not one of shape {bias.shape}.")
        built["bias"] = bias
    return built


def _difference(module: Module, saved: Tensor) -> Update:
    if tuple(saved.shape) != module.shape:
        raise ShapeMismatch(
            f"A whole weight {tuple(saved.shape)} does not replace a weight {module.shape}."
        )
    return Dense(
        lambda: saved.float() - module.weight().float(),
        module.shape,
        module.layout,
        stored=saved.dtype,
    )


def _rows(module: Module, saved: Tensor) -> Update:
    indices = _indices(module.settings.get("trainable_token_indices"), module.name)
    if saved.ndim != 2 or len(indices) != len(saved) or saved.shape[1:] != module.shape[1:]:
        raise ShapeMismatch(
            f"Rows {tuple(saved.shape)} for {len(indices)} tokens do not fit an embedding "
            f"{module.shape}."
        )
    if indices and max(indices) >= module.shape[0]:
        raise ShapeMismatch(f"Token {max(indices)} is not in an embedding {module.shape}.")
    up = torch.zeros(module.shape[0], len(indices))
    up[indices, range(len(indices))] = 1.0
    down = saved.float() - module.weight().float()[indices]
    return LowRank(up, down, 1.0, module.shape, "linear")


def _indices(said: Any, name: str) -> list[int]:
    """The rows that PEFT's config says are trained: of the embedding, or by layer."""
    if isinstance(said, dict):
        own = [v for k, v in said.items() if f".{name}".endswith(f".{k}")]
        said = own[0] if own else None
    if not isinstance(said, list) or not all(isinstance(i, int) and i >= 0 for i in said):
        raise MalformedFile(
            f"The adapter's config does not say which tokens of {name} were trained.",
            fix="Restore the adapter_config.json that was saved with these weights.",
        )
    return said
