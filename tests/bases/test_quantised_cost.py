"""The figures that users are told are those that the benchmark wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from regraft.adapters import Site
from regraft.bases import open_base
from regraft.bases.quantised import cost
from regraft.bases.quantised.cost import MEASURED, like

WRITTEN = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "quantised_subspaces.json").read_text()
)


def test_every_measured_form_is_told():
    assert set(MEASURED) == set(WRITTEN["synthetic"]) == set(WRITTEN["lab"])


@pytest.mark.parametrize("form", MEASURED)
def test_figures(form):
    spectra, real = WRITTEN["synthetic"][form].values(), WRITTEN["lab"][form]
    told = MEASURED[form]
    assert told.error == pytest.approx(100 * sum(s["error"] for s in spectra) / 3, abs=0.06)
    for k, pair in (("64", told.top64), ("320", told.top320)):
        overlaps = [s["overlap"][k] for s in spectra]
        assert pair == pytest.approx((min(overlaps), max(overlaps)), abs=0.006)
    assert told.change == pytest.approx(100 * real["change"]["to"], abs=0.06)
    # lora-x reads the target's weights alone.
    assert real["change"]["from"] == 0


@pytest.mark.parametrize(
    ("form", "near"),
    [
        ("bitsandbytes NF4", "bitsandbytes NF4"),
        ("GGUF Q4_K", "GGUF Q4_0"),
        ("GGUF IQ4_XS", "GGUF Q4_0"),
        ("GGUF Q6_K", "GGUF Q5_1"),
        ("GGUF Q2_K", ""),
        ("GGUF IQ3_XXS", ""),
        ("GPTQ 3-bit", ""),
        ("GPTQ 4-bit", "compressed-tensors int4"),
        ("GPTQ 8-bit", "bitsandbytes int8"),
        ("AWQ 4-bit", "compressed-tensors int4"),
        ("quanto int2", ""),
        ("quanto int4", "compressed-tensors int4"),
        ("quanto fp8", "scaled fp8"),
        ("torchao int8", "bitsandbytes int8"),
        ("torchao intx", "bitsandbytes int8"),
        ("torchao int6", "GGUF Q5_1"),
        ("torchao int4", "compressed-tensors int4"),
        ("torchao int2", ""),
        ("compressed-tensors int8", "bitsandbytes int8"),
    ],
)
def test_forms_that_were_not_measured(form, near):
    assert like(form) == near


def test_the_sentence(tmp_path):
    codes = torch.ones(4, 4, dtype=torch.int8)
    whole, quantised = {"a.weight": torch.ones(4, 4)}, {"a.weight": codes, "a.SCB": torch.ones(4)}
    for name, tensors in (("whole", whole), ("quantised", quantised)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    assert cost(open_base(tmp_path / "whole.safetensors")) is None
    base = open_base(tmp_path / "quantised.safetensors")
    said = cost(base)
    assert "1 in bitsandbytes int8" in said
    assert "16-bit checkpoint" in said
    site = Site("", "a")
    weight = base.weights[site]
    low = replace(weight, quantised=replace(weight.quantised, form="GGUF Q2_K"))
    base.weights = {site: low}
    assert "fewer bits" in cost(base)
