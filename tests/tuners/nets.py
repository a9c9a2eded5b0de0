"""A small net with a layer of every kind that tuners change, and ways to fill an adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

#: The modules of :class:`Net` that hold a matrix.
MATRICES = ["linear", "transposed", "conv1", "conv2", "grouped"]
#: The others, which SVDiff changes too.
OTHERS = ["table", "layer_norm", "group_norm"]


class Net(nn.Module):
    """(batch, 6) whole numbers below 20 → (batch, 5)."""

    def __init__(self, seed: int = 0) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(20, 12)
        self.layer_norm = nn.LayerNorm(12)
        self.linear = nn.Linear(12, 16)
        self.transposed = Conv1D(8, 16)
        self.conv1 = nn.Conv1d(6, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), padding=1, dilation=2, padding_mode="circular")
        self.group_norm = nn.GroupNorm(2, 4)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.head = nn.Linear(6, 5)
        nn.init.normal_(self.transposed.weight, std=0.3)
        nn.init.normal_(self.layer_norm.weight, mean=1.0, std=0.3)
        nn.init.normal_(self.group_norm.weight, mean=1.0, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.layer_norm(self.table(ids)))
        x = self.conv1(self.transposed(torch.tanh(x)))
        x = self.group_norm(self.conv2(x[:, None]))
        return self.head(self.grouped(torch.tanh(x)).mean(dim=(2, 3)))


def ids(seed: int = 0) -> Tensor:
    return torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(seed))


def fill(model: nn.Module, adapter: str = "default", seed: int = 0, size: float = 0.2) -> None:
    """Random numbers for what an adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f".{adapter}"):
                parameter.normal_(0, size, generator=generator)


def same_folders(a: Path, b: Path) -> bool:
    """Whether two PEFT folders hold the same bytes."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in names)
