"""What the configs of all tuners share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from regraft.errors import BadOption


def exactly(names: Iterable[str]) -> str:
    """A ``target_modules`` pattern that means these modules and no others."""
    return "|".join(re.escape(name) for name in sorted(names))


@dataclass
class TunerConfig(PeftConfig):  # type: ignore[misc]
    """Which modules a tuner changes.

    Parameters
    ----------
    target_modules : list of str, str or None
        As in PEFT: ends of names, a pattern for whole names, or "all-linear".
    exclude_modules : list of str, str or None
    modules_to_save : list of str or None
        Modules trained whole and saved beside the adapter.
    layers_to_transform : list of int, int or None
    layers_pattern : list of str, str or None
    base_hashes : dict
        Module → SHA-256 of the base's weight, for tuners whose file needs that very weight. Filled
        in when the adapter is made; checked when it is loaded.
    check_base : bool
        Refuse a base whose weights are not those of ``base_hashes``.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: list[str] | None = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    base_hashes: dict[str, str] = field(default_factory=dict)
    check_base: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        #: Hashes written by this very object speak of the base it was last used on, not of a file.
        self.own_hashes = False
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list | tuple):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise BadOption(
                "layers_to_transform does not go with a pattern in target_modules.",
                fix="Name the layers in the pattern, or give target_modules as a list.",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise BadOption(
                "layers_pattern needs layers_to_transform.", fix="Give both, or neither."
            )

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, sets as sorted lists, so that the same adapter has the same text.

        ``inference_mode`` is what PEFT writes into every folder; diffusers writes what it finds.
        """
        plain: dict[str, Any] = super().to_dict() | {"inference_mode": True}
        return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}
