from __future__ import annotations

import pytest

from tests.methods.worlds import make_world


@pytest.fixture
def world(tmp_path):
    """A folder with v1, v2, stranger and lora.safetensors."""
    return make_world(tmp_path)
