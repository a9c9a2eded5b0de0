"""What PEFT writes: its folder, its file alone, a state dict saved by hand; and what is refused."""

from __future__ import annotations

from typing import Any

from tests.wild.catalogue import add
from tests.wild.made import peft, refused
from tests.wild.places import SD, Q

LLAMA = "model.layers.1.self_attn.q_proj"
