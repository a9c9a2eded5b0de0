"""Versions that can change a result's bits, for provenance."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from regraft.subspaces.engine import ENGINE


def regraft_version() -> str:
    """The installed version."""
    try:
        return version("regraft")
    except PackageNotFoundError:
        return "0+unknown"


def versions() -> dict[str, str]:
    """regraft, its decomposition engine, and torch."""
    return {"regraft": regraft_version(), "engine": ENGINE, "torch": torch.__version__}
