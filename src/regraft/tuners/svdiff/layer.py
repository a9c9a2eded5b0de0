"""SVDiff on one layer.

Paper: arXiv 2303.11305 (ICCV 2023). With W0 = U diag(σ) Vᵀ, convolutions seen as out × in·kh·kw and
a vector (d,) as 1 × d, of one singular value:

    W = U diag(ReLU(σ + Σᵢ γᵢ δᵢ)) Vᵀ        δ = 0 at first, one per active adapter i

so that adapters add up inside the ReLU, and merging several is not merging each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regraft.tuners.layer import DeltaLayer, exact, wide
from regraft.tuners.svdiff.config import SVDiffConfig


class SVDiffLayer(DeltaLayer):
    """A linear, convolution, Conv1D, embedding or norm layer with SVDiff adapters."""

    adapter_layer_names = ("delta",)
    svd_u: Tensor | None
    svd_s: Tensor
    svd_vh: Tensor

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.delta = nn.ParameterDict()
        # One decomposition for all adapters, never saved.
        self.register_buffer("svd_u", None, persistent=False)
        self.register_buffer("svd_s", None, persistent=False)
        self.register_buffer("svd_vh", None, persistent=False)

    def update_layer(self, adapter_name: str, config: SVDiffConfig) -> None:
        """Add an adapter. One that is made for loading decomposes when it is first used."""
        if not config.inference_mode:
            self.decomposed()
        size = min(self._rows, self._columns)
        self.delta[adapter_name] = nn.Parameter(torch.zeros(size))
        self._ready(adapter_name, config.inference_mode)

    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U, σ, Vᵀ) of the base's weight in fp32, computed once.

        Again if the model was cast since: bases in half precision are of no use.
        """
        if self.svd_u is None or self.svd_u.dtype.itemsize < 4:
            with exact(self.base_weight()):
                found = torch.linalg.svd(self.base_matrix(), full_matrices=False)
                self.svd_u, self.svd_s, self.svd_vh = (part.contiguous() for part in found)
        return self.svd_u, self.svd_s, self.svd_vh

    def factors(self, scales: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        u, s, vh = self.decomposed()
        shifts = [wide(self.delta[name]) * scale for name, scale in scales.items()]
        # ReLU(σ + γδ) − σ, without the rounding of adding and taking away σ.
        change = torch.maximum(torch.stack(shifts).sum(dim=0), -s)
        return u * change, vh
