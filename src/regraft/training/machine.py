"""Where a run is computed: the device, accelerate, and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from regraft.errors import BadOption


def known_device(name: str) -> str:
    """A device that is there.

    Raises
    ------
    BadOption
    """
    if name == "auto":
        return name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise BadOption(f"{name!r} is no device here: {said}", fix="Pass --device cpu.") from error
    return name


@contextmanager
def accelerating(precision: str, device: str) -> Iterator[Any]:
    """accelerate's, leaving no global state behind that was not there."""
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

    foreign = bool(AcceleratorState._shared_state)
    mixed = "no" if precision == "fp32" else precision
    try:
        try:
            made = Accelerator(mixed_precision=mixed, cpu=device == "cpu")
        except ValueError as error:
            raise BadOption(f"accelerate refuses: {error}", fix="Pass --precision fp32.") from error
        if made.num_processes > 1:
            raise BadOption("Training runs in one process.", fix="Start it without a launcher.")
        yield made
    finally:
        if not foreign:
            AcceleratorState._reset_state(reset_partial_state=True)


def checkpoint_gradients(base: Any, kind: str) -> None:
    try:
        if kind == "language":
            base.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            base.enable_gradient_checkpointing()
    except ValueError as error:
        raise BadOption(f"No gradient checkpointing: {error}", fix="Leave it out.") from error
