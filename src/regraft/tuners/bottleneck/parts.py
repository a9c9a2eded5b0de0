"""One bottleneck adapter as data: what carrying it to another base needs, and no running model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from regraft.errors import MalformedFile

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
}

_PREFIX = "base_model.model."
#: Field of :class:`Bottleneck` → the end of its key; the norm's two are optional.
_KEYS = {
    "down": "bottleneck_down.weight",
    "down_bias": "bottleneck_down.bias",
    "up": "bottleneck_up.weight",
    "up_bias": "bottleneck_up.bias",
    "norm": "bottleneck_norm.weight",
    "norm_bias": "bottleneck_norm.bias",
}


@dataclass(frozen=True)
class Bottleneck:
    """h ↦ s (W_up f(W_down norm(h) + b_down) + b_up), which is added to a module's output.

    Parameters
    ----------
    module : str
        The module it sits on, by the base's own name.
    position : str
        "houlsby" and "pfeiffer" read that module's output, "parallel" its input.
    activation : str
        f, a key of :data:`ACTIVATIONS`.
    scale : float
        s.
    down : Tensor of shape (w, n), down_bias : Tensor of shape (w,)
    up : Tensor of shape (m, w), up_bias : Tensor of shape (m,)
        m = n except where a parallel one's input and output differ.
    norm, norm_bias : Tensor of shape (n,) or None
        A layer norm of h; None without.
    """

    module: str
    position: str
    activation: str
    scale: float
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    norm: Tensor | None = None
    norm_bias: Tensor | None = None

    def __call__(self, h: Tensor) -> Tensor:
        """What it adds, (…, m), for h of shape (…, n)."""
        if self.norm is not None:
            h = functional.layer_norm(h, h.shape[-1:], self.norm, self.norm_bias)
        inner = ACTIVATIONS[self.activation](functional.linear(h, self.down, self.down_bias))
        return functional.linear(inner, self.up, self.up_bias) * self.scale


def is_key(name: str) -> bool:
    """Whether a tensor of a saved file belongs to a bottleneck adapter."""
    return name.endswith(tuple(f".{end}" for end in _KEYS.values()))


def from_tensors(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Bottleneck]:
    """The adapters of a saved file, by module.

    Parameters
    ----------
    tensors : mapping of key to Tensor
        As PEFT saved them, with or without its ``base_model.model.`` prefix. Others (modules saved
        whole) are left out.
    settings : mapping
        Its ``adapter_config.json``.

    Raises
    ------
    MalformedFile
        A module lacks a tensor, or the settings do not say what the adapters are.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for part, end in _KEYS.items():
            if name.endswith(f".{end}"):
                module = name.removesuffix(f".{end}").removeprefix(_PREFIX)
                found.setdefault(module, {})[part] = tensor
    kinds = {part: settings.get(part) for part in ("position", "activation", "scale")}
    for part, value in kinds.items():
        if value is None:
            raise MalformedFile(
                f"The settings of these bottleneck adapters do not say their {part}.",
                fix="Restore the adapter_config.json that was saved with them.",
            )
    made = {}
    for module, parts in found.items():
        if lost := {"down", "down_bias", "up", "up_bias"} - parts.keys():
            raise MalformedFile(
                "A bottleneck adapter is not whole.",
                tensor=f"{module}.{_KEYS[sorted(lost)[0]]}",
                fix="Get the file again.",
            )
        made[module] = Bottleneck(module=module, **kinds, **parts)  # type: ignore[arg-type]
    return made


def to_tensors(adapters: Mapping[str, Bottleneck]) -> dict[str, Tensor]:
    """Adapters as PEFT's file holds them; what :func:`from_tensors` reads."""
    return {
        f"{_PREFIX}{module}.{end}": tensor.contiguous()
        for module, adapter in adapters.items()
        for part, end in _KEYS.items()
        if isinstance(tensor := getattr(adapter, part), torch.Tensor)
    }
