"""A layer with FouRA adapters: its tensors, the forward pass with and without a gate, and ΔW."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn import functional

from regraft.errors import BadOption
from regraft.tuners.foura.config import FouRAConfig
from regraft.tuners.foura.gate import Gate, hard
from regraft.tuners.foura.transforms import spatial_factors
from regraft.tuners.layer import DeltaLayer


class FouRALayer(DeltaLayer):
    """y = W₀ x + b + s · F⁻¹ B (g ⊙ A F x) for each active adapter, s = alpha / r.

    Its tensors, by adapter name:

    * ``foura_A`` (r, n), of a convolution (r, n, *kernel); ``foura_B`` (m, r);
    * ``foura_mask`` (r,), if the gate is frozen; not trained;
    * ``foura_gate``, the parameters of a :class:`Gate`, if it is soft or hard.

    A convolution's transforms run along its channels: A is then a kernel with the layer's own
    stride, padding and dilation, and B mixes the r directions at each position.
    """

    adapter_layer_names = ("foura_A", "foura_B", "foura_gate")
    other_param_names = ("foura_mask", "scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.foura_A = nn.ParameterDict({})
        self.foura_B = nn.ParameterDict({})
        self.foura_gate = nn.ModuleDict({})
        self.foura_mask = BufferDict({}, persistent=True)
        #: Adapter → its settings when it was added; see :meth:`gate_of` for its gate now.
        self._settings: dict[str, FouRAConfig] = {}

    def update_layer(self, adapter_name: str, config: FouRAConfig) -> None:
        """Add an adapter.

        Raises
        ------
        BadOption
            The layer is a convolution with groups: its channels have no common transform.
        """
        base: Any = self.get_base_layer()
        if getattr(base, "groups", 1) != 1:
            raise BadOption(
                "FouRA cannot sit on a convolution with groups.",
                fix="Leave it out with target_modules or exclude_modules.",
            )
        shape = tuple(self._shape)
        if self.kind == "transposed":
            shape = shape[::-1]
        self._settings[adapter_name] = copy(config)
        self.foura_A[adapter_name] = nn.Parameter(torch.empty(config.r, *shape[1:]))
        self.foura_B[adapter_name] = nn.Parameter(torch.zeros(shape[0], config.r))
        nn.init.kaiming_uniform_(self.foura_A[adapter_name], a=5**0.5)
        if not config.init_weights:
            nn.init.normal_(self.foura_B[adapter_name], std=0.1)
        if config.gate == "frozen":
            self.foura_mask[adapter_name] = torch.ones(config.r)
        elif config.gate != "none":
            inputs = 2 * config.r if config.transform == "dft" else config.r
            self.foura_gate[adapter_name] = Gate(inputs, config.gate_hidden or config.r, config.r)
        self._ready(adapter_name, config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        where = device or self.get_base_layer().weight.device
        for held in (self.foura_A, self.foura_B, self.foura_mask):
            if adapter_name in held and not held[adapter_name].is_meta:
                held[adapter_name] = held[adapter_name].to(where, torch.float32)
        if adapter_name in self.foura_gate:
            gate = self.foura_gate[adapter_name]
            if not any(p.is_meta for p in gate.parameters()):
                gate.to(where, torch.float32)

    # The gate

    def gate_of(self, adapter_name: str) -> str:
        """ "none", "soft", "hard" or "frozen"."""
        if adapter_name in self.foura_mask:
            return "frozen"
        return self._settings[adapter_name].gate if adapter_name in self.foura_gate else "none"

    def rank_of(self, adapter_name: str) -> int:
        """r."""
        return self._settings[adapter_name].r

    def low_rank(self, adapter_name: str, x: Tensor) -> Tensor:
        """z = A F x, directions last: (…, r); for the DFT (…, 2r), real parts then imaginary."""
        down, _ = self._spatial(adapter_name)
        x = x.to(down.dtype)
        if self.kind == "conv":
            return self._convolved(self.get_base_layer(), x, down).movedim(1, -1)
        return functional.linear(x, down)

    def gate_values(self, adapter_name: str, z: Tensor) -> Tensor:
        """g of a soft or hard gate, one number per direction: (…, r) from z."""
        p: Tensor = self.foura_gate[adapter_name](z)
        config = self._settings[adapter_name]
        return p if config.gate == "soft" else hard(p, config.gate_threshold)

    def freeze(self, adapter_name: str, mask: Tensor, *, binary: bool = False) -> Tensor:
        """Replace an adapter's gate by a mask of shape (r,), which is returned.

        ``binary`` rounds it at the gate's threshold.
        """
        if binary:
            mask = mask > self._settings[adapter_name].gate_threshold
        mask = mask.float()
        self.foura_mask[adapter_name] = mask.to(self.foura_A[adapter_name].device)
        if adapter_name in self.foura_gate:
            del self.foura_gate[adapter_name]
        return mask

    # Running

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus each active adapter's change, in the base's dtype."""
        names = self._on_this_layer(self.active_adapters)
        gated = [name for name in names if name in self.foura_gate]
        if self.disable_adapters or self.merged or not gated:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in gated:
            result = result + self._gated(name, x).to(result.dtype)
        if rest := {name: self.scaling[name] for name in names if name not in gated}:
            result = result + self._through(x, *self.factors(rest)).to(result.dtype)
        return result

    def _gated(self, name: str, x: Tensor) -> Tensor:
        config = self._settings[name]
        _, up = self._spatial(name)
        z = self.low_rank(name, x)
        g = self.gate_values(name, z)
        z = z * (torch.cat([g, g], dim=-1) if config.transform == "dft" else g)
        y = functional.linear(z, up * (self.scaling[name] * config.alpha / config.r))
        return y.movedim(-1, 1) if self.kind == "conv" else y

    def _spatial(self, name: str) -> tuple[Tensor, Tensor]:
        """D (q, n, *kernel) and U (m, q), at least fp32."""
        return spatial_factors(
            self.foura_A[name], self.foura_B[name], self._settings[name].transform
        )

    # ΔW

    def factors(self, scales: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """ΔW = s F⁻¹ B diag(g) A F, the sum of the adapters', in factors.

        Raises
        ------
        BadOption
            The gate of one of them depends on the input.
        """
        lefts, rights = [], []
        for name, scale in scales.items():
            self._require_fixed(name)
            config = self._settings[name]
            down, up = self._spatial(name)
            up = up * (scale * config.alpha / config.r)
            if name in self.foura_mask:
                g = self.foura_mask[name].to(up.dtype)
                up = up * g.repeat(up.shape[1] // g.numel())
            lefts.append(up)
            rights.append(down.flatten(1))
        left, right = torch.cat(lefts, dim=1), torch.cat(rights)
        return (right.mT, left.mT) if self.kind == "transposed" else (left, right)

    def _require_fixed(self, name: str) -> None:
        if name in self.foura_gate:
            raise BadOption(
                f"The FouRA adapter {name!r} has a {self.gate_of(name)} gate, which depends on the "
                "input: there is no one ΔW.",
                fix="Freeze it on calibration inputs first: regraft.tuners.foura.freeze(model, "
                f"batches, adapter_name={name!r}).",
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``peft.convert_to_lora`` can convert it: a matrix, and a ΔW."""
        matrix: bool = super().supports_lora_conversion(adapter_name)
        return matrix and adapter_name not in self.foura_gate
