"""LoRA-X on one layer.

Paper: arXiv 2501.16559 (ICLR 2025), Eq. 1. With W0 = U Σ Vᵀ, convolutions seen as out × in·kh·kw
and transformers' Conv1D as stored, in × out:

    ΔW = Ũ ΔΣ Ṽᵀ        Ũ (m, r), Ṽ (n, r) the top singular vectors of W0, frozen; ΔΣ = 0 at first

Signs: the largest entry of each column of Ũ is positive (``regraft.subspaces``); where it is, is
recorded for a matrix ΔΣ whose bases are not in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from regraft.errors import MalformedFile, ShapeMismatch
from regraft.subspaces.engine import Dimension, decompose
from regraft.subspaces.reproducible import signed
from regraft.tuners.layer import DeltaLayer, exact, wide
from regraft.tuners.lora_x.config import LoraXConfig


class _Bases(BufferDict):  # type: ignore[misc]
    """Frozen tensors by adapter; those in ``unsaved`` stay out of state dicts."""

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self.unsaved: set[str] = set()

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=key not in self.unsaved)


class LoraXLayer(DeltaLayer):
    """A linear, convolution or Conv1D layer with LoRA-X adapters."""

    adapter_layer_names = ("lora_x_S",)
    other_param_names = ("scaling", "lora_x_U", "lora_x_V", "pending")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.lora_x_U = _Bases()
        self.lora_x_S = nn.ParameterDict()
        self.lora_x_V = _Bases()
        #: Adapters whose bases have not come yet, from a file or from the base's weight.
        self.pending: dict[str, bool] = {}
        #: Adapter → the recorded signs of its bases, see ``signs_of``.
        self._signs: dict[str, list[int]] = {}

    def update_layer(self, adapter_name: str, config: LoraXConfig) -> None:
        """Add an adapter. One that is made for loading waits for the bases in its file."""
        for bases in (self.lora_x_U, self.lora_x_V):
            bases.unsaved.discard(adapter_name)
            if not config.store_bases:
                bases.unsaved.add(adapter_name)
        self._signs.pop(adapter_name, None)
        dimension = config.dimension()
        full = config.core == "full"
        if config.inference_mode:
            self.pending[adapter_name] = True
            r = min(dimension.k or 1, self._rows, self._columns)
            self.lora_x_U[adapter_name] = torch.empty(0)
            self.lora_x_V[adapter_name] = torch.empty(0)
        else:
            r = self._decompose(adapter_name, dimension)
        self.lora_x_S[adapter_name] = nn.Parameter(torch.zeros((r, r) if full else (r,)))
        self._ready(adapter_name, config.inference_mode)

    def _decompose(self, name: str, dimension: Dimension) -> int:
        """Set an adapter's bases from the base's weight; how many directions they have."""
        weight = self.base_weight()
        with exact(weight):
            found = decompose(self.base_matrix(), dimension)
            u, v = found.ut.mT.contiguous(), found.vt.mT.contiguous()
            if name in self._signs:
                u, v = signed(u, v, self._signs[name])
            self.lora_x_U[name], self.lora_x_V[name] = u.to(weight.device), v.to(weight.device)
        self.pending.pop(name, None)
        return found.k

    def expect(self, name: str, signs: list[int]) -> None:
        """Give an adapter's bases the signs recorded for them, now or when they are computed.

        Raises
        ------
        WrongBase
            They are other vectors than those that were recorded.
        """
        self._signs[name] = signs
        if name not in self.pending:
            with exact(self.lora_x_U[name]):
                self.lora_x_U[name], self.lora_x_V[name] = signed(*self.bases(name), signs)

    def bases(self, name: str) -> tuple[Tensor, Tensor]:
        """An adapter's (Ũ (m, r), Ṽ (n, r)), at least fp32."""
        if name in self.pending:
            r = self.lora_x_S[name].shape[0]
            if self._decompose(name, Dimension(k=r)) != r:
                raise ShapeMismatch(
                    f"The base's weight has fewer than the {r} singular directions of the adapter.",
                    fix="Load the base that the adapter was trained on.",
                )
        return wide(self.lora_x_U[name]), wide(self.lora_x_V[name])

    def factors(self, scales: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        left, right = [], []
        for name, scale in scales.items():
            u, v = self.bases(name)
            core = wide(self.lora_x_S[name])
            left.append((u * core if core.ndim == 1 else u @ core) * scale)
            right.append(v.mT)
        if len(left) == 1:
            return left[0], right[0]
        return torch.cat(left, dim=1), torch.cat(right, dim=0)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self.lora_x_S:
            self._fit(name, *(state_dict.get(f"{prefix}lora_x_{part}.{name}") for part in "USV"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _fit(self, name: str, u: Tensor | None, core: Tensor | None, v: Tensor | None) -> None:
        """Make room for what a file brings; it knows the number of directions, not the config.

        Raises
        ------
        MalformedFile, ShapeMismatch
        """
        if (u is None) != (v is None) or (core is None and u is not None):
            raise MalformedFile(
                "A module has only some of its lora_x_U, lora_x_S and lora_x_V.",
                fix="The file is incomplete; get it again.",
            )
        if core is None:
            return
        r = core.shape[0]
        if u is not None and v is not None:
            if u.shape != (self._rows, r) or v.shape != (self._columns, r):
                raise ShapeMismatch(
                    f"Bases {tuple(u.shape)} and {tuple(v.shape)} with {r} directions do not fit a "
                    f"weight {(self._rows, self._columns)}.",
                    fix="Load the adapter on the base it was trained on.",
                )
            for held, shape in ((self.lora_x_U, u.shape), (self.lora_x_V, v.shape)):
                if held[name].shape != shape:
                    held[name] = torch.empty(shape, device=held[name].device)
            self.pending.pop(name, None)
        old = self.lora_x_S[name]
        if old.shape != core.shape:
            room = torch.zeros(core.shape, device=old.device)
            self.lora_x_S[name] = nn.Parameter(room, requires_grad=old.requires_grad)
