"""Loading a saved adapter onto a bare model: whole, or an error that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from regraft.errors import (
    MalformedFile,
    NonFiniteTensor,
    RegraftError,
    ShapeMismatch,
    SitesNotInBase,
)
from regraft.tuners import load_onto
from tests.tuners.cases import CASES, fill

OURS = [name for name, case in CASES.items() if case.ours]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def two(inputs: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Linear(8, inputs))


@pytest.fixture(params=OURS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What PEFT saves of a tuner."""
    model = peft.get_peft_model(two(), CASES[request.param].make("0", "1"))
    fill(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_no_tensor_may_be_missing(folder):
    """Also of those that a tuner keeps inside modules: none starts anew in silence."""
    whole = load_file(folder / WEIGHTS)
    load_onto(two(), folder)
    for key in whole:
        save_file({k: v for k, v in whole.items() if k != key}, folder / WEIGHTS)
        with pytest.raises(MalformedFile, match=r"lacks|only some"):
            load_onto(two(), folder)


def test_numbers_that_are_none_are_refused(folder):
    rewritten(folder, lambda tensors: next(iter(tensors.values())).fill_(torch.nan))
    with pytest.raises(NonFiniteTensor):
        load_onto(two(), folder)


def test_another_model_is_refused(folder):
    with pytest.raises(RegraftError) as caught:
        load_onto(two(16), folder)
    assert "size mismatch" not in str(caught.value) or isinstance(caught.value, ShapeMismatch)
    with pytest.raises(SitesNotInBase):
        load_onto(nn.ModuleDict({"elsewhere": nn.Linear(8, 8)}), folder)


@pytest.mark.parametrize(
    "wrong", [{"target_modules": 5}, {"modules_to_save": 7}, {"r": None, "width": "x"}], ids=str
)
def test_settings_that_mean_nothing_are_refused(folder, wrong):
    settings = json.loads((folder / CONFIG).read_text())
    if not (changed := {k: v for k, v in wrong.items() if k in settings}):
        return  # SVDiff has neither a rank nor a width
    (folder / CONFIG).write_text(json.dumps(settings | changed))
    with pytest.raises(RegraftError):
        load_onto(two(), folder)
