"""What every test gets: its own cache folder, and no network."""

from __future__ import annotations

import os

import pytest

# huggingface_hub and transformers read these when they are imported, before any fixture runs.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path_factory.mktemp("cache", numbered=True)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
