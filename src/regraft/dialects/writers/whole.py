"""Whole changes, as kohya and ComfyUI files hold them under the names that LyCORIS gave them."""

from __future__ import annotations

import torch

from regraft.dialects.writers.naming import FileModule, Parameter
from regraft.dialects.writers.registry import Tensors


def is_lora(module: FileModule) -> bool:
    """Whether a module has a weight of two or more dimensions."""
    weight = module.parameters.get("weight")
    return weight is not None and len(weight.shape) > 1


def changes(
    module: FileModule, name: str, dtype: torch.dtype, *, lora: bool, scale: bool = True
) -> Tensors:
    """The whole changes of a module, under LyCORIS' and ComfyUI's names.

    ``scale``: the weight of a normalisation may be called so.
    """
    held: Tensors = {}
    weight, bias = _norm_weight(module, scale), module.parameters.get("bias")
    if weight is not None:
        held[f"{name}.w_norm"] = weight.diff().to(dtype)
    elif "weight" in module.parameters and not lora:
        held[f"{name}.diff"] = module.parameters["weight"].diff().to(dtype)
    if bias is not None:
        # ComfyUI looks for b_norm only beside w_norm.
        role = "diff_b" if weight is None else "b_norm"
        held[f"{name}.{role}"] = bias.diff().to(dtype)
    return held


def _norm_weight(module: FileModule, scale: bool) -> Parameter | None:
    weight = module.parameters.get("weight")
    if weight is None and scale:
        weight = module.parameters.get("scale")
    return weight if weight is not None and len(weight.shape) == 1 else None
