"""(IA)³: inputs or outputs are multiplied by a learned vector.

Paper: arXiv 2205.05638. ΔW = W0 ⊙ (l − 1), l over rows or columns.

* PEFT: ``ia3_l`` is l, (1, in) before a feed-forward layer and (out, 1) otherwise, and on
  convolutions (1, k, 1, 1) for both, where on as many inputs as outputs only the config's
  ``feedforward_modules`` tells. On outputs it multiplies the whole output: Δb = b0 ⊙ (l − 1).
* LyCORIS: ``ia3_weight`` is l − 1, flat or (1, k, 1, 1), and ``on_input`` says which side. Its
  forward pass leaves the bias alone.
"""

from __future__ import annotations

from torch import Tensor

from regraft.adapters.families.registry import Built, Module, family
from regraft.adapters.families.views import changed, changed_bias, out_in
from regraft.adapters.patterns import matches
from regraft.errors import FamilyNotYet, ShapeMismatch


@family(
    name="ia3",
    title="(IA)³",
    paper="https://arxiv.org/abs/2205.05638",
    equation="ΔW = W0 ⊙ (l − 1)",
    needs=[("ia3_l",), ("ia3_weight", "on_input")],
    marks=("ia3_l", "ia3_weight", "on_input"),
    needs_base=True,
)
def build(module: Module) -> Built:
    """ΔW in full, and Δb where the writer's forward pass changes it."""
    m, n = out_in(module)
    channels = module.shape[0] if module.layout == "transposed" else module.shape[1]
    if "ia3_l" in module.tensors:
        role = "ia3_l"
        more = module.tensors[role].float().flatten() - 1
        on_input = _peft_on_input(module, m, channels)
    else:
        role = "ia3_weight"
        more = module.tensors[role].float().flatten()
        if module.tensors["on_input"].numel() != 1:
            raise ShapeMismatch("on_input is not a single value.")
        on_input = bool(module.tensors["on_input"].item())
    if more.numel() != (channels if on_input else m):
        raise ShapeMismatch(f"{more.numel()} factors do not fit a weight {module.shape}.")
    factor = more.repeat_interleave(n // channels)[None] if on_input else more[:, None]
    stored = module.tensors[role].dtype
    built: Built = {"weight": changed(module, lambda w: w + w * factor, stored)}
    if role == "ia3_l" and not on_input:
        bias = changed_bias(module, lambda b: b + b * more)
        if bias is not None:
            built["bias"] = bias
    return built


def _peft_on_input(module: Module, m: int, channels: int) -> bool:
    vector: Tensor = module.tensors["ia3_l"]
    if vector.ndim == 2 and 1 in vector.shape and vector.numel() > 1:
        return vector.shape[0] == 1
    if m != channels:
        return vector.numel() == channels
    said = module.settings.get("feedforward_modules")
    if said is None:
        raise FamilyNotYet(
            "This (IA)³ vector fits inputs and outputs, and no config says which it multiplies.",
            fix="Put its adapter_config.json beside it.",
        )
    name = module.name.removeprefix("base_model.model.")
    if isinstance(said, str):
        return matches(said, name)
    return any(name == end or name.endswith(f".{end}") for end in said)
