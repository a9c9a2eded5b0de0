"""What is tried on every adapter: methods with their options, and what is run beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A method with its options, as ``regraft transfer`` would be told."""

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    curve: bool = True

    def applies(self, upgrade: str) -> bool:
        """Whether it is run for this upgrade."""
        return not self.only or upgrade in self.only


#: The lab's weights are narrower than the paper's dimension of 320, so there lora-x keeps every
#: direction of one side; the share of energy shows what a real cut does.
VARIANTS = (
    Variant("auto", "auto", curve=False),
    Variant("copy", "copy"),
    Variant("copy, by name", "copy", {"pairing": "name"}, ("pruned",), curve=False),
    Variant("lora-x", "lora-x"),
    Variant("lora-x, 90 % of energy", "lora-x", {"dimension": 0.9}, curve=False),
    Variant(
        "lora-x, rank order", "lora-x", {"align": "rank-order", "pairing": "name"}, ("bigger",)
    ),
    Variant("prolora", "prolora"),
    Variant("prolora, cross terms", "prolora", {"cross_terms": True}),
)
_BY_NAME = {variant.name: variant for variant in VARIANTS}
#: For every family with a ΔW. 32 directions are a real cut of these weights, as the paper's 320 are
#: of SDXL's, and what ``lora-x-32`` is trained in.
DELTAS = (
    _BY_NAME["auto"],
    _BY_NAME["copy"],
    _BY_NAME["lora-x"],
    Variant("lora-x, 32 directions", "lora-x", {"dimension": 32}),
    _BY_NAME["lora-x, rank order"],
    _BY_NAME["prolora"],
    _BY_NAME["prolora, cross terms"],
)
#: For what has no ΔW.
INSERTS = (
    Variant("auto", "auto"),
    Variant("copy", "copy"),
    Variant("activation-map", "activation-map"),
)
#: LoRA-X's tables: its own form against forms that were not made to be transferred
COMPARED = ("lora-x-32", "lora-x-32-full", "lora-x", "lora", "dora", "foura")
RETRAINED = "retrained"
RANDOM = "random"
STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
