"""Every LyCORIS algorithm on every layer kind: ΔW is what LyCORIS' forward pass applies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.adapters.update import Dense, Kronecker, LowRank
from regraft.errors import FamilyNotYet, ShapeMismatch
from tests.adapters.writers import KINDS, built, layer, lycoris, lycoris_change, module, near

pytest.importorskip("lycoris")

from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.tlora import TLoraModule

#: LyCORIS' key → role, where they differ.
ROLES = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "q_layer.weight": "t_q",
    "p_layer.weight": "t_p",
    "lambda_layer": "t_lambda",
    "weight": "ia3_weight",
    **{f"{r}.weight": r for r in ("a1", "a2", "b1", "b2", "bm")},
}


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], float | None]:
    alpha = state.get("alpha")
    roles = {ROLES.get(key, key): value for key, value in state.items() if key != "alpha"}
    return roles, None if alpha is None else float(alpha)


def check(algorithm: Any, kind: str, **options: Any) -> tuple[str, Any]:
    base = layer(kind)
    made, state = lycoris(algorithm, base, **options)
    roles, alpha = split(state)
    name, found = built(module(base, roles, alpha=alpha))
    near(found["weight"], lycoris_change(made, base))
    assert set(found) == {"weight"}
    return name, found["weight"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tucker", [False, True])
def test_locon(kind: str, tucker: bool) -> None:
    name, update = check(LoConModule, kind, lora_dim=3, alpha=2, use_tucker=tucker)
    assert (name, update.rank) == ("lora", 3)


@pytest.mark.parametrize("kind", [*KINDS, "square", "squareconv"])
@pytest.mark.parametrize("on_output", [False, True])
def test_dora_on_both_axes(kind: str, on_output: bool) -> None:
    options = {"lora_dim": 3, "alpha": 2, "weight_decompose": True, "wd_on_out": on_output}
    name, update = check(LoConModule, kind, **options)
    assert (name, type(update), update.trained_rank) == ("dora", Dense, 3)


@pytest.mark.parametrize("algorithm", [LohaModule, LokrModule])
@pytest.mark.parametrize("kind", ["linear", "conv3"])
@pytest.mark.parametrize("on_output", [False, True])
def test_decomposition_beside_other_families(algorithm: Any, kind: str, on_output: bool) -> None:
    options = {"lora_dim": 2, "alpha": 1, "weight_decompose": True, "wd_on_out": on_output}
    assert check(algorithm, kind, **options)[0] == "dora"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tucker", "rank"), [(False, 2), (True, 2), (False, 5)])
def test_loha(kind: str, tucker: bool, rank: int) -> None:
    name, update = check(LohaModule, kind, lora_dim=rank, alpha=1, use_tucker=tucker)
    assert name == "loha"
    # r² = 25 is over every smaller side here, and 4 below.
    assert isinstance(update, LowRank if rank == 2 else Dense)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"lora_dim": 1},
        {"lora_dim": 1, "use_tucker": True},
        {"lora_dim": 1, "decompose_both": True},
        {"lora_dim": 2, "factor": 4},
        {"lora_dim": 1, "full_matrix": True},
        {"lora_dim": 1, "unbalanced_factorization": True, "factor": 2},
    ],
)
def test_lokr(kind: str, options: dict[str, Any]) -> None:
    name, update = check(LokrModule, kind, alpha=0.5, **options)
    assert (name, type(update)) == ("lokr", Kronecker)


def test_lokr_of_whole_halves_has_no_scale() -> None:
    """Whatever alpha the file holds: readers apply 1."""
    base = layer("linear")
    made, state = lycoris(LokrModule, base, lora_dim=4, alpha=1, full_matrix=True)
    roles, _ = split(state)
    expected = lycoris_change(made, base)
    for alpha in (None, 0.0, 1.0, 1e10):
        near(built(module(base, roles, alpha=alpha))[1]["weight"], expected)


@pytest.mark.parametrize("algorithm", [LoConModule, LohaModule, LokrModule, GLoRAModule])
def test_no_alpha_is_scale_one(algorithm: Any) -> None:
    base = layer("linear")
    made, state = lycoris(algorithm, base, lora_dim=2, alpha=2)
    roles, alpha = split(state)
    assert alpha == 2
    for said in (None, 0.0):
        near(built(module(base, roles, alpha=said))[1]["weight"], lycoris_change(made, base))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0, 0.01])
def test_oft(kind: str, rescaled: bool, constraint: float) -> None:
    options = {"lora_dim": 4, "rescaled": rescaled, "constraint": constraint}
    assert check(DiagOFTModule, kind, **options)[0] == "oft"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0, 0.01])
def test_boft(kind: str, rescaled: bool, constraint: float) -> None:
    options = {"lora_dim": 6, "rescaled": rescaled, "constraint": constraint}
    check(ButterflyOFTModule, kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_glora(kind: str) -> None:
    name, update = check(GLoRAModule, kind, lora_dim=2, alpha=1)
    assert name == "glora"
    assert isinstance(update, LowRank if kind in ("linear", "conv1") else Dense)


def test_glora_of_the_old_order() -> None:
    """Before LyCORIS 2.0 the second factor came first."""
    base = layer("linear")
    made, state = lycoris(GLoRAModule, base, lora_dim=2, alpha=1)
    roles, alpha = split(state)
    old = {"a1": roles["a2"], "a2": roles["a1"], "b1": roles["b2"], "b2": roles["b1"]}
    near(built(module(base, old, alpha=alpha))[1]["weight"], lycoris_change(made, base))


@pytest.mark.parametrize("kind", [*KINDS, "square"])
@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(kind: str, on_input: bool) -> None:
    assert check(IA3Module, kind, train_on_input=on_input)[0] == "ia3"


@pytest.mark.parametrize("kind", ["linear", "conv3"])
def test_dylora_files_are_plain_lora(kind: str) -> None:
    base = layer(kind)
    made, state = lycoris(DyLoraModule, base, lora_dim=4, block_size=2, alpha=2)
    roles, alpha = split(state)
    name, found = built(module(base, roles, alpha=alpha))
    full, blocks = made.get_diff_weight(rank=4)[0].detach(), 3  # its count of blocks is one up
    near(found["weight"], full * blocks / 4)
    assert name == "lora"


@pytest.mark.parametrize("kind", ["linear", "conv1", "square"])
@pytest.mark.parametrize("start", ["principal", "last", "middle"])
@pytest.mark.parametrize("said", [False, True])
def test_tlora_less_its_start(kind: str, start: str, said: bool) -> None:
    base = layer(kind)
    made, _ = lycoris(TLoraModule, base, lora_dim=3, alpha=2, sig_type=start)
    with torch.no_grad():
        made.p_layer.weight.copy_(made.base_p + 0.05 * torch.randn_like(made.base_p))
    roles, alpha = split({k: v.detach() for k, v in made.state_dict().items()})
    name, found = built(module(base, roles, {"sig_type": start} if said else {}, alpha=alpha))
    near(found["weight"], lycoris_change(made, base), 2e-5)
    assert (name, found["weight"].rank) == ("t-lora", 6)


def test_tlora_of_an_unknown_start_is_refused() -> None:
    base = layer("linear")
    made, state = lycoris(TLoraModule, base, lora_dim=3, use_data_init=False)
    roles, alpha = split(state)
    with pytest.raises(FamilyNotYet, match="start"):
        built(module(base, roles, alpha=alpha))
    kept = {"t_base_p": made.base_p, "t_base_q": made.base_q, "t_base_lambda": made.base_lambda}
    _name, found = built(module(base, roles | kept, alpha=alpha))
    near(found["weight"], lycoris_change(made, base))
    made, state = lycoris(TLoraModule, layer("conv3"), lora_dim=3)
    with pytest.raises(FamilyNotYet, match="convolution"):
        built(module(layer("conv3"), split(state)[0]))


@pytest.mark.parametrize(
    ("algorithm", "options", "role"),
    [
        (LohaModule, {}, "hada_w1_b"),
        (LokrModule, {}, "lokr_w1"),
        (LoConModule, {"weight_decompose": True}, "dora_scale"),
        (DiagOFTModule, {}, "oft_blocks"),
        (ButterflyOFTModule, {"lora_dim": 6}, "oft_blocks"),
        (GLoRAModule, {}, "b1"),
        (IA3Module, {}, "ia3_weight"),
        (TLoraModule, {}, "t_p"),
    ],
)
def test_factors_that_do_not_fit_are_an_error(
    algorithm: Any, options: dict[str, Any], role: str
) -> None:
    base = layer("linear")
    _, state = lycoris(algorithm, base, **{"lora_dim": 2} | options)
    roles, alpha = split(state)
    roles[role] = roles[role].repeat(5, *[1] * (roles[role].ndim - 1))
    with pytest.raises(ShapeMismatch):
        built(module(base, roles, alpha=alpha))
