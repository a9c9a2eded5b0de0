"""How alike two weights are: as numbers (cosine) and as subspaces (Φ).

LoRA-X (arXiv 2501.16559) Eq. 4: Φ_l(W_s, W_t) = ‖U_sᵀ U_t‖²_F / k, and Φ_r with V.
1 means the same subspace; two unrelated subspaces of dimension k in d have Φ = k / d by chance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import sqrt

from torch import Tensor

from regraft.subspaces.engine import Subspace

#: Entries compared at a time: fp64 copies of a whole wide weight would cost 0.4 GB.
_SLICE = 1 << 20


@dataclass(frozen=True)
class Closeness:
    """Two weights of one shape, compared.

    ``difference`` is ‖W_t − W_s‖ / ‖W_s‖; ``cosine`` is ⟨W_s, W_t⟩ / (‖W_s‖ ‖W_t‖).
    """

    cosine: float
    difference: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def closeness(source: Tensor, target: Tensor) -> Closeness:
    """Compare two weights of the same shape; sums in fp64, a slice at a time."""
    dot = size_a = size_b = moved = 0.0
    a, b = source.flatten(), target.flatten()
    for start in range(0, a.numel(), _SLICE):
        x, y = a[start : start + _SLICE].double(), b[start : start + _SLICE].double()
        dot += float(x @ y)
        size_a += float(x @ x)
        size_b += float(y @ y)
        y -= x
        moved += float(y @ y)
    if size_a == 0 or size_b == 0:
        # A zero weight has no direction; two of them are the same weight.
        return Closeness(1.0, 0.0) if size_a == size_b else Closeness(0.0, 1.0)
    return Closeness(dot / sqrt(size_a * size_b), sqrt(moved / size_a))


def overlap(source: Tensor, target: Tensor) -> float:
    """Φ of two orthonormal bases given as rows, (k, d) and (k', d): ‖U_sᵀU_t‖²_F / min(k, k')."""
    return float((source @ target.mT).square().sum()) / min(source.shape[0], target.shape[0])


def phi(source: Subspace, target: Subspace) -> tuple[float, float]:
    """(Φ_l, Φ_r) of two weights of the same shape."""
    return overlap(source.ut, target.ut), overlap(source.vt, target.vt)
