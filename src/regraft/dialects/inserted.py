"""Adapters that change no weight (inserts): which files hold one, told from the config alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.errors import InputNotFound
from regraft.files import Located, TensorFile
from regraft.files.select import weight_files

#: PEFT's type → the family.
TYPES = {
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "prompt",
    "PREFIX_TUNING": "prefix",
    "BOTTLENECK": "bottleneck",
}
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class InsertFile:
    """A folder that holds an insert; ``config`` is what ``config_path`` says."""

    family: str
    folder: Path
    config_path: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    def open(self) -> TensorFile:
        """The weights.

        Raises
        ------
        InputNotFound, MalformedFile, PickleRefused
        """
        files = weight_files(self.folder)
        if not files:
            raise InputNotFound(
                "The folder holds no .safetensors adapter.",
                file=self.folder,
                fix=f"A PEFT folder has {_CONFIG} and {_WEIGHTS}.",
            )
        return TensorFile(files[0])


def insert_file(path: Path) -> InsertFile | None:
    """The insert at a path: a PEFT folder, or the weights file in one. None if it holds another
    family, or nothing says what it holds."""
    folder = path if path.is_dir() else path.parent if path.name == _WEIGHTS else None
    if folder is None or not (folder / _CONFIG).is_file():
        return None
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        return None  # the reader of the other families says what is wrong with it
    kind = str(config.get("peft_type", "")).upper() if isinstance(config, dict) else ""
    if kind not in TYPES:
        return None
    return InsertFile(TYPES[kind], folder, folder / _CONFIG, config)


def is_insert(located: Located) -> bool:
    """Whether it is a folder of a family that changes no weight."""
    return insert_file(located.path) is not None
