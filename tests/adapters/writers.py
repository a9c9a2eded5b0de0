"""Layers adapted by the libraries that write the files, and what those libraries make of them."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from regraft.adapters.families import family_of, get_family
from regraft.adapters.families.registry import Built, Module
from regraft.adapters.update import delta

KINDS = ("linear", "conv3", "conv1", "conv1d")


def layer(kind: str, *, bias: bool = True) -> nn.Module:
    """A small layer of a kind, seeded."""
    torch.manual_seed(0)
    made: nn.Module
    if kind == "linear":
        made = nn.Linear(16, 24, bias=bias)
    elif kind == "square":
        made = nn.Linear(16, 16, bias=bias)
    elif kind == "conv3":
        made = nn.Conv2d(8, 12, 3, padding=1, bias=bias)
    elif kind == "conv1":
        made = nn.Conv2d(16, 12, 1, bias=bias)
    elif kind == "conv1d":
        made = nn.Conv1d(8, 12, 3, padding=1, bias=bias)
    elif kind == "squareconv":
        made = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
    elif kind == "embedding":
        made = nn.Embedding(20, 16)
    elif kind == "norm":
        made = nn.LayerNorm(16)
        made.weight.data = torch.randn(16)
    else:
        from transformers.pytorch_utils import Conv1D

        made = Conv1D(24, 16)
        made.weight.data = torch.randn(16, 24) * 0.1
    return made


def module(
    base: nn.Module,
    tensors: dict[str, Tensor],
    settings: dict[str, Any] | None = None,
    alpha: float | None = None,
    name: str = "block.layer",
) -> Module:
    """What a dialect hands to a family, with PEFT's or kohya's scale."""
    weight = base.weight.detach().clone()
    bias = None if getattr(base, "bias", None) is None else base.bias.detach().clone()
    said = settings or {}

    def scale(rank: int) -> float:
        if alpha is not None:
            return alpha / rank if alpha else 1.0
        own = said.get("lora_alpha", said.get("alpha"))
        return 1.0 if own is None else own / (rank**0.5 if said.get("use_rslora") else rank)

    turned = type(base).__name__ == "Conv1D"
    layout = "conv" if weight.ndim > 2 else "transposed" if turned else "linear"
    return Module(
        name, tensors, tuple(weight.shape), layout, scale, alpha, lambda: weight, lambda: bias, said
    )


def built(made: Module) -> tuple[str, Built]:
    """Family and updates, as a dialect finds them."""
    found = family_of(made.tensors, made.settings)
    assert found is not None, sorted(made.tensors)
    assert get_family(found.name) is found
    return found.name, found.build(made)


def near(update: Any, expected: Tensor, tolerance: float = 1e-5) -> None:
    """ΔW is the expected one to a relative tolerance, in every form the update gives it in."""
    size = expected.norm()
    assert size > 1e-3
    assert update.shape == tuple(expected.shape)
    found = delta(update)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * size, float((found - expected).norm() / size)
    left, right = update.factors()
    assert ((left @ right).reshape(expected.shape) - expected).norm() <= 3 * tolerance * size


# -- LyCORIS ---------------------------------------------------------------------------------------


def lycoris(algorithm: Any, base: nn.Module, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """A LyCORIS module on a layer, its parameters moved, and its tensors as saved."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    made = algorithm("x", base, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "org_" in name:
                continue
            if "dora_scale" in name or "rescale" in name:
                value *= 1 + 0.2 * torch.rand_like(value)
            else:
                value += 0.3 * torch.randn_like(value)
    made.eval()
    return made, {key: value.detach().clone() for key, value in made.state_dict().items()}


def lycoris_change(made: Any, base: nn.Module) -> Tensor:
    """ΔW as LyCORIS' forward pass applies it: what it was trained with."""
    seen: list[Tensor] = []

    def record(x: Tensor, weight: Tensor, bias: Any = None, **rest: Any) -> Tensor:
        seen.append(weight.detach().clone())
        return torch.zeros(())

    made.op = record
    made.org_forward = lambda x, *rest, **more: torch.zeros(())
    made.forward(torch.zeros(1))
    assert len(seen) == 1
    return seen[0].reshape(base.weight.shape)


# -- PEFT ------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One layer at ``block.layer``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"layer": inner})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["layer"](x)


def peft_model(
    config: Any, base: nn.Module, spread: float = 0.1
) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """The model with moved parameters, its tensors by key end, and its config as saved."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = peft.get_peft_model(Net(base), config)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value += spread * torch.randn_like(value)
        model.eval()
        state = peft.get_peft_model_state_dict(model)
    own = "base_model.model.block.layer."
    ends = {k.removeprefix(own): v.detach().clone() for k, v in state.items()}
    config = model.peft_config["default"].to_dict()
    return model, ends, json.loads(json.dumps(config, default=list))
