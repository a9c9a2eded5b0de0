"""The contract every registered method keeps. A new method is tested by being registered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.adapters import LowRank, Site, Spectral, delta, energy
from regraft.methods import Method, MethodOptions, Refusal, methods
from regraft.subspaces import Dimension
from tests.methods.worlds import SHAPES, job, lora, lora_x, make_base, moved, new_library

ALL = pytest.mark.parametrize("method", methods(), ids=lambda m: m.name)
MODULES = pytest.mark.parametrize("module", SHAPES)
ANY_SIMILARITY = {"threshold": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, the same base again under another path, a moved one, and a library."""
    folder = tmp_path_factory.mktemp("bases")
    source = make_base(folder / "a", 0)
    return {
        "source": source,
        "same": make_base(folder / "b", 0),
        "moved": moved(source, folder / "c", 0.3),
        "library": new_library(folder / "cache"),
    }


def run(method: Method, world, target: str, module: str, update, **options):
    options = {"dimension": Dimension(k=6), **ANY_SIMILARITY, **options}
    return method.carry(
        job(
            update,
            world["source"],
            world[target],
            world["library"],
            module,
            MethodOptions(**options),
        )
    )


@ALL
def test_it_names_its_paper_equations_needs_and_cost(method: Method):
    facts = method.describe()
    assert facts["paper"].startswith("https://arxiv.org/abs/")
    assert all(facts[k] for k in ("title", "equations", "needs", "cost"))
    assert json.loads(json.dumps(facts)) == facts


@ALL
@MODULES
def test_identical_pair_returns_the_update_exactly(method: Method, world, module: str):
    update = lora(SHAPES[module], 3, seed=1)
    result = run(method, world, "same", module, update, dimension=Dimension(full=True))
    assert torch.equal(delta(result), delta(update))
    if method.exact_on_identical == "always":
        result = run(method, world, "same", module, update)
        assert torch.equal(delta(result), delta(update))


@ALL
@MODULES
@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full core"])
def test_lora_x_form_returns_exactly_when_the_dimension_holds_it(method, world, module, full):
    update = lora_x(world["source"], Site("", module), world["library"], 4, full=full)
    for k in (4, 6):
        result = run(method, world, "same", module, update, dimension=Dimension(k=k))
        assert torch.allclose(delta(result), delta(update), atol=1e-5)


@ALL
@MODULES
def test_a_projection_never_gains_energy(method: Method, world, module: str):
    assert method.never_gains
    for seed in range(5):
        update = lora(SHAPES[module], 4, seed)
        result = run(method, world, "moved", module, update)
        assert energy(result.factors()) <= energy(update.factors()) * (1 + 1e-6)


@ALL
@MODULES
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10_000), factor=st.floats(0.01, 100), order=st.permutations(range(4)))
def test_what_should_not_matter_does_not(method, world, module, seed, factor, order):
    """Scaling one factor against the other, permuting rank directions, folding the scale."""
    update = lora(SHAPES[module], 4, seed)
    order = torch.tensor(order)
    other = replace(update, up=(update.up * factor)[:, order], down=(update.down / factor)[order])
    folded = replace(update, up=update.up * update.scale, scale=1.0)
    expected = delta(run(method, world, "moved", module, update))
    size = expected.norm() + 1e-6
    for same in (other, folded):
        found = delta(run(method, world, "moved", module, same))
        assert (found - expected).norm() <= 1e-4 * size


@ALL
@MODULES
def test_it_is_linear_in_the_update(method: Method, world, module: str):
    a, b = lora(SHAPES[module], 2, 1, scale=1.0), lora(SHAPES[module], 2, 2, scale=1.0)
    both = replace(a, up=torch.cat([a.up, b.up], 1), down=torch.cat([a.down, b.down], 0))
    parts = [delta(run(method, world, "moved", module, u)) for u in (a, b)]
    whole = delta(run(method, world, "moved", module, both))
    assert torch.allclose(whole, parts[0] + parts[1], atol=1e-4)


@ALL
@MODULES
def test_scaling_the_bases_changes_nothing(method: Method, world, module: str, tmp_path: Path):
    from tests.methods.worlds import save_base

    scaled = {
        n: save_base(tmp_path / n, {s.module: 3.5 * world[n].read(s) for s in world[n].weights})
        for n in ("source", "moved")
    }
    update = lora(SHAPES[module], 3, seed=5)
    options = MethodOptions(dimension=Dimension(k=5), threshold=0.0)
    library = new_library(tmp_path / "cache")
    one = method.carry(job(update, world["source"], world["moved"], library, module, options))
    two = method.carry(job(update, scaled["source"], scaled["moved"], library, module, options))
    assert torch.allclose(delta(one), delta(two), atol=1e-3)


@ALL
def test_the_factors_stay_thin(method: Method, world):
    """No method may form ΔW: the output's rank is a small multiple of the input's."""
    for module, shape in SHAPES.items():
        result = run(method, world, "moved", module, lora(shape, 2, seed=3))
        assert isinstance(result, LowRank)
        assert result.rank <= 4


@ALL
def test_unequal_shapes_are_refused_with_both_shapes(method: Method, world, tmp_path: Path):
    wider = make_base(tmp_path / "wider", 1, {"layers.0.square": (32, 32)})
    update = lora((24, 24), 2, seed=0)
    outcome = method.carry(job(update, world["source"], wider, world["library"], "layers.0.square"))
    assert isinstance(outcome, Refusal)
    assert "(24, 24)" in outcome.reason
    assert "(32, 32)" in outcome.reason


@ALL
def test_a_threshold_refuses_unlike_sites(method: Method, world, tmp_path: Path):
    stranger = make_base(tmp_path / "stranger", 77)
    options = MethodOptions(dimension=Dimension(k=4), threshold=0.9)
    outcome = method.carry(
        job(
            lora((24, 24), 2, 0),
            world["source"],
            stranger,
            world["library"],
            "layers.0.square",
            options,
        )
    )
    if method.name == "copy":  # it looks at shapes alone
        assert isinstance(outcome, LowRank)
    else:
        assert isinstance(outcome, Refusal)
        assert "Φ_l" in outcome.reason


@ALL
@pytest.mark.parametrize("cross_terms", [False, True])
def test_the_expected_share_is_what_random_updates_keep(method, world, cross_terms):
    """``keeps`` is an expectation over updates without preferred direction: sample it."""
    module, k = "layers.0.square", 6
    site = Site("", module)
    options = MethodOptions(dimension=Dimension(k=k), threshold=0.0, cross_terms=cross_terms)
    phi = world["library"].phi(world["source"], site, world["moved"], site, options.dimension)
    expected = method.keeps(*phi, k / 24, k / 24, options)
    kept = total = 0.0
    for seed in range(40):
        update = lora((24, 24), 24, seed)
        result = method.carry(
            job(update, world["source"], world["moved"], world["library"], module, options)
        )
        kept += energy(result.factors())
        total += energy(update.factors())
    assert kept / total == pytest.approx(expected, abs=0.03)


def test_lora_x_form_stays_in_lora_x_form(world):
    update = lora_x(world["source"], Site("", "layers.0.wide"), world["library"], 4, full=False)
    method = next(m for m in methods() if m.name == "lora-x")
    result = run(method, world, "moved", "layers.0.wide", update)
    assert isinstance(result, Spectral)
    eye = torch.eye(result.rank)
    assert torch.allclose(result.u.mT @ result.u, eye, atol=1e-5)
    assert torch.allclose(result.v.mT @ result.v, eye, atol=1e-5)
