"""Full differences: the change itself, of a weight, a bias, or a normalisation.

Written by LyCORIS ("full", and its norm modules), sd-scripts' and ComfyUI's extraction, ai-toolkit.

* ``diff``, ``w_norm``: ΔW. ``diff_b``, ``b_norm``: Δb. No alpha, scale 1.
"""

from __future__ import annotations

from torch import Tensor

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.update import Dense, Layout
from regraft.errors import ShapeMismatch


def dense(change: Tensor, shape: tuple[int, ...] | None = None, layout: Layout = "linear") -> Dense:
    """An update that is known as a whole."""
    return Dense(lambda: change.float(), shape or tuple(change.shape), layout, stored=change.dtype)


@family(
    name="full",
    title="full difference",
    paper="https://arxiv.org/abs/2309.14859",
    equation="ΔW = diff, Δb = diff_b",
    needs=[("diff",), ("diff_b",), ("w_norm",), ("b_norm",)],
    may=("diff", "diff_b", "w_norm", "b_norm"),
    marks=("diff", "diff_b", "w_norm", "b_norm"),
)
def build(module: Module) -> Built:
    """ΔW and Δb as they are."""
    built: Built = {}
    for role, change in module.tensors.items():
        if change.ndim == 0:
            raise ShapeMismatch(f"The change {role} is a single number.")
    for role in ("diff", "w_norm"):
        if role in module.tensors:
            built["weight"] = dense(module.tensors[role], module.shape, module.layout)
    for role in ("diff_b", "b_norm"):
        if role in module.tensors:
            built["bias"] = dense(module.tensors[role])
    return built
