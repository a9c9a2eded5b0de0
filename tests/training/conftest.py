"""What the training tests share."""

from __future__ import annotations

import pytest
import torch

from tests.running import bases


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Stable Diffusion pipeline of 100 kB, and a folder of pictures with captions."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("tiny")
    bases.stable_diffusion_folder(folder / "sd")
    (folder / "pictures").mkdir()
    for i, name in enumerate("abcdef"):
        Image.new("RGB", (20, 16), (40 * i, 200 - 30 * i, 90)).save(folder / f"pictures/{name}.png")
        (folder / f"pictures/{name}.txt").write_text(name)
    return {"base": str(folder / "sd"), "data": str(folder / "pictures")}
