"""Every PEFT tuner that has a ΔW, on the layers it supports: ΔW is PEFT's merge less the base."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from regraft.adapters.families.boft import build as build_boft
from regraft.adapters.update import Dense, Kronecker, LowRank, delta
from regraft.errors import FamilyNotYet, ShapeMismatch
from tests.adapters.writers import built, layer, module, near, peft_model

peft = pytest.importorskip("peft")

#: The ends of PEFT's keys → role, where they differ.
ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A": "down",
    "lora_B": "up",
    "lora_B.bias": "up_bias",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "oft_R.weight": "oft_r",
    "oft_embedding_R.weight": "oft_embedding_r",
    "boft_R": "boft_r",
    "base_model.vera_A": "vera_a",
    "base_model.vera_B": "vera_b",
}
TARGET = {"target_modules": ["layer"]}


def check(config: Any, kind: str, tolerance: float = 1e-5, spread: float = 0.1) -> tuple[str, Any]:
    """Family and updates, with weight and bias held against PEFT's merge."""
    base = layer(kind)
    before = base.weight.detach().clone()
    bias = None if getattr(base, "bias", None) is None else base.bias.detach().clone()
    original = layer(kind)
    model, ends, settings = peft_model(config, base, spread)
    roles = {ROLES.get(end, end): value for end, value in ends.items()}
    name, found = built(module(original, roles, settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload().block["layer"]
    near(found["weight"], merged.weight.detach() - before, tolerance)
    if bias is not None:
        change = merged.bias.detach() - bias
        ours = delta(found["bias"]) if "bias" in found else torch.zeros_like(bias)
        assert (ours - change).norm() <= 1e-5 * bias.norm()
    return name, found


@pytest.mark.parametrize("kind", ["linear", "conv3", "conv1d", "embedding", "gpt2"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_lora(kind: str, stabilised: bool) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=stabilised, fan_in_fan_out=kind == "gpt2", **TARGET
    )
    assert check(config, kind)[0] == "lora"


def test_lora_with_a_bias() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, **TARGET)
    assert set(check(config, "linear")[1]) == {"weight", "bias"}


@pytest.mark.parametrize(
    "kind", ["linear", "square", "conv3", "squareconv", "conv1d", "embedding", "gpt2"]
)
def test_dora(kind: str) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, fan_in_fan_out=kind == "gpt2", **TARGET
    )
    name, found = check(config, kind)
    assert (name, found["weight"].trained_rank) == ("dora", 4)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("pissa", "pissa"),
        ("olora", "olora"),
        ("gaussian", "lora"),
        ("orthogonal", "lora"),
        ("mica", "lora"),
        ("eva", "lora"),
        (False, "lora"),
    ],
)
@pytest.mark.parametrize("stabilised", [False, True])
def test_starts_that_change_the_base_and_starts_that_do_not(
    start: Any, name: str, stabilised: bool
) -> None:
    """Against the base as everyone has it, not as training left it."""
    if start == "eva":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(
                r=4, init_lora_weights="eva", eva_config=peft.EvaConfig(), **TARGET
            )
    else:
        config = peft.LoraConfig(
            r=4, lora_alpha=6, init_lora_weights=start, use_rslora=stabilised, **TARGET
        )
    found = check(config, "linear", 2e-5)
    assert found[0] == name
    assert found[1]["weight"].rank == (8 if name != "lora" else 4)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_dora_from_a_changed_base(start: str) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights=start, use_dora=True, **TARGET)
    assert check(config, "linear", 5e-5)[0] == "dora"


def test_pissa_on_gpt2() -> None:
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", fan_in_fan_out=True, **TARGET)
    assert check(config, "gpt2", 2e-5)[0] == "pissa"


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_starts_that_cannot_be_recovered_are_refused(start: str) -> None:
    base = layer("linear")
    roles = {"down": torch.randn(4, 16), "up": torch.randn(24, 4)}
    settings = {"init_lora_weights": start, "r": 4, "lora_alpha": 4}
    with pytest.raises(FamilyNotYet) as refused:
        built(module(base, roles, settings))
    assert refused.value.fix
    if start == "loftq":
        return
    first = {"init_down": torch.randn(4, 16), "init_up": torch.randn(24, 4)}
    found = built(module(base, roles | first, settings))[1]
    expected = roles["up"] @ roles["down"] - first["init_up"] @ first["init_down"]
    near(found["weight"], expected)


@pytest.mark.parametrize("kind", ["linear", "conv3", "conv1", "conv1d"])
@pytest.mark.parametrize("effective", [False, True])
def test_loha(kind: str, effective: bool) -> None:
    options = {} if kind == "linear" else {"use_effective_conv2d": effective}
    name, found = check(peft.LoHaConfig(r=2, alpha=3, **options, **TARGET), kind, spread=0.5)
    assert (name, type(found["weight"])) == ("loha", LowRank)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("linear", {}),
        ("conv3", {}),
        ("conv3", {"use_effective_conv2d": True}),
        ("conv1", {"use_effective_conv2d": True}),
        ("conv1d", {}),  # PEFT's own product fails on the other form
    ],
)
@pytest.mark.parametrize(
    "options",
    [{"r": 1}, {"r": 1, "decompose_both": True}, {"r": 8}, {"r": 1, "decompose_factor": 2}],
)
def test_lokr(kind: str, more: dict[str, Any], options: dict[str, Any]) -> None:
    """With r = 8 both halves are whole, and PEFT still multiplies by alpha / r."""
    name, found = check(peft.LoKrConfig(alpha=3, **options, **more, **TARGET), kind)
    assert name == "lokr"
    # PEFT's product is over the wrong axes there.
    whole = kind == "conv1d" and options["r"] == 8
    assert isinstance(found["weight"], Dense if whole else Kronecker)


def test_lokr_of_whole_halves_takes_the_module_s_own_rank() -> None:
    patterns = {"rank_pattern": {"block.layer": 16}, "alpha_pattern": {"layer": 2}}
    assert check(peft.LoKrConfig(r=8, alpha=3, **patterns, **TARGET), "linear")[0] == "lokr"


@pytest.mark.parametrize("kind", ["linear", "conv3", "embedding"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cayley_neumann": False},
        {"use_cayley_neumann": True},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 2},
        {"use_cayley_neumann": False, "block_share": True},
        {"use_cayley_neumann": False, "coft": True, "eps": 0.5},
    ],
)
def test_oft(kind: str, options: dict[str, Any]) -> None:
    config = peft.OFTConfig(r=0, oft_block_size=4, **options, **TARGET)
    assert check(config, kind)[0] == "oft"


def test_oft_without_its_config_is_refused() -> None:
    with pytest.raises(FamilyNotYet, match="config"):
        built(module(layer("linear"), {"oft_r": torch.zeros(4, 6)}))
    with pytest.raises(ShapeMismatch):
        built(module(layer("linear"), {"oft_r": torch.zeros(4, 5)}, {"peft_type": "OFT"}))


@pytest.mark.parametrize("kind", ["linear", "conv3"])
def test_boft(kind: str) -> None:
    assert check(peft.BOFTConfig(boft_block_size=4, **TARGET), kind)[0] == "boft"


@pytest.mark.parametrize("stages", [2, 3])
def test_boft_of_several_stages(stages: int) -> None:
    """PEFT trains these on GPUs only; its permutations and rotations are the oracle."""
    from peft.tuners.boft.layer import BOFTLayer

    base, n, b = layer("linear"), 16, 4
    blocks = torch.randn(stages, n // b, b, b)
    s = torch.rand(24, 1) + 0.5
    whole = torch.eye(n)
    for i in range(stages):
        order = BOFTLayer.block_butterfly_perm(None, n, (n // b) >> i, b // 2, stages - 1)
        shuffle = BOFTLayer.perm2mat(None, order)
        turns = torch.block_diag(*BOFTLayer.cayley_batch(None, blocks[i]))
        whole = shuffle @ turns @ shuffle.mT @ whole
    weight = base.weight.detach()
    found = build_boft(module(base, {"boft_r": blocks, "boft_s": s}))["weight"]
    near(found, (whole @ weight.mT).mT * s - weight)


@pytest.mark.parametrize("kind", ["linear", "square", "conv3", "squareconv", "gpt2"])
@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3(kind: str, feedforward: bool) -> None:
    config = peft.IA3Config(
        feedforward_modules=["layer"] if feedforward else [],
        fan_in_fan_out=kind == "gpt2",
        **TARGET,
    )
    name, found = check(config, kind)
    assert name == "ia3"
    assert ("bias" in found) is not feedforward


def test_ia3_that_fits_both_sides_needs_its_config() -> None:
    vector = {"ia3_l": torch.ones(1, 8, 1, 1) * 2}
    with pytest.raises(FamilyNotYet, match="config"):
        built(module(layer("squareconv"), vector))


@pytest.mark.parametrize("parts", ["lora", "vector", "constant", "none"])
@pytest.mark.parametrize("bias", ["vector", "constant", "none"])
def test_glora(parts: str, bias: str) -> None:
    config = peft.GloraConfig(r=2, config_A_B=parts, config_C="lora", config_D_E=bias, **TARGET)
    if parts == "none":
        base = layer("linear")
        _, ends, settings = peft_model(config, base)
        assert "weight" in built(module(base, ends, settings))[1]
    else:
        assert check(config, "linear")[0] == "glora"


@pytest.mark.parametrize("kind", ["linear", "conv3", "gpt2"])
def test_adalora(kind: str) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, lora_alpha=6, fan_in_fan_out=kind == "gpt2", **TARGET
    )
    assert check(config, kind)[0] == "adalora"


@pytest.mark.parametrize("kind", ["linear", "gpt2"])
def test_vera(kind: str) -> None:
    config = peft.VeraConfig(r=4, fan_in_fan_out=kind == "gpt2", **TARGET)
    name, found = check(config, kind)
    assert (name, found["weight"].rank) == ("vera", 4)


@pytest.mark.parametrize(
    ("config", "name", "kinds"),
    [
        (peft.HRAConfig(r=4, **TARGET), "hra", ("linear", "conv3")),
        (peft.C3AConfig(block_size=8, **TARGET), "c3a", ("linear",)),
        (peft.DeloraConfig(r=4, **TARGET), "delora", ("linear",)),
        (peft.HiraConfig(r=4, **TARGET), "hira", ("linear", "conv3", "embedding", "gpt2")),
        (peft.FourierFTConfig(n_frequency=30, **TARGET), "fourierft", ("linear",)),
        (peft.WaveFTConfig(n_frequency=30, **TARGET), "waveft", ("linear",)),
        (peft.RoadConfig(group_size=8, **TARGET), "road", ("linear",)),
        (peft.MissConfig(r=4, **TARGET), "miss", ("linear",)),
        (peft.GraloraConfig(r=4, **TARGET), "gralora", ("linear",)),
        (peft.GraloraConfig(r=4, hybrid_r=2, **TARGET), "gralora", ("linear",)),
        (peft.ShiraConfig(r=4, **TARGET), "shira", ("linear",)),
        (peft.DeftConfig(r=4, **TARGET), "deft", ("linear",)),
    ],
)
def test_hosted_tuners(config: Any, name: str, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        if kind == "gpt2":
            config.fan_in_fan_out = True
        found = check(config, kind)
        assert found[0] == name
        assert isinstance(found[1]["weight"], Dense)


def test_hosted_tensors_that_do_not_fit_or_lack_a_config() -> None:
    settings = peft.HRAConfig(r=4, **TARGET).to_dict()
    with pytest.raises(FamilyNotYet, match="config"):
        built(module(layer("linear"), {"hra_u": torch.zeros(16, 4)}))
    found = built(module(layer("linear"), {"hra_u": torch.zeros(15, 4)}, settings))[1]
    with pytest.raises(ShapeMismatch):
        found["weight"].factors()


# -- QA-LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["peft", "mean", "sum", None])
def test_qalora_by_its_writer(pool: str | None) -> None:
    """PEFT's own forward pass, the authors' average pooling, or plain sums."""
    torch.manual_seed(0)
    base = nn.Linear(32, 24)
    a, b, x = torch.randn(3, 4), torch.randn(24, 3), torch.randn(5, 32)
    pooled = {
        "peft": x.view(5, 4, 8).mean(2) * 4,
        "mean": torch.nn.functional.avg_pool1d(x[None], 8)[0],
        "sum": x.view(5, 4, 8).sum(2),
    }
    expected = (pooled[pool or "peft"] @ a.mT @ b.mT) * 2  # alpha 6, rank 3
    said = {"use_qalora": True} if pool is None else {"qalora_pool": pool}
    name, found = built(module(base, {"down": a, "up": b}, said, alpha=6.0))
    assert (name, found["weight"].rank) == ("qa-lora", 3)
    assert torch.allclose(x @ delta(found["weight"]).mT, expected, atol=1e-4)


def test_qalora_of_an_unknown_writer_is_refused() -> None:
    roles = {"down": torch.randn(3, 4), "up": torch.randn(24, 3)}
    with pytest.raises(ShapeMismatch, match="qalora_pool"):
        built(module(layer("linear"), roles))
    with pytest.raises(FamilyNotYet, match="qalora_pool"):
        built(module(layer("linear"), roles, {"qalora_pool": "max"}))


def test_qalora_matches_pefts_variant() -> None:
    """Held against PEFT's code, which runs it on GPTQ layers only."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    torch.manual_seed(0)
    a, b, x = torch.randn(3, 4), torch.randn(24, 3), torch.randn(5, 32)

    held = SimpleNamespace(
        qalora_group_size={"default": 8},
        lora_A={"default": SimpleNamespace(weight=a)},
        lora_B={"default": SimpleNamespace(weight=b)},
        lora_dropout={"default": nn.Identity()},
        scaling={"default": 2.0},
        training=False,
    )
    ran = QALoraLinearVariant.forward(held, "default", x, torch.zeros(5, 24))
    roles = {"down": a, "up": b}
    found = built(module(nn.Linear(32, 24), roles, {"use_qalora": True}, alpha=6.0))[1]
    assert torch.allclose(x @ delta(found["weight"]).mT, ran, atol=1e-4)
