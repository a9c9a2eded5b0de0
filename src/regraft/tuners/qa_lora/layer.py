"""QA-LoRA on one layer.

Paper: arXiv 2309.14717 (ICLR 2024). Inputs in groups of L, x̄ (n / L) their sums:

    y = W x + alpha / r · B A x̄        A (r, n / L), B (m, r); B = 0 at first

so ΔW = alpha / r · B A E is the same within each group, E (n / L, n) repeating columns. A base
quantised by groups has W = s (q − z), and takes ΔW into z: z' = z − ΔW / s, with q and s as they
were. Other writers average instead of summing: ``config.POOLS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from regraft.errors import BadOption, NonFiniteTensor
from regraft.tuners.layer import DeltaLayer, exact, wide
from regraft.tuners.packed import group_of, is_packed, with_moved_zeros
from regraft.tuners.qa_lora.config import QALoraConfig, constant

_USUAL_GROUP = 32


class QALoraLayer(DeltaLayer):
    """A linear layer with QA-LoRA adapters."""

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("scaling", "groups", "constants")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        #: Adapter → L, and → what B A E is multiplied by.
        self.groups: dict[str, int] = {}
        self.constants: dict[str, float] = {}

    def update_layer(self, adapter_name: str, config: QALoraConfig) -> None:
        """Add an adapter.

        Raises
        ------
        BadOption
            The groups do not divide the inputs, or cut across those of the quantised weight.
        """
        m, n = self._rows, self._columns
        own = group_of(self.get_base_layer())
        length = config.qalora_group_size or own or _USUAL_GROUP
        if n % length:
            raise BadOption(
                f"Groups of {length} do not divide a layer's {n} inputs.",
                fix="Give a group size (--group) that divides them, or leave the layer out.",
            )
        if own and length % own:
            raise BadOption(
                f"Groups of {length} inputs are not whole groups of the quantised weight, "
                f"which have {own}.",
                fix=f"Give a group size (--group) that is a multiple of {own}.",
            )
        down, up = nn.Linear(n // length, config.r, bias=False), nn.Linear(config.r, m, bias=False)
        with torch.no_grad():
            # A sum is as large as a LoRA's A x if A's entries are as large as a LoRA's.
            bound = n**-0.5 if config.qalora_pool == "sum" else (n / length) ** -0.5
            down.weight.uniform_(-bound, bound)
            up.weight.zero_()
        self.lora_A[adapter_name], self.lora_B[adapter_name] = down, up
        self.groups[adapter_name] = length
        self.constants[adapter_name] = (
            constant(config.qalora_pool, n, length) * config.lora_alpha / config.r
        )
        self._ready(adapter_name, config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        where = device or self.get_base_layer().weight.device
        for held in (self.lora_A, self.lora_B):
            # Made without numbers, it waits for those of a file.
            if adapter_name in held and not any(p.is_meta for p in held[adapter_name].parameters()):
                held[adapter_name].to(where, torch.float32)

    def _down(self, name: str) -> Tensor:
        down: Any = self.lora_A[name]
        return wide(down.weight)

    def _up(self, name: str, scale: float) -> Tensor:
        up: Any = self.lora_B[name]
        return wide(up.weight) * (scale * self.constants[name])

    def factors(self, scales: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        left, right = [], []
        for name, scale in scales.items():
            left.append(self._up(name, scale))
            right.append(self._down(name).repeat_interleave(self.groups[name], dim=1))
        return torch.cat(left, dim=1), torch.cat(right, dim=0)

    def _added(self, x: Tensor, scales: Mapping[str, float]) -> Tensor:
        parts = []
        for name, scale in scales.items():
            down = self._down(name)
            x = x.to(down.dtype)
            sums = x.reshape(*x.shape[:-1], -1, self.groups[name]).sum(dim=-1)
            parts.append(functional.linear(functional.linear(sums, down), self._up(name, scale)))
        return torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]

    def _change_by_groups(self, scales: Mapping[str, float]) -> Tensor:
        """ΔW with one column for each group of the quantised weight."""
        own = group_of(self.get_base_layer()) or 1
        parts = []
        for name, scale in scales.items():
            change = self._up(name, scale) @ self._down(name)
            parts.append(change.repeat_interleave(self.groups[name] // own, dim=1))
        return torch.stack(parts).sum(dim=0)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As of any layer; into the zero points of a base that is quantised by groups.

        Integers and scales stay as they are, and the merged layer does what the adapter on the
        base did. The zero points become fp32.

        Raises
        ------
        NonFiniteTensor
        QuantisedWeight
            The base is quantised in a form without zero points, or with other groups.
        """
        base = self.get_base_layer()
        if group_of(base) is None:
            super().merge(safe_merge, adapter_names)  # or refuses
            return
        names = self._on_this_layer(check_adapters_to_merge(self, adapter_names) or [])
        if not names:
            return
        after = self._merged | {name: self.scaling[name] for name in names}
        packed: Any = base.weight if self._unmerged is None else self._unmerged
        with exact(base.weight):
            moved: Any = with_moved_zeros(packed, self._change_by_groups(after))
        if safe_merge and not bool(torch.isfinite(moved.zero_point).all()):
            raise NonFiniteTensor(
                f"Merging {', '.join(names)} gives zero points that are not finite.",
                fix="The adapter is damaged, or its training diverged.",
            )
        base.weight, self._unmerged = moved, packed
        self._merged = after
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base's weight, or its zero points, back bit for bit."""
        base = self.get_base_layer()
        if self._unmerged is None or not is_packed(base):
            super().unmerge()
            return
        held: Any = self._unmerged
        base.weight = nn.Parameter(held.to(base.weight.device), requires_grad=False)
        self._merged, self._unmerged = {}, None
        self.merged_adapters.clear()
