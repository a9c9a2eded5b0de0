"""Families without a library to hold them against, and what is true of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from regraft.adapters.families import families, family_meant, family_of, get_family
from regraft.adapters.families.foura import inverse_dct
from regraft.adapters.families.registry import Module
from regraft.adapters.update import Dense, Kronecker, LowRank, delta
from regraft.errors import FamilyNotYet, ShapeMismatch
from tests.adapters.writers import built, layer, module, near


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# -- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("one", families(), ids=lambda f: f.name)
def test_a_family_says_what_it_is_and_is_found_by_its_roles(one: Any) -> None:
    assert one.name == one.name.lower()
    assert one.title
    assert one.equation
    assert one.paper == "" or one.paper.startswith("https://arxiv.org/abs/")
    assert get_family(one.name) is one
    for need in one.needs:
        found = family_of(need, {})
        assert found is not None
        # Families that only settings choose leave their tensors to another.
        assert found is one if one.chosen is None else found.name == "lora"
    for role in one.marks:
        assert family_meant([role]) is one


def test_no_family_answers_to_a_mixture() -> None:
    for roles in (["down", "hada_w1_a"], ["down"], ["lokr_w1", "lokr_w2_a"], ["dora_scale"], []):
        assert family_of(roles, {}) is None


@pytest.mark.parametrize(
    ("roles", "rank"),
    [
        ({"down": (4, 8), "up": (6, 4), "dora_scale": (6, 1)}, 4),
        ({f"hada_w{i}_{x}": (3, 8) for i in "12" for x in "ab"}, 3),
        ({"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}, 2),
        ({"lokr_w1": (4, 4), "lokr_w2": (4, 4)}, None),
        ({"t_q": (5, 8), "t_p": (6, 5), "t_lambda": (1, 5)}, 5),
        ({"foura_a": (7, 8), "foura_b": (6, 7)}, 7),
        ({"a1": (8, 2), "a2": (2, 8), "b1": (6, 2), "b2": (2, 8)}, 2),
        ({"oft_blocks": (2, 3, 3)}, None),
        ({"hra_u": (16, 4)}, 4),
    ],
)
def test_the_rank_a_file_was_trained_at(roles: dict[str, Any], rank: int | None) -> None:
    found = family_of(roles, {})
    assert found is not None
    assert found.rank(roles) == rank


@pytest.mark.parametrize(
    ("roles", "needs"),
    [
        ({"delta": seeded(16)}, True),
        ({"down": seeded(2, 16), "up": seeded(24, 2), "magnitude": seeded(24)}, True),
        ({"oft_blocks": seeded(4, 6, 6)}, True),
        ({"down": seeded(2, 16), "up": seeded(24, 2)}, False),
        ({"hada_w1_a": seeded(24, 2), "hada_w1_b": seeded(2, 16)}
         | {"hada_w2_a": seeded(24, 2), "hada_w2_b": seeded(2, 16)}, False),
    ],
)  # fmt: skip
def test_the_base_is_read_when_needed_and_not_kept(roles: dict[str, Tensor], needs: bool) -> None:
    reads = 0
    base = layer("linear")

    def weight() -> Tensor:
        nonlocal reads
        reads += 1
        return base.weight.detach().clone()

    made = replace(module(base, roles), weight=weight)
    name, found = built(made)
    assert reads == 0
    first = delta(found["weight"])
    assert reads == (1 if needs else 0)
    with torch.no_grad():
        base.weight *= 2
    assert torch.equal(delta(found["weight"]), first) is not needs
    assert get_family(name).needs_base is needs


# -- LoHa, LoKr ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 12), r=st.integers(1, 4), scale=st.floats(-3.0, 3.0))
def test_loha_s_factors_are_the_hadamard_product(m: int, n: int, r: int, scale: float) -> None:
    roles = {
        "hada_w1_a": seeded(m, r),
        "hada_w1_b": seeded(r, n, seed=1),
        "hada_w2_a": seeded(m, r, seed=2),
        "hada_w2_b": seeded(r, n, seed=3),
    }
    made = replace(module(nn.Linear(n, m), roles), scale=lambda rank: scale)
    update = built(made)[1]["weight"]
    one = roles["hada_w1_a"] @ roles["hada_w1_b"]
    two = roles["hada_w2_a"] @ roles["hada_w2_b"]
    assert torch.allclose(delta(update), one * two * scale, atol=1e-4)
    assert isinstance(update, LowRank if r * r < min(m, n) else Dense)


@settings(max_examples=30, deadline=None)
@given(
    a=st.integers(1, 4),
    b=st.integers(1, 4),
    c=st.integers(1, 4),
    d=st.integers(1, 4),
    cut=st.integers(0, 15),
    aligned=st.booleans(),
)
def test_rows_of_lokr(a: int, b: int, c: int, d: int, cut: int, aligned: bool) -> None:
    roles = {"lokr_w1": seeded(a, b), "lokr_w2": seeded(c, d, seed=1)}
    update = built(module(nn.Linear(b * d, a * c), roles))[1]["weight"]
    whole = torch.kron(roles["lokr_w1"], roles["lokr_w2"])
    assert torch.allclose(delta(update), whole, atol=1e-5)
    begin = (cut % a) * c if aligned else cut % (a * c)
    rows = update.rows(((begin, a * c),))
    if rows is None:
        assert not whole[begin:].any()
        return
    assert torch.allclose(delta(rows), whole[begin:], atol=1e-4)
    assert isinstance(rows, Kronecker) or begin % c


def test_lokr_with_a_transposed_base() -> None:
    roles = {"lokr_w1": seeded(4, 2), "lokr_w2": seeded(6, 8)}
    update = built(module(layer("gpt2"), roles))[1]["weight"]
    near(update, torch.kron(roles["lokr_w1"], roles["lokr_w2"]).mT)


# -- DoRA ------------------------------------------------------------------------------------------


def dora(kind: str, g: Tensor, role: str) -> tuple[Tensor, Tensor, Tensor]:
    """ΔW, and V = W0 + B A, both by hand."""
    base = layer(kind)
    m, n = base.weight.shape
    roles = {"down": seeded(2, n) * 0.1, "up": seeded(m, 2), role: g}
    found = delta(built(module(base, roles))[1]["weight"])
    weight = base.weight.detach()
    return found, weight, weight + roles["up"] @ roles["down"]


def test_the_two_axes_of_dora_differ_and_go_by_shape() -> None:
    g = seeded(16).abs() + 1
    cases = [
        (g, "magnitude", 1),  # ai-toolkit, PEFT
        (g, "dora_scale", 1),  # a flat vector is per output
        (g[:, None], "dora_scale", 1),  # LyCORIS since 2024-12
        (g[None], "dora_scale", 0),  # LyCORIS before, OneTrainer
        (g[None], "magnitude", 1),
    ]
    for magnitude, role, norm_over in cases:
        found, weight, v = dora("square", magnitude, role)
        shape = (16, 1) if norm_over == 1 else (1, 16)
        expected = g.reshape(shape) * v / v.norm(dim=norm_over, keepdim=True) - weight
        assert torch.allclose(found, expected, atol=1e-5), (role, tuple(magnitude.shape))


def test_a_magnitude_that_fits_no_axis_is_an_error() -> None:
    for size, role in ((17, "dora_scale"), (16, "magnitude"), (1, "magnitude")):
        with pytest.raises(ShapeMismatch):
            dora("linear", seeded(size), role)


def test_a_zero_row_stays_zero() -> None:
    base = layer("linear")
    with torch.no_grad():
        base.weight[3] = 0
    roles = {"down": torch.zeros(2, 16), "up": torch.zeros(24, 2)}
    for magnitude in (torch.ones(24), torch.full((24,), 20.0)):
        found = delta(built(module(base, roles | {"magnitude": magnitude}))[1]["weight"])
        assert torch.isfinite(found).all()
        assert not found[3].any()


# -- rotations -------------------------------------------------------------------------------------


def test_oft_rotates_and_its_alpha_is_a_constraint() -> None:
    base = layer("linear")
    roles = {"oft_blocks": seeded(4, 6, 6)}
    weight = base.weight.detach()
    for alpha in (None, 0.0, 1e-3, 1e3):
        turned = weight + delta(built(module(base, roles, alpha=alpha))[1]["weight"])
        assert torch.allclose(turned.mT @ turned, weight.mT @ weight, atol=1e-5)
    small = delta(built(module(base, roles, alpha=1e-3))[1]["weight"])
    # ‖Q‖ = alpha · out turns by about twice that angle.
    assert small.norm() < 2.1 * 1e-3 * 24 * weight.norm()


# -- SVDiff ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv3", "embedding", "norm"])
def test_svdiff_shifts_singular_values(kind: str) -> None:
    base = layer(kind)
    weight = base.weight.detach()
    flat = weight.reshape(1, -1) if weight.ndim == 1 else weight.flatten(1)
    s = torch.linalg.svdvals(flat)
    shift = seeded(s.numel()) * s.mean()
    made = module(base, {"delta": shift})
    update = built(made)[1]["weight"]
    changed = (weight + delta(update)).reshape(flat.shape)
    expected = (s + shift).clamp_min(0).sort(descending=True)[0]
    assert torch.allclose(torch.linalg.svdvals(changed), expected, atol=1e-4)
    u, _, vh = torch.linalg.svd(flat, full_matrices=False)
    core = u.mT @ changed @ vh.mT
    assert torch.allclose(core, torch.diag((s + shift).clamp_min(0)), atol=1e-4)
    with pytest.raises(ShapeMismatch):
        built(module(base, {"delta": seeded(s.numel() + 1)}))


# -- FouRA -----------------------------------------------------------------------------------------


def dct_matrix(n: int) -> Tensor:
    k, i = torch.arange(n).double()[:, None], torch.arange(n).double()[None]
    found = torch.cos(torch.pi * (2 * i + 1) * k / (2 * n)) * (2 / n) ** 0.5
    found[0] /= 2**0.5
    return found


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 33))
def test_the_cosine_transform_is_orthonormal(n: int) -> None:
    matrix = dct_matrix(n)
    assert torch.allclose(inverse_dct(torch.eye(n).double()), matrix, atol=1e-9)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(n).double(), atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "conv1", "gpt2"])
@pytest.mark.parametrize("transform", ["dct", "dft"])
@pytest.mark.parametrize("masked", [False, True])
def test_foura_runs_as_the_paper_says(kind: str, transform: str, masked: bool) -> None:
    """Transform, A, mask, B, inverse transform, on inputs, against ΔW x."""
    base = layer(kind)
    n, m = (16, 24) if kind != "conv1" else (16, 12)
    a, b, x = seeded(4, n), seeded(m, 4), seeded(5, n)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.5]) if masked else torch.ones(4)
    if transform == "dct":
        ran = (x @ dct_matrix(n).float().mT @ a.mT * mask @ b.mT) @ dct_matrix(m).float()
    else:
        z = torch.fft.fft(x, norm="ortho") @ (mask[:, None] * a).mT.cfloat() @ b.mT.cfloat()
        ran = torch.fft.ifft(z, norm="ortho").real
    roles = {"foura_a": a, "foura_b": b} | ({"foura_mask": mask} if masked else {})
    name, found = built(module(base, roles, {"transform": transform}, alpha=8.0))
    change = delta(found["weight"]).flatten(1)
    change = change if kind != "gpt2" else change.mT
    assert torch.allclose(x @ change.mT, 2 * ran, atol=1e-4)
    assert (name, found["weight"].rank) == ("foura", 4 if transform == "dct" else 8)
    with pytest.raises(FamilyNotYet, match="transform"):
        built(module(base, roles))


# -- values ----------------------------------------------------------------------------------------


def test_a_whole_weight_is_a_new_value() -> None:
    base, new = layer("linear"), seeded(24, 16)
    update = built(module(base, {"whole": new}))[1]["weight"]
    near(update, new - base.weight.detach())


def test_rows_of_a_change_that_needs_the_base() -> None:
    base = layer("linear")
    made: Module = module(base, {"oft_blocks": seeded(4, 6, 6)})
    update = built(made)[1]["weight"]
    part = update.rows(((0, 6), (12, 18)))
    assert part is not None
    whole = delta(update)
    assert torch.equal(delta(part), torch.cat([whole[:6], whole[12:18]]))
