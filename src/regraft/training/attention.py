"""Cross-attention maps of a U-Net while it trains.

diffusers lets every attention layer have a processor; here each one of a cross-attention is put
into a wrapper that also computes the map, so no class is changed and the layers' outputs stay what
they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import CannotRun


class CrossAttention:
    """Keeps the cross-attention maps of some rows of a batch."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._found: list[Tensor] | None = None

    @contextmanager
    def watching(self, unet: nn.Module) -> Iterator[None]:
        """Watch a U-Net inside; its own processors are back afterwards.

        Raises
        ------
        CannotRun
            It has no cross-attention.
        """
        layers: list[Any] = [
            module
            for module in unet.modules()
            if hasattr(module, "set_processor") and getattr(module, "is_cross_attention", False)
        ]
        if not layers:
            raise CannotRun("The U-Net has no cross-attention.", fix="Leave out unmix_weight.")
        before = [layer.processor for layer in layers]
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(_Watched(processor, self))
        try:
            yield
        finally:
            for layer, processor in zip(layers, before, strict=True):
                layer.set_processor(processor)

    def begin(self, rows: Sequence[int]) -> None:
        """Keep the maps of these rows from now on; of none if there are none."""
        self._rows = torch.tensor(rows) if rows else None
        self._found = []

    def take(self) -> list[Tensor]:
        """The maps since :meth:`begin`, one of each layer: (rows, h, w, tokens), mean of heads.

        Gradient checkpointing runs layers a second time; what that would add is not kept.
        """
        found, self._found = self._found or [], None
        return found

    def see(self, attention: Any, hidden: Tensor, told: Tensor) -> None:
        """Compute one layer's map: the softmax of q k / √d over the tokens."""
        if self._rows is None:
            return
        rows = self._rows.to(hidden.device)
        told = told[rows]
        if attention.norm_cross:
            told = attention.norm_encoder_hidden_states(told)
        query = attention.head_to_batch_dim(attention.to_q(hidden[rows]))
        key = attention.head_to_batch_dim(attention.to_k(told))
        shares = attention.get_attention_scores(query, key)
        side = round(hidden.shape[1] ** 0.5)  # pictures are square
        shares = shares.view(len(rows), -1, side, side, shares.shape[-1]).mean(dim=1)
        if self._found is not None:
            self._found.append(shares.float())


class _Watched:
    """An attention processor that is watched."""

    def __init__(self, inner: Any, maps: CrossAttention) -> None:
        self.inner, self.maps = inner, maps

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            self.maps.see(attn, hidden_states, encoder_hidden_states)
        found: Tensor = self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        return found
