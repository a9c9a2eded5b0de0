"""FouRA's adaptive rank gate, in a form that can be trained, and its freezing.

The paper (arXiv 2406.08798) opens rank direction i for an input where S(H(G z)) = 1, with S the
sigmoid, H the entropy, G a learnable layer and z = A F x. S(H) = 1 needs an infinite entropy. One
direction's −q log q is at most 1/e, S(1/e) = 0.59; all r together give at most log r, 0.89 at
r = 8. Taken literally no direction is ever open, and the condition has no gradient. Here instead

    p = S(G₂ φ(G₁ z + b₁) + b₂),   g = p (soft)   or   g = [p > threshold] (hard)

per token and per direction: G is a small network (φ = SiLU), the entropy is left out, S(…) = 1 is
a threshold, and the gradient of the hard gate is the soft one's (straight-through, arXiv
1308.3432). For the DFT, z is complex and the network reads its real and imaginary parts; both are
multiplied by the same g.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from regraft.errors import BadData, BadOption

GateKind = Literal["none", "soft", "hard", "frozen"]
GATES: tuple[str, ...] = get_args(GateKind)

#: Bias of the outputs: a new gate is open (S(2) = 0.88), and its gradient is not yet flat.
_OPEN = 2.0


class Gate(nn.Module):
    """p = S(G₂ φ(G₁ z + b₁) + b₂), one number in (0, 1) per rank direction.

    Its parameters hang on it directly: PEFT takes the adapter's name out of keys at that depth.

    Parameters
    ----------
    inputs : int
        r for the DCT, 2r for the DFT.
    hidden : int
        Width of the hidden layer.
    rank : int
        r.
    """

    def __init__(self, inputs: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.empty(hidden, inputs))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.out = nn.Parameter(torch.empty(rank, hidden))
        self.out_bias = nn.Parameter(torch.full((rank,), _OPEN))
        nn.init.kaiming_uniform_(self.hidden, a=5**0.5)
        nn.init.normal_(self.out, std=0.01)

    def forward(self, z: Tensor) -> Tensor:
        """p of shape (…, r) from z of shape (…, inputs)."""
        inner = functional.silu(functional.linear(z, self.hidden, self.hidden_bias))
        return torch.sigmoid(functional.linear(inner, self.out, self.out_bias))


def hard(p: Tensor, threshold: float) -> Tensor:
    """[p > threshold], with the gradient of p."""
    # p − p is exactly zero in every precision, so the values stay 0 and 1.
    return (p > threshold).to(p.dtype) + (p - p.detach())


def freeze(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    adapter_name: str = "default",
    binary: bool = False,
) -> dict[str, Tensor]:
    """Replace an adapter's gates by their mean over calibration inputs, in place.

    Afterwards the adapter has a ΔW: it can be merged, converted to LoRA, and carried. Its config
    says ``gate="frozen"``; A and B may be trained further under the mask.

    Parameters
    ----------
    model : nn.Module
        With the adapter injected and active: a ``PeftModel``, or a model of diffusers or
        transformers.
    batches : iterable
        What the model is called with: a mapping (keywords), a tuple or list (positions), or one
        argument. Every token counts the same, padding too.
    adapter_name : str
    binary : bool
        Round the means to 0 and 1 at the adapter's own threshold.

    Returns
    -------
    dict of module name to mask of shape (r,), in [0, 1]

    Raises
    ------
    BadOption
        There is no active, gated FouRA adapter of this name.
    BadData
        A layer saw no input.
    """
    from regraft.tuners.foura.layer import FouRALayer

    layers: dict[str, FouRALayer] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FouRALayer) and adapter_name in module.foura_gate
    }
    if not layers or any(x.disable_adapters or adapter_name not in x.active_adapters
                         for x in layers.values()):  # fmt: skip
        raise BadOption(
            f"There is no active FouRA adapter {adapter_name!r} with a gate to freeze.",
            fix="Activate it with set_adapter; an adapter whose gate is none or frozen needs none.",
        )
    sums = {name: torch.zeros(x.rank_of(adapter_name)).double() for name, x in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def watch(name: str) -> Any:
        def see(layer: FouRALayer, inputs: tuple[Tensor, ...]) -> None:
            g = layer.gate_values(adapter_name, layer.low_rank(adapter_name, inputs[0]))
            g = g.detach().flatten(0, -2).double().cpu()
            sums[name] += g.sum(dim=0)
            counts[name] += g.shape[0]

        return see

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                _call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if unseen := [name for name, count in counts.items() if not count]:
        raise BadData(
            f"No calibration input reached {unseen[0]} ({len(unseen)} of {len(layers)} layers).",
            fix="Give batches that run the whole model; nothing was frozen.",
        )
    masks = {
        name: layer.freeze(adapter_name, sums[name] / counts[name], binary=binary)
        for name, layer in layers.items()
    }
    configs: Any = getattr(model, "peft_config", {})
    if adapter_name in configs:
        configs[adapter_name] = copy(configs[adapter_name])  # others may share the object
        configs[adapter_name].gate = "frozen"
    return masks


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)
