"""A module with bottleneck adapters on its output."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from regraft.errors import BadOption
from regraft.tuners.bottleneck.config import BottleneckConfig
from regraft.tuners.bottleneck.parts import ACTIVATIONS, Bottleneck


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a projection, or of a block from its first to its last projection."""
    ends = [s for m in module.modules() if (s := _projection(m)) is not None]
    return (ends[0][0], ends[-1][1]) if ends else None


def _projection(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """y ← y + s (W_up f(W_down h + b_down) + b_up), with h the module's output y, or its input.

    Each active adapter reads the same h; what they add is summed.

    Parameters
    ----------
    base_layer : nn.Module
        A linear layer, a Conv1D of transformers, or a block with such layers, from one tensor
        (…, n) to one tensor (…, m).
    adapter_name : str
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up", "bottleneck_norm")
    other_param_names = ("scaling",)

    # PEFT is untyped here, and nn.Module says that whatever it does not know is a tensor.
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_norm = nn.ModuleDict({})
        self.bottleneck_down = nn.ModuleDict({})
        self.bottleneck_up = nn.ModuleDict({})
        #: Adapter → strength, 1 as trained. Not saved.
        self.scaling: dict[str, float] = {}
        self._settings: dict[str, BottleneckConfig] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter.

        Raises
        ------
        BadOption
            No module that projects is inside, or it does not project back to its input's size.
        """
        base = self.get_base_layer()
        found = sizes(base)
        # A block that ends at another size is read wrongly (experts, routers): sit on its parts.
        if found is None or (_projection(base) is None and found[0] != found[1]):
            raise BadOption(
                f"A bottleneck adapter cannot sit on a {type(base).__name__}: its input and output "
                "sizes are not known.",
                fix="Target linear layers, or blocks of them that end at the size they start at.",
            )
        n, m = found
        n = n if config.position == "parallel" else m
        width = config.width_of(n)
        down, up = nn.Linear(n, width), nn.Linear(width, m)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        if config.init_weights:
            nn.init.zeros_(up.weight)
        self._settings[adapter_name] = copy(config)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        if config.norm:
            self.bottleneck_norm[adapter_name] = nn.LayerNorm(n)
        self.scaling[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To the base's device. Unlike PEFT's, never to its dtype: what is trained stays fp32."""
        where = device or next(self.get_base_layer().parameters()).device
        for name in self.adapter_layer_names:
            held = getattr(self, name)
            if adapter_name in held and not any(p.is_meta for p in held.parameters()):
                held[adapter_name].to(where, torch.float32)

    def part(self, adapter_name: str, module: str) -> Bottleneck:
        """One adapter as data; its tensors are the trained ones, ``module`` is its name there."""
        config = self._settings[adapter_name]
        norm: Any = self.bottleneck_norm[adapter_name] if config.norm else None
        down: Any = self.bottleneck_down[adapter_name]
        up: Any = self.bottleneck_up[adapter_name]
        return Bottleneck(
            module=module,
            position=config.position,
            activation=str(config.activation),
            scale=float(config.scale or 0.0),
            down=down.weight,
            down_bias=down.bias,
            up=up.weight,
            up_bias=up.bias,
            norm=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output, plus each active adapter's, in the module's dtype."""
        y: Tensor = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return y
        result = y
        for name in self.active_adapters:
            if name in self.scaling:
                h = y if self._settings[name].position != "parallel" else _first(args, kwargs)
                result = result + self._added(name, h).to(y.dtype)
        return result

    def _added(self, name: str, h: Tensor) -> Tensor:
        config = self._settings[name]
        down: Any = self.bottleneck_down[name]
        up: Any = self.bottleneck_up[name]
        h = self._cast_input_dtype(h, down.weight.dtype)
        if config.norm:
            h = self.bottleneck_norm[name](h)
        inner = ACTIVATIONS[str(config.activation)](down(h))
        added: Tensor = up(inner) * (float(config.scale or 0.0) * self.scaling[name])
        return added

    # Strength, as diffusers and PEFT set it

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of every active adapter."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of every active adapter; without ``scale``, set it back to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    # No merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises
        ------
        BadOption
        """
        refuse_merging()

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def refuse_merging() -> NoReturn:
    """Raise :class:`BadOption`, saying why there is nothing to merge."""
    raise BadOption(
        "Bottleneck adapters cannot be merged: they are not linear, so no change of a weight does "
        "what they do.",
        fix="Keep them beside the base (PeftModel.from_pretrained), or take them off with unload.",
    )


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(found, Tensor)
    return found
