"""SVDiff (arXiv 2303.11305): a trained shift of every singular value."""

from regraft.tuners.registration import register
from regraft.tuners.svdiff.combine import combine_shifts, interpolate_shifts
from regraft.tuners.svdiff.config import SVDiffConfig
from regraft.tuners.svdiff.layer import SVDiffLayer
from regraft.tuners.svdiff.model import SVDiffModel
from regraft.tuners.svdiff.spectral_shifts import load_spectral_shifts, write_spectral_shifts

register("svdiff", SVDiffConfig, SVDiffModel, SVDiffModel.prefix)

__all__ = [
    "SVDiffConfig",
    "SVDiffLayer",
    "SVDiffModel",
    "combine_shifts",
    "interpolate_shifts",
    "load_spectral_shifts",
    "write_spectral_shifts",
]
