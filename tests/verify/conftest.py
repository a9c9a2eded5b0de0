"""One transfer between two small bases, to be verified."""

from __future__ import annotations

import pytest

import regraft
from tests.methods.worlds import make_world, new_library


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def library(world):
    return new_library(world / "cache")


@pytest.fixture
def carried(world, library, tmp_path):
    """A transfer's output, and the inputs that verify needs."""
    out = tmp_path / "out.safetensors"
    regraft.transfer(
        world / "lora.safetensors",
        source=world / "v1",
        target=world / "v2",
        output=out,
        method="lora-x",
        dimension=6,
        threshold=0.1,
        filter_blocks=["conv"],
        library=library,
    )
    inputs = {
        "adapter": world / "lora.safetensors",
        "source": world / "v1",
        "target": world / "v2",
        "library": library,
    }
    return out, inputs
