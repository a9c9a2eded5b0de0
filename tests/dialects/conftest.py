"""The tiny bases that the dialect tests share; models are never changed, only copied."""

from __future__ import annotations

import pytest

from regraft.bases import open_base
from tests.factories import TINY_SD, TINY_XL, clip, gpt2, llama, pipeline_folder, save, unet


@pytest.fixture(scope="session")
def sd_models():
    return unet(TINY_SD), clip()


@pytest.fixture(scope="session")
def xl_models():
    return unet(TINY_XL), clip(), clip(1, projection=True)


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    return open_base(pipeline_folder(tmp_path_factory.mktemp("bases") / "sd", TINY_SD))


@pytest.fixture(scope="session")
def xl(tmp_path_factory):
    return open_base(pipeline_folder(tmp_path_factory.mktemp("bases") / "xl", TINY_XL))


@pytest.fixture(scope="session")
def llama_model():
    return llama()


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory, llama_model):
    return open_base(save(llama_model, tmp_path_factory.mktemp("bases") / "llama"))


@pytest.fixture(scope="session")
def gpt2_model():
    return gpt2()


@pytest.fixture(scope="session")
def gpt2_base(tmp_path_factory, gpt2_model):
    return open_base(save(gpt2_model, tmp_path_factory.mktemp("bases") / "gpt2"))
