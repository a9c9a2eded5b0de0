"""LoRA-X: project the update onto the target's own singular subspaces.

Paper: "LoRA-X: Bridging Foundation Models with Training-Free Cross-Model Adaptation",
arXiv 2501.16559 (ICLR 2025).

* Eq. 1, adapter form: ΔW = Ũ ΔΣ Ṽᵀ with Ũ, Ṽ the top-r singular vectors of the base's weight.
* Eq. 3, transfer between equal shapes: ΔW_t = U_t U_tᵀ ΔW_s V_t V_tᵀ.
* Eq. 4, similarity: Φ_l = ‖U_sᵀ U_t‖²_F / k, Φ_r with V; sites below a threshold are left out
  (the paper gives no threshold: none is applied unless asked).
* §4.2.2, different shapes: P = argmin ‖P U_s − U_t‖. For truncated bases P U_s = U_t exactly, so
  it amounts to ΔW_t = U_t (U_sᵀ ΔW_s V_s) V_tᵀ, matching singular vectors by rank order. That says
  nothing about which directions mean the same, so it is off unless ``align="rank-order"``.

An ordinary LoRA has no reason to lie in the subspace: with ρ = k/d on both sides, a ΔW without
preferred direction keeps only ρ² of its energy.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from regraft.adapters import LowRank, Spectral, Update, balance, same_matrix
from regraft.adapters.decompose import svd
from regraft.adapters.update import Layout
from regraft.methods.copy import carry as copy
from regraft.methods.registry import Refusal, SiteJob, below_threshold, method, shapes_differ


@method(
    name="lora-x",
    title="Project onto the target's singular subspaces",
    paper="https://arxiv.org/abs/2501.16559",
    equations="Eq. 3 (transfer), Eq. 4 (similarity), Eq. 1 (adapter form)",
    needs=("weights of the target", "weights of the source when a threshold is set"),
    cost="one Gram matrix and eigh per target weight, once per base; then r-thin products",
    exact_on_identical="full",
    never_gains=True,
    default_threshold=0.0,
    keeps=lambda phi_l, phi_r, rho_l, rho_r, options: rho_l * rho_r,
    uses=("threshold", "align"),
)
def carry(job: SiteJob) -> Update | Refusal:
    """Eq. 3 on the factors; an adapter in LoRA-X form stays in it, in the target's bases."""
    low = below_threshold(job, default=0.0)
    if low is not None:
        return low
    if not same_matrix(job.source_shape, job.target_shape):
        if job.options.align == "rank-order" and not job.options.dimension.full:
            return _rank_order(job)
        return Refusal(shapes_differ(job))
    if job.options.dimension.full:
        return copy(job)
    target = job.library.subspace(job.target, job.target_site, job.options.dimension)
    if isinstance(job.update, Spectral):
        left, right = job.update.factors()
        core = (target.ut @ left) @ (right @ target.vt.mT)
        return replace(
            job.update, u=target.ut.mT, core=core, v=target.vt.mT, shape=job.target_shape
        )
    return _from_coefficients(job, target.ut, target.vt, target.ut, target.vt)


def as_low_rank(job: SiteJob, left: Tensor, right: Tensor, *, balanced: bool = False) -> LowRank:
    """left @ right as an update of the target's weight, in the input's layout."""
    if not balanced:
        left, right = balance(left, right)
    return LowRank(left, right, 1.0, job.target_shape, layout_of(job))


def layout_of(job: SiteJob) -> Layout:
    """The input's layout on the target's weight: linear and 1×1 convolution may change places."""
    if job.update.layout in ("linear", "conv"):
        return "conv" if len(job.target_shape) > 2 else "linear"
    return job.update.layout


def _rank_order(job: SiteJob) -> Update | Refusal:
    """§4.2.2 with the pseudo-inverse: coefficients in the source's bases, read in the target's."""
    source = job.library.subspace(job.source, job.source_site, job.options.dimension)
    target = job.library.subspace(job.target, job.target_site, job.options.dimension)
    k = min(source.k, target.k)
    return _from_coefficients(job, source.ut[:k], source.vt[:k], target.ut[:k], target.vt[:k])


def _from_coefficients(
    job: SiteJob, u_read: Tensor, v_read: Tensor, u_write: Tensor, v_write: Tensor
) -> LowRank:
    """Coefficients of ΔW in one pair of bases (rows), put back in another (rows).

    Balancing happens on the coefficients: orthonormal bases keep their norms, and they are smaller.
    """
    left, right = job.update.factors()
    c_left, c_right = u_read @ left, right @ v_read.mT
    if c_left.shape[1] > min(len(u_read), len(v_read)):  # no rank above the subspaces' own
        u, size, vh = svd(c_left @ c_right)
        c_left, c_right = u * size, vh
    c_left, c_right = balance(c_left, c_right)
    return as_low_rank(job, u_write.mT @ c_left, c_right @ v_write, balanced=True)
