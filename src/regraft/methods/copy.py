"""Plain copying: ΔW_t = ΔW_s. The baseline every other method has to beat.

Paper: PortLLM, arXiv 2410.10870 (ICLR 2025), which copies LoRAs onto continued pre-trainings.
Equation: θ'_t ≈ θ_t + Δθ_s (its Eq. 3).
"""

from __future__ import annotations

from regraft.adapters import Update, same_matrix
from regraft.adapters.update import Layout
from regraft.methods.registry import Refusal, SiteJob, method, shapes_differ


@method(
    name="copy",
    title="Copy the update as it is",
    paper="https://arxiv.org/abs/2410.10870",
    equations="θ'_t ≈ θ_t + Δθ_s",
    needs=("equal shapes",),
    cost="reading and writing the adapter",
    exact_on_identical="always",
    never_gains=True,
    default_threshold=0.0,
    keeps=lambda phi_l, phi_r, rho_l, rho_r, options: 1.0,
)
def carry(job: SiteJob) -> Update | Refusal:
    """ΔW unchanged. A 1×1 convolution and a linear weight of the same numbers count as equal."""
    if not same_matrix(job.source_shape, job.target_shape):
        return Refusal(shapes_differ(job))
    if job.source_shape == job.target_shape:
        return job.update
    layout: Layout = "conv" if len(job.target_shape) > 2 else "linear"
    return job.update.on(job.target_shape, layout)
