"""A run's curves for TensorBoard.

Event files hold times and the machine's name, so they are beside the output, not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from regraft.errors import MissingDependency


def need_tensorboard() -> Any:
    """torch's writer of event files.

    Raises
    ------
    MissingDependency
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependency(
            "Writing for TensorBoard needs the package 'tensorboard'.",
            fix="pip install tensorboard, or leave out --tensorboard: log.csv has the same.",
        ) from error
    return SummaryWriter


def beside(output: Path) -> Path:
    """The folder of an output's event files."""
    return output.with_name(output.name + ".tensorboard")


class Events:
    """Writes nothing if it has no folder."""

    def __init__(self, folder: Path | None, done: int) -> None:
        self.writer: Any = None
        if folder is not None:
            # What an earlier run wrote of later steps is hidden.
            begun = done + 1 if done else 0
            self.writer = need_tensorboard()(log_dir=str(folder), purge_step=begun)

    def numbers(self, step: int, values: Mapping[str, float | None]) -> None:
        """One point of each curve that has a value."""
        if self.writer is not None:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)

    def picture(self, step: int, picture: UInt8[np.ndarray, "height width 3"]) -> None:
        if self.writer is not None:
            self.writer.add_image("pictures", picture, step, dataformats="HWC")

    def text(self, step: int, text: str) -> None:
        if self.writer is not None:
            self.writer.add_text("samples", text, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
