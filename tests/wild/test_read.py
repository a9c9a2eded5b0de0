"""Every file of the catalogue is read to the change its writer means, or refused as said."""

from __future__ import annotations

import pytest
import torch

from regraft.adapters import delta
from regraft.dialects import load_adapter
from regraft.errors import RegraftError
from tests.wild.catalogue import CASES


def refusals(made):
    """Why something of a file, or all of it, is not carried."""
    try:
        return list(load_adapter(made.adapter, made.base).refused.values())
    except RegraftError as error:
        return [str(error)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_read(case, tmp_path):
    made = case.make(tmp_path)
    kind, _, says = case.outcome.partition(": ")
    if kind == "refused":
        assert any(says in why for why in refusals(made))
        return
    adapter = load_adapter(made.adapter, made.base)
    assert not adapter.refused
    found = {str(site): delta(update).double() for site, update in adapter.updates.items()}
    assert set(found) == set(made.wanted)
    for site, wanted in made.wanted.items():
        assert found[site].shape == wanted.shape, site
        size = float(wanted.double().abs().max())
        assert size > 1e-3, f"{site}: nothing to compare"
        error = float((found[site] - wanted.double()).abs().max())
        assert error <= 1e-5 * max(size, 1.0), f"{site}: {error / size:.2e}"
    if kind == "note":
        assert any(says in note for note in adapter.notes), adapter.notes


def test_no_case_is_declared_twice():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert torch.get_default_dtype() == torch.float32
