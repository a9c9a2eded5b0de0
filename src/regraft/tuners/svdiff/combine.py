"""Adding and interpolating saved shifts: files in, a file of the same form out, no model.

Paper: arXiv 2303.11305, section 3 (combining spectral shifts) and figure 9 (interpolation):
δ = Σᵢ wᵢ δᵢ, inside the ReLU; weights 1 and 1 add two concepts, 1 − α and α go from one to the
other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.errors import BadOption, NotAnAdapter, ShapeMismatch, SitesNotInBase, WrongBase
from regraft.files import TensorFile, atomic_file, atomic_folder, serialize
from regraft.files.select import weight_files
from regraft.tuners.saved import settings_of

_END = ".delta"


def combine_shifts(
    sources: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the weighted sum of saved shifts, δ = Σ wᵢ δᵢ.

    Parameters
    ----------
    sources : sequence of str or Path
        Files of svdiff-pytorch (``spectral_shifts.safetensors``) or of diffusers, or PEFT folders;
        all of one form.
    output : str or Path
        A file or folder of that form. Its settings are the first source's.
    weights : sequence of float, optional
        One for each source; default 1, which adds them.
    overwrite : bool

    Returns
    -------
    Path
        The output.

    Raises
    ------
    InputNotFound, MalformedFile
    NotAnAdapter
        A source holds something other than shifts.
    SitesNotInBase
        They change different modules.
    ShapeMismatch, WrongBase
        They were made on different bases. Files without hashes are told apart by sizes only.
    BadOption
        Unlike forms, no source, or not one finite weight for each.
    OutputExists, OutputFailed
    """
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if not sources or len(weights) != len(sources):
        raise BadOption(
            f"{len(weights)} weights for {len(sources)} sources.", fix="Give one for each."
        )
    if not all(isfinite(w) for w in weights):
        raise BadOption("A weight is not finite.", fix="1 takes the shifts as they are.")
    first, *others = (_read(Path(source)) for source in sources)
    for other in others:
        _check_same_base(first, other)
    total = {
        key: torch.stack(
            [s.shifts[key].double() * w for s, w in zip((first, *others), weights, strict=True)]
        )
        .sum(dim=0)
        .to(shift.dtype)
        for key, shift in first.shifts.items()
    }
    return _write(first, total, Path(output), overwrite)


def interpolate_shifts(
    first: str | Path,
    second: str | Path,
    share: float,
    output: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write δ = (1 − share) δ₁ + share δ₂: ``share`` 0 is the first, 1 the second.

    The rest is :func:`combine_shifts`'s.
    """
    return combine_shifts([first, second], output, [1.0 - share, share], overwrite=overwrite)


@dataclass(frozen=True)
class _Saved:
    """Saved shifts: key → δ, and what says which base they are of."""

    path: Path
    folder: bool
    shifts: dict[str, Tensor]
    metadata: dict[str, str]
    settings: dict[str, Any]

    @property
    def hashes(self) -> dict[str, str]:
        found = self.settings.get("base_hashes")
        return found if isinstance(found, dict) else {}


def _read(path: Path) -> _Saved:
    folder = path.is_dir()
    found = weight_files(path) if folder else [path]
    file = TensorFile(found[0] if found else path / "adapter_model.safetensors")
    strange = [key for key in file if not key.endswith(_END)]
    if strange or not len(file):
        raise NotAnAdapter(
            "It holds something other than spectral shifts.",
            file=file.path,
            tensor=strange[0] if strange else None,
            fix="Only shifts can be added; modules saved whole beside them cannot.",
        )
    shifts = {key: file.read(key, finite=True).flatten() for key in file}
    settings = settings_of(file) if folder or "lora_adapter_metadata" in file.metadata else {}
    return _Saved(path, folder, shifts, dict(file.metadata), settings)


def _check_same_base(one: _Saved, other: _Saved) -> None:
    if one.folder != other.folder:
        raise BadOption(
            f"{one.path.name} and {other.path.name} are saved in different forms.",
            fix="Give files of svdiff-pytorch, or PEFT folders, not both.",
        )
    if odd := sorted(one.shifts.keys() ^ other.shifts.keys()):
        raise SitesNotInBase(
            f"The shifts of {one.path.name} and {other.path.name} change different modules "
            f"({len(odd)} are in one only).",
            file=other.path,
            tensor=odd[0],
            fix="Combine adapters that change the same modules.",
        )
    for key, shift in one.shifts.items():
        if shift.shape != other.shifts[key].shape:
            raise ShapeMismatch(
                f"{shift.numel()} and {other.shifts[key].numel()} shifts: of different bases.",
                file=other.path,
                tensor=key,
                fix="Combine adapters that were trained on one base.",
            )
    for module in one.hashes.keys() & other.hashes.keys():
        if one.hashes[module] != other.hashes[module]:
            raise WrongBase(
                f"{one.path.name} and {other.path.name} were trained on different weights of "
                f"{module}; their shifts mean different directions there.",
                file=other.path,
                fix="Combine adapters that were trained on one base, in one dtype.",
            )


def _write(first: _Saved, shifts: dict[str, Tensor], output: Path, overwrite: bool) -> Path:
    if not first.folder:
        with atomic_file(output, overwrite=overwrite) as temporary:
            serialize(temporary, shifts, first.metadata)
        return output
    with atomic_folder(output, overwrite=overwrite) as temporary:
        serialize(temporary / "adapter_model.safetensors", shifts, first.metadata)
        text = json.dumps(first.settings, indent=2, sort_keys=True)
        (temporary / "adapter_config.json").write_text(text, encoding="utf-8")
    return output
