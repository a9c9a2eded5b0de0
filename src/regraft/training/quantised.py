"""Training on a quantised base: QLoRA, QA-LoRA and whatever else needs no 16-bit weight.

What is trained is fp32, the base stays in its few bits, and the adapter is made for the numbers
that those bits mean: W̃ = dequantised, not the weights W it was quantised from.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from regraft.errors import BadOption
from regraft.running.quantised import (
    TRAINED_ON,
    USUAL_GROUP,
    Storage,
    quantise,
    storage_of,
)
from regraft.training.settings import Settings

#: Families that run beside a packed weight. The others of PEFT take its bytes for numbers, or, as
#: PiSSA and SVDiff do, change the weight itself.
ON_PACKED = ("lora", "dora", "lora-x", "foura", "qa-lora", "bottleneck", "prompt", "prefix")


def quantised(settings: Settings, base: Any, kind: str) -> Storage:
    """Quantise the base if the settings ask for it, and say how its weights are stored.

    Returns
    -------
    Storage
        Falsy for an ordinary base.

    Raises
    ------
    BadOption
        The base cannot be quantised so, or the family does not train on a quantised base.
    MissingDependency
    """
    if settings.quantise is not None:
        besides: list[nn.Module] = []
        if kind == "language" and base.get_output_embeddings() is not None:
            besides = [base.get_output_embeddings()]
        storage = quantise(
            base, settings.quantise, group=settings.group or USUAL_GROUP, besides=besides
        )
    else:
        storage = storage_of(base)
    if storage and settings.family not in ON_PACKED:
        raise BadOption(
            f"{settings.family} does not train on a quantised base ({storage}).",
            fix=f"Choose one of {', '.join(ON_PACKED)}, or the base in 16 bits.",
        )
    return storage


def told(storage: Storage, settings: Settings) -> dict[str, Any]:
    """What ``training.json`` says of the base."""
    if not storage:
        return {}
    facts: dict[str, Any] = {
        "forms": dict(storage.forms),
        "held_unpacked": storage.held,
        "quantised_by": "its file" if settings.quantise is None else "this run",
    }
    return facts if storage.group is None else facts | {"group": storage.group}


def notes(storage: Storage, settings: Settings) -> list[str]:
    """What a reader of the result should know."""
    if not storage:
        return []
    found = [
        f"the base was quantised ({storage}): the adapter was trained on the dequantised weights, "
        "and they are the faithful source when it is carried"
    ]
    if storage.held:
        found.append(
            f"{storage.held} quantised weights were held unpacked, because bitsandbytes does not "
            "compute with them exactly on a CPU; the numbers are the same"
        )
    return found


def metadata(storage: Storage) -> dict[str, str]:
    """What the adapter's file itself says, for whoever carries it."""
    return {TRAINED_ON: str(storage)} if storage else {}
