"""Every error a user can meet: what happened, in which file and tensor, and what to do.

All derive from :class:`RegraftError`. ``exit_code`` is what the command line returns:
1 the work failed, 2 the input or the usage is at fault, 3 nothing could be concluded.
"""

from __future__ import annotations

from os import PathLike
from typing import Any


class RegraftError(Exception):
    """Base of every error that Regraft raises on purpose.

    Parameters
    ----------
    what : str
        What happened, one sentence.
    fix : str
        What the user can do about it, one sentence.
    file, tensor : optional
        Where it happened.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        fix: str = "",
        file: str | PathLike[str] | None = None,
        tensor: str | None = None,
    ) -> None:
        self.what = what
        self.fix = fix
        self.file = None if file is None else str(file)
        self.tensor = tensor
        super().__init__(str(self))

    def __str__(self) -> str:
        where = "".join(
            [
                f" [file: {self.file}]" if self.file else "",
                f" [tensor: {self.tensor}]" if self.tensor else "",
            ]
        )
        return f"{self.what}{where}" + (f" {self.fix}" if self.fix else "")


class InputNotFound(RegraftError):
    """No file, folder or hub repository answers to the name given."""


class HubUnavailable(RegraftError):
    """The hub could not be asked, or it refused (offline, no such repository, gated)."""


class PickleRefused(RegraftError):
    """The file is a pickle (or a zip of one): loading it could run code."""


class MalformedFile(RegraftError):
    """The bytes are not what the file's name promises (header, offsets, JSON, truncation)."""


class NonFiniteTensor(RegraftError):
    """A tensor holds NaN or infinity, so nothing computed from it would mean anything."""


class NotAnAdapter(RegraftError):
    """The file is readable but holds no adapter that Regraft knows."""


class NotABase(RegraftError):
    """The file or folder is readable but holds no weights an adapter could sit on."""


class UnknownKeys(RegraftError):
    """Some tensors of the adapter fit no rule; nothing is dropped in silence."""


class FamilyNotYet(RegraftError):
    """The adapter belongs to a family that this version does not read."""


class SitesNotInBase(RegraftError):
    """The adapter names modules that the base it is said to be made for does not have."""


class ShapeMismatch(RegraftError):
    """An update does not fit the weight it names."""


class BadOption(RegraftError):
    """An option has a value that cannot be used, or two options exclude each other."""


class UnknownMethod(RegraftError):
    """No transfer method has this name."""


class OutputExists(RegraftError):
    """The output is already there and overwriting was not asked for."""


class OutputFailed(RegraftError):
    """The output could not be written; nothing half-written was left behind."""

    exit_code = 1


class NothingCarried(RegraftError):
    """The result would change nothing on the target, so no file was written."""

    exit_code = 1


class NotRecommended(RegraftError):
    """The verdict is "don't": no method of this version is expected to work on this pair.

    ``result`` holds the evidence, for ``--json``.
    """

    exit_code = 1
    result: Any = None


class MissingDependency(RegraftError):
    """An optional package is needed for this command."""


class CannotRun(RegraftError):
    """The base can be found, but Regraft cannot run it as a model."""


class BadData(RegraftError):
    """The data to measure on cannot be used: empty, unreadable, or not for this kind of base."""


class WrongBase(RegraftError):
    """An adapter's file means something only on the weights it was trained on, not on these."""


class QuantisedWeight(RegraftError):
    """A change cannot be put into a quantised weight without being rounded."""


class CannotMerge(RegraftError):
    """The adapter has no ΔW, or the base is stored in a form that is read but not written."""
