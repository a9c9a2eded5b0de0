"""Every case: who writes which family in which dialect, on which kind of layer."""

from __future__ import annotations

from tests.wild import (
    catalogue_lora,
    catalogue_lycoris,
    catalogue_peft,
    catalogue_refused,
    catalogue_tools,
    catalogue_trainers,
)
from tests.wild.case import Case

CASES: list[Case] = [
    *catalogue_lora.CASES,
    *catalogue_tools.CASES,
    *catalogue_lycoris.CASES,
    *catalogue_trainers.CASES,
    *catalogue_peft.CASES,
    *catalogue_refused.CASES,
]
