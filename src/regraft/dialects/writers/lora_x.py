"""lora-x: Regraft's own form of LoRA-X, U ΔΣ Vᵀ (docs/formats.md).

(m, n) is the shape of the weight as the base stores it, so layers that store (in, out) and
embedding tables are held like any other.
"""

from __future__ import annotations

from regraft.adapters import RankRule, Site, Spectral, Update, cut
from regraft.adapters.algebra import svd_of_product
from regraft.dialects.writers.factors import held_in_factors
from regraft.dialects.writers.registry import Refused, Task, Tensors, Writer, register
from regraft.parallel import in_order


def spectral(update: Update) -> Spectral:
    """The update as U ΔΣ Vᵀ: its own singular bases and a diagonal core. Exact."""
    if isinstance(update, Spectral):
        return update
    exact = update if held_in_factors(update) else cut(update, RankRule("exact"))
    u, s, vh = svd_of_product(*exact.factors())
    return Spectral(u, s, vh.mT.contiguous(), update.shape, update.layout)


def refused(task: Task) -> Refused:
    """Biases: the form is for weights."""
    return {
        site: "LoRA-X files hold weights, no biases"
        for site in task.adapter.updates
        if site.parameter == "bias"
    }


def tensors(task: Task) -> Tensors:
    """Every tensor of the file, one site at a time. The core stays fp32: it is small."""

    def work(item: tuple[Site, Update]) -> Tensors:
        site, form = item[0], spectral(item[1])
        return {
            f"{site}.lora_x_U": form.u.to(task.dtype),
            f"{site}.lora_x_S": form.core.float(),
            f"{site}.lora_x_V": form.v.to(task.dtype),
        }

    sites = task.adapter.updates.items()
    return {key: tensor for part in in_order(work, sites) for key, tensor in part.items()}


WRITER = register(
    Writer(
        name="lora-x",
        read_by="single .safetensors in LoRA-X form, U ΔΣ Vᵀ (docs/formats.md)",
        refused=refused,
        tensors=tensors,
        holds="weights of every kind, as the base stores them",
    )
)
