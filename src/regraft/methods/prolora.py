"""ProLoRA: carry the part inside the singular subspace and the part in its null space.

Paper: "Zero-Shot Adaptation of Parameter-Efficient Fine-Tuning in Diffusion Models",
arXiv 2506.04244 (ICML 2025).

With P_s = U_s U_sᵀ, R_s = V_s V_sᵀ of the source, P_t, R_t of the target, and Q = I − P, S = I − R:

* decomposition: ΔW_s∥ = P_s ΔW_s R_s, ΔW_s⊥ = Q_s ΔW_s S_s;
* transfer: ΔW_t = P_t ΔW_s∥ R_t + Q_t ΔW_s⊥ S_t.

As published, the cross terms P ΔW S and Q ΔW R are dropped: with ρ = k/d a ΔW without preferred
direction keeps ρ² + (1 − ρ)² of its energy even between identical bases, at worst one half.
``cross_terms=True`` keeps them: ΔW_t = (P_t P_s + Q_t Q_s) ΔW_s (R_s R_t + S_s S_t).
Sites with min(Φ_l, Φ_r) below 0.8 are left out, as notes on the paper say.

The null-space bases are never formed: Q x = x − P x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regraft.adapters import Update, delta, matrix_shape, same_matrix
from regraft.adapters.update import Dense
from regraft.methods.copy import carry as copy
from regraft.methods.lora_x import as_low_rank, layout_of
from regraft.methods.registry import (
    MethodOptions,
    Refusal,
    SiteJob,
    below_threshold,
    method,
    shapes_differ,
)
from regraft.subspaces import Subspace

#: From notes on the paper; whether it is meant for Φ or for the effective rank is unclear.
THRESHOLD = 0.8


def _keeps(phi_l: float, phi_r: float, rho_l: float, rho_r: float, options: MethodOptions) -> float:
    """E‖ΔW_t‖² / ‖ΔW_s‖² for isotropic ΔW: ‖P_t P_s‖²_F = kΦ and ‖Q_t Q_s‖²_F = d − 2k + kΦ."""
    par_l, par_r = rho_l * phi_l, rho_r * phi_r
    null_l, null_r = max(0.0, 1 - 2 * rho_l + par_l), max(0.0, 1 - 2 * rho_r + par_r)
    kept = par_l * par_r + null_l * null_r
    return kept + (par_l * null_r + null_l * par_r if options.cross_terms else 0.0)


def _project(rows: Tensor, x: Tensor) -> Tensor:
    """Rᵀ R x for an orthonormal basis given as rows R, (k, d), and x, (d, r)."""
    return rows.mT @ (rows @ x)


def _split(source: Tensor, target: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(P_t P_s x, Q_t Q_s x) for bases given as rows."""
    inside = _project(source, x)
    outside = x - inside
    return _project(target, inside), outside - _project(target, outside)


@method(
    name="prolora",
    title="Carry subspace and null-space parts separately",
    paper="https://arxiv.org/abs/2506.04244",
    equations="decomposition into ∥ and ⊥ parts and their transfer (§3); Φ ≥ 0.8",
    needs=("weights of the source", "weights of the target"),
    cost="one Gram matrix and eigh per weight of both bases, once per base; then r-thin products",
    exact_on_identical="full",
    never_gains=True,
    default_threshold=THRESHOLD,
    keeps=_keeps,
    uses=("threshold", "cross_terms"),
)
def carry(job: SiteJob) -> Update | Refusal:
    """The two parts side by side (rank 2r), with cross terms one product of rank r; in full where
    that is no less."""
    if not same_matrix(job.source_shape, job.target_shape):
        return Refusal(shapes_differ(job))
    if job.options.dimension.full:
        return copy(job)
    low = below_threshold(job, default=THRESHOLD)
    if low is not None:
        return low
    source = job.library.subspace(job.source, job.source_site, job.options.dimension)
    target = job.library.subspace(job.target, job.target_site, job.options.dimension)
    if job.update.rank > min(matrix_shape(job.target_shape)) // 2:
        return _in_full(job, source, target)
    left, right = job.update.factors()
    left_in, left_out = _split(source.ut, target.ut, left)
    right_in, right_out = _split(source.vt, target.vt, right.mT)
    if job.options.cross_terms:
        return as_low_rank(job, left_in + left_out, (right_in + right_out).mT)
    return as_low_rank(
        job,
        torch.cat([left_in, left_out], dim=1),
        torch.cat([right_in, right_out], dim=1).mT,
    )


def _in_full(job: SiteJob, source: Subspace, target: Subspace) -> Dense:
    """The same on ΔW itself: with 2r above the weight's smaller side, factors would outgrow it."""
    change = delta(job.update).reshape(matrix_shape(job.target_shape))
    inside, outside = _split(source.ut, target.ut, change)
    if job.options.cross_terms:
        one, other = _split(source.vt, target.vt, (inside + outside).mT)
    else:
        one = _split(source.vt, target.vt, inside.mT)[0]
        other = _split(source.vt, target.vt, outside.mT)[1]
    made = (one + other).mT.reshape(job.target_shape)
    return Dense(lambda: made, job.target_shape, layout_of(job), stored=job.update.dtype)
