"""LN tuning: the normalisation's own weight and bias, trained and stored whole.

Paper: arXiv 2312.11420. Written by PEFT (``LN_TUNING``); roles ``ln_tuning_layers.weight`` and
``ln_tuning_layers.bias`` are the new values: ΔW = W − W0, Δb = b − b0. ``set_weight`` (ComfyUI) is
a new value too.
"""

from __future__ import annotations

from torch import Tensor

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import changed_bias
from regraft.adapters.update import Dense
from regraft.errors import ShapeMismatch

_WEIGHTS = ("ln_tuning_layers.weight", "set_weight")
_BIAS = "ln_tuning_layers.bias"


@family(
    name="ln-tuning",
    title="a new value",
    paper="https://arxiv.org/abs/2312.11420",
    equation="ΔW = W − W0, Δb = b − b0",
    needs=[(_WEIGHTS[0],), (_WEIGHTS[1],), (_BIAS,)],
    may=(_BIAS,),
    marks=(*_WEIGHTS, _BIAS),
    needs_base=True,
)
def build(module: Module) -> Built:
    """ΔW and Δb in full, made from the base each time they are asked for."""
    built: Built = {}
    for role in _WEIGHTS:
        if role in module.tensors:
            value = module.tensors[role]
            if tuple(value.shape) != module.shape:
                raise ShapeMismatch(f"A value {tuple(value.shape)} is not of {module.shape}.")
            built["weight"] = Dense(
                lambda v=value: v.float() - module.weight().float(),  # type: ignore[misc]
                module.shape,
                module.layout,
                stored=value.dtype,
            )
    if _BIAS in module.tensors:
        new: Tensor = module.tensors[_BIAS].float()
        bias = changed_bias(module, lambda _: new)
        if bias is None:
            raise ShapeMismatch(f"{module.name} has no bias in this base.")
        built["bias"] = bias
    return built
