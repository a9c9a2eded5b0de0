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
RETRAINED = "retrained"
RANDOM = "random"
STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
