"""Every form an update can have, written in every dialect, comes back as its first writer meant."""

from __future__ import annotations

import pytest

import regraft
from regraft.adapters import delta
from regraft.dialects import DIALECTS, load_adapter
from regraft.errors import BadOption
from tests.docs.pages import ROOT, text
from tests.wild.case import Case
from tests.wild.catalogue import CASES
from tests.wild.written import WRITTEN, outcome, render

#: One family for each form of update: two factors, U ΔΣ Vᵀ, a Kronecker product, whole; and a
#: change of the bias as well.
FAMILIES = ("lora", "lora-x", "loha", "lokr", "dora", "full", "lora bias")


def chosen() -> list[Case]:
    """The first exact case of each family on each kind of layer."""
    found: dict[tuple[str, str], Case] = {}
    for case in CASES:
        if case.family in FAMILIES and case.outcome == "exact":
            found.setdefault((case.family, case.layer), case)
    return list(found.values())


def speaks(sites) -> bool:
    """Whether these are sites of a language model."""
    return not any(s.startswith(("unet.", "transformer.", "text_encoder")) for s in sites) or any(
        s.startswith("transformer.h.") for s in sites
    )


def holds_nothing_else(sites, layer: str) -> bool:
    """Whether a file changes only what a dialect that refuses this kind of layer cannot hold."""
    return layer == "norm" or all(site.endswith(".bias") for site in sites)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.name)
def test_written_and_read_again(case, dialect, tmp_path):
    made = case.make(tmp_path)
    out = tmp_path / ("out" if dialect == "peft" else "out.safetensors")
    says = outcome(dialect, case.layer)
    nameless = speaks(made.wanted) and dialect in ("kohya", "comfyui")
    options = {"output": out, "base": made.base, "dialect": dialect, "dtype": "fp32"}
    options["rank"] = None if case.family == "lora" else "exact"
    if nameless or (says.startswith("refused") and holds_nothing_else(made.wanted, case.layer)):
        with pytest.raises(BadOption) as refused:
            regraft.convert(made.adapter, **options)
        assert ("no name" if nameless else says.partition(": ")[2]) in refused.value.what
        assert not out.exists()
        return
    done = regraft.convert(made.adapter, **options)
    found = {str(s): delta(u).double() for s, u in load_adapter(out, made.base).updates.items()}
    assert {s for s in found if found[s].any()} == set(made.wanted) - set(done.sites_refused)
    for site, value in found.items():
        wanted = made.wanted.get(site, value * 0).double()
        error = float((value - wanted).abs().max())
        assert error <= 1e-5 * max(float(wanted.abs().max()), 1.0), f"{site}: {error}"
    for site in done.sites_refused:
        assert site.endswith(".bias"), site  # beside a weight that was written
        assert "refused" in says or dialect == "lora-x" or "bias" in done.sites_refused[site]


def test_the_table_is_that_of_the_page_and_has_every_dialect():
    assert set(WRITTEN) == set(DIALECTS)
    assert render() in text(ROOT / "docs" / "formats.md")
