"""Every tuner in every form, and the layers it takes: what the contract tests run over."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from regraft.tuners import (
    BottleneckConfig,
    FouRAConfig,
    LoraXConfig,
    QALoraConfig,
    SVDiffConfig,
)

#: Kind of layer → how to make one, and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 8), (2, 3, 8)),
    "wide linear": (lambda: nn.Linear(8, 12, bias=False), (2, 8)),
    "gpt2": (lambda: Conv1D(8, 8), (2, 3, 8)),
    "1x1": (lambda: nn.Conv2d(8, 10, 1), (2, 8, 5, 4)),
    "3x3": (lambda: nn.Conv2d(8, 10, 3, stride=2, padding=1), (2, 8, 5, 4)),
    "circular": (lambda: nn.Conv2d(8, 10, 3, padding=1, padding_mode="circular"), (2, 8, 5, 4)),
    "dilated": (lambda: nn.Conv2d(8, 10, (3, 1), dilation=2, padding="same"), (2, 8, 6, 4)),
    "1d": (lambda: nn.Conv1d(8, 10, 3, stride=2), (2, 8, 7)),
    "3d": (lambda: nn.Conv3d(4, 6, 2, padding=1), (1, 4, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, stride=2), (2, 8, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), (2, 8, 5, 4)),
    "embedding": (lambda: nn.Embedding(9, 8), (2, 5)),
    "layer norm": (lambda: nn.LayerNorm(8), (2, 3, 8)),
    "group norm": (lambda: nn.GroupNorm(2, 8), (2, 8, 3)),
    "rms norm": (lambda: LlamaRMSNorm(8), (2, 3, 8)),
}
LINEAR = {"linear", "wide linear", "gpt2"}
CONVS = {"1x1", "3x3", "1d", "3d"}
#: PEFT's LoRA runs these as if they were plain, and merges them as what they are.
ODD = {"circular", "dilated"}
GROUPED = {"grouped", "depthwise"}
VECTORS = {"layer norm", "group norm", "rms norm"}


class One(nn.Module):
    """One layer of a kind, and nothing else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = LAYERS[kind][0]()
        for parameter in self.layer.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=1.0, std=0.3)
        if kind == "gpt2":
            nn.init.normal_(self.layer.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def given(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input for a layer of a kind."""
    generator = torch.Generator().manual_seed(1)
    shape = LAYERS[kind][1]
    if kind == "embedding":
        return torch.randint(9, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One form of one tuner.

    ``takes`` are the kinds of layer it changes, ``exact`` whether unmerging puts the old weight
    back bit for bit, ``slopes`` which of its parameters have the gradient of what they do: all, or
    those whose name has one of these words, or none.
    """

    config: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    takes: frozenset[str] = frozenset(LINEAR | CONVS)
    merges: bool = True
    exact: bool = True
    new_is_base: bool = True
    slopes: tuple[str, ...] = ("",)
    ours: bool = True
    unet: Any = ("to_q", "to_out.0", "conv1", "proj_in")
    llama: Any = ("q_proj", "down_proj")

    def make(self, *targets: str, **more: Any) -> Any:
        """A config for these modules; of a PEFT family, for these and no Conv1D."""
        told = {"target_modules": list(targets) or None} | deepcopy(self.options) | more
        return self.config(**told)

    def on_unet(self, **more: Any) -> Any:
        return self.make(*self.unet, **more)

    def on_llama(self, **more: Any) -> Any:
        return self.make(*self.llama, **more)


def _lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, **options)


def _case(config: Callable[..., Any], takes: set[str], **facts: Any) -> Case:
    options = {k: facts.pop(k) for k in list(facts) if k not in Case.__dataclass_fields__}
    return Case(config, options, frozenset(takes), **facts)


def _through_peft(takes: set[str], **facts: Any) -> Case:
    return _case(_lora, takes, ours=False, exact=False, **facts)


def _lora_x(**options: Any) -> Case:
    return _case(LoraXConfig, LINEAR | CONVS | ODD | GROUPED, **{"r": 3} | options)


def _foura(**options: Any) -> Case:
    gated = options["gate"] in ("soft", "hard")
    slopes = () if options["gate"] == "hard" else ("",)  # straight-through: test_foura.py
    merges = not gated
    return _case(FouRAConfig, LINEAR | CONVS | ODD, r=3, merges=merges, slopes=slopes, **options)


def _bottleneck(position: str, **facts: Any) -> Case:
    return _case(BottleneckConfig, LINEAR, position=position, width=3, merges=False, **facts)


CASES: dict[str, Case] = {
    "lora": _through_peft(LINEAR | CONVS | {"embedding"}),
    # The paper's gradient takes the norm as a constant (arXiv 2402.09353, 4.3).
    "dora": _through_peft(LINEAR | CONVS | {"embedding"}, use_dora=True, slopes=("magnitude",)),
    "pissa": _through_peft(
        LINEAR | {"embedding"}, init_lora_weights="pissa", new_is_base=False,
        unet=("to_q", "to_out.0"),
    ),
    "lora-x": _lora_x(),
    "lora-x full": _lora_x(core="full"),
    "lora-x energy": _lora_x(r=0.9),
    "lora-x unstored": _lora_x(store_bases=False),
    "lora-x full unstored": _lora_x(core="full", store_bases=False),
    "svdiff": _case(SVDiffConfig, set(LAYERS), unet=(), llama=()),
    "foura": _foura(gate="none"),
    "foura dct": _foura(gate="none", transform="dct"),
    "foura frozen": _foura(gate="frozen"),
    "foura dct frozen": _foura(gate="frozen", transform="dct"),
    "foura soft": _foura(gate="soft"),
    "foura hard": _foura(gate="hard", transform="dct"),
    "qa-lora": _case(
        QALoraConfig, LINEAR - {"gpt2"}, r=3, qalora_group_size=4, unet=("to_q", "to_out.0"),
    ),
    "houlsby": _bottleneck("houlsby", unet=(), llama=()),
    "pfeiffer": _bottleneck("pfeiffer", norm=True, unet=(), llama=()),
    "parallel": _bottleneck("parallel", unet=(), llama=()),
}  # fmt: skip


def llama() -> nn.Module:
    """Two layers of a Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def fill(model: nn.Module, adapter: str = "default", seed: int = 0, size: float = 0.2) -> None:
    """Random numbers in all that an adapter holds: what it trains, and a frozen gate's mask.

    DoRA's magnitudes are moved, not replaced: they are lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inside = f".{adapter}." in f"{name}." and "base_layer" not in name
            if inside and "modules_to_save" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + size * noise)
                else:
                    parameter.copy_(size * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(f"foura_mask.{adapter}"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator))
