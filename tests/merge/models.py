"""Tiny models with an adapter trained on them, for PEFT's and diffusers' merges to be compared."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import factories

TOKENS = torch.arange(8)[None]


def noise(context: int = 16) -> tuple[Tensor, int, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(1, 4, 8, 8, generator=generator),
        1,
        torch.randn(1, 5, context, generator=generator),
    )


def tuned(config: Any, folder: Path, make: Any = factories.llama, size: float = 0.2) -> nn.Module:
    """A base in ``folder/base`` and PEFT's model of it, its adapter saved in ``folder/adapter``."""
    import peft

    factories.save(make(), folder / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(make(), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    return model.eval()


def peft_merge(model: nn.Module) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.merge_and_unload().state_dict()


def state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weight files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path
