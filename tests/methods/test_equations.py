"""LoRA-X and ProLoRA against their printed equations, with dense matrices and torch's own SVD."""

from __future__ import annotations

import pytest
import torch

from regraft.adapters import LowRank, Site, Update, cut, delta, matrix_shape
from regraft.adapters.update import Dense, Kronecker
from regraft.crossing import rank_rule
from regraft.methods import MethodOptions, Refusal, get_method
from regraft.subspaces import Dimension
from tests.methods.worlds import SHAPES, job, lora, make_base, moved, new_library

K = 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    source = make_base(folder / "a", 3)
    return source, moved(source, folder / "b", 0.5), new_library(folder / "cache")


def dense(base, module):
    """(P, R): the projectors on the top-K left and right singular vectors, by full SVD in fp64."""
    u, _, vh = torch.linalg.svd(base.matrix(Site("", module)).double(), full_matrices=False)
    return u[:, :K] @ u[:, :K].mT, vh[:K].mT @ vh[:K]


FORMS = pytest.mark.parametrize("form", ["factors", "kronecker", "full"])


def made(form: str, shape: tuple[int, ...]) -> Update:
    """An update of rank 3, or of full rank in one of two forms."""
    if form == "factors":
        return lora(shape, 3, 0)
    generator = torch.Generator().manual_seed(2)
    m, n = matrix_shape(shape)
    if form == "full":
        whole = torch.randn(shape, generator=generator)
        return Dense(lambda: whole, shape)
    left, right = (torch.randn(s, generator=generator) for s in ((4, 4), (m // 4, n // 4)))
    return Kronecker(left, right, 0.5, shape)


@FORMS
@pytest.mark.parametrize("module", SHAPES)
def test_lora_x_equation_3(pair, module, form):
    source, target, library = pair
    update = made(form, SHAPES[module])
    options = MethodOptions(dimension=Dimension(k=K))
    found = get_method("lora-x").carry(job(update, source, target, library, module, options))
    p, r = dense(target, module)
    expected = p @ delta(update).flatten(1).double() @ r
    assert torch.allclose(delta(found).flatten(1).double(), expected, atol=1e-4)
    assert found.rank <= K


@FORMS
@pytest.mark.parametrize("module", SHAPES)
@pytest.mark.parametrize("cross_terms", [False, True])
def test_prolora(pair, module, cross_terms, form):
    source, target, library = pair
    update = made(form, SHAPES[module])
    options = MethodOptions(dimension=Dimension(k=K), threshold=0.0, cross_terms=cross_terms)
    found = get_method("prolora").carry(job(update, source, target, library, module, options))
    (ps, rs), (pt, rt) = dense(source, module), dense(target, module)
    i_m, i_n = torch.eye(len(ps)).double(), torch.eye(len(rs)).double()
    w = delta(update).flatten(1).double()
    parallel = pt @ ps @ w @ rs @ rt
    null = (i_m - pt) @ (i_m - ps) @ w @ (i_n - rs) @ (i_n - rt)
    expected = parallel + null
    if cross_terms:
        expected = expected + pt @ ps @ w @ (i_n - rs) @ (i_n - rt)
        expected = expected + (i_m - pt) @ (i_m - ps) @ w @ rs @ rt
    assert torch.allclose(delta(found).flatten(1).double(), expected, atol=1e-4)
    assert found.rank <= min(matrix_shape(SHAPES[module]))


@pytest.mark.parametrize("method", ["copy", "lora-x", "prolora"])
def test_what_is_carried_of_a_full_matrix_is_no_larger_than_it(pair, method):
    source, target, library = pair
    module, shape = "layers.0.wide", SHAPES["layers.0.wide"]
    update = made("full", shape)
    options = MethodOptions(
        dimension=Dimension(k=12), threshold=0.0 if method == "prolora" else None
    )
    found = get_method(method).carry(job(update, source, target, library, module, options))
    shorter = cut(found, rank_rule(update, None, None))
    assert isinstance(shorter, LowRank)
    numbers = shorter.rank * sum(matrix_shape(shape))
    m, n = matrix_shape(shape)
    assert numbers <= m * n or shorter.energy() >= 0.99 * found.energy()
    assert cut(found, rank_rule(update, "full", None)).energy() == pytest.approx(
        found.energy(), rel=1e-4
    )


@pytest.mark.parametrize("module", SHAPES)
def test_similarity_equation_4(pair, module):
    source, target, library = pair
    site = Site("", module)
    found = library.phi(source, site, target, site, Dimension(k=K))
    (ps, rs), (pt, rt) = dense(source, module), dense(target, module)
    # ‖U_sᵀU_t‖²_F = tr(P_s P_t)
    assert found[0] == pytest.approx(float((ps @ pt).trace()) / K, abs=1e-4)
    assert found[1] == pytest.approx(float((rs @ rt).trace()) / K, abs=1e-4)


def test_rank_order_alignment_across_widths(tmp_path):
    """§4.2.2 with the pseudo-inverse: ΔW_t = U_t (U_sᵀ ΔW_s V_s) V_tᵀ."""
    source = make_base(tmp_path / "a", 0, {"layers.0.q": (16, 20)})
    target = make_base(tmp_path / "b", 1, {"layers.0.q": (24, 28)})
    library = new_library(tmp_path / "cache")
    update = lora((16, 20), 3, 0)
    options = MethodOptions(dimension=Dimension(k=K), align="rank-order")
    found = get_method("lora-x").carry(job(update, source, target, library, "layers.0.q", options))
    site, dimension = Site("", "layers.0.q"), Dimension(k=K)
    s, t = (library.subspace(b, site, dimension) for b in (source, target))
    expected = t.ut.mT @ (s.ut @ delta(update) @ s.vt.mT) @ t.vt
    assert found.shape == (24, 28)
    assert torch.allclose(delta(found), expected, atol=1e-4)
    # Only the energy inside the source's subspace can arrive.
    assert delta(found).norm() == pytest.approx(
        float((s.ut @ delta(update) @ s.vt.mT).norm()), rel=1e-4
    )


def test_filters_and_thresholds_leave_sites_out(pair):
    source, target, library = pair
    options = MethodOptions(dimension=Dimension(k=K), threshold=0.999)
    refused = get_method("prolora").carry(
        job(lora((24, 24), 2, 0), source, target, library, "layers.0.square", options)
    )
    assert isinstance(refused, Refusal)
    assert MethodOptions(filter_blocks=("square$",)).filtered(Site("", "layers.0.square"))
