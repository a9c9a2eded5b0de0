"""What a run is made of, as data: its settings, the base's bytes, the versions; and its draws."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from regraft.training.settings import Settings
from regraft.versions import regraft_version

_LEFT_OUT = ("base", "data", "prior", "device", "tensorboard")


def seed_of(*words: object) -> int:
    """A seed that depends on these words only."""
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def generator(*words: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*words))


def told(settings: Settings) -> dict[str, Any]:
    """The settings that change the output, without paths; the rate and rank that were meant."""
    found = asdict(settings) | {"lr": settings.rate, "rank": settings.size}
    return {k: v for k, v in found.items() if k not in _LEFT_OUT}


def hash_of(module: nn.Module) -> str:
    """SHA-256 of a module's parameters, by name, in the dtype it is run in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for part in _parts(tensor.detach()):
            flat = part.cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(tensor: Any) -> list[torch.Tensor]:
    """A tensor's own numbers; of a torchao tensor its codes, scales and zero points."""
    if type(tensor).__module__.startswith("torchao."):
        return [getattr(tensor, name) for name in tensor.tensor_data_names]
    return [tensor]


def versions() -> dict[str, str]:
    found = {"regraft": regraft_version(), "torch": torch.__version__}
    for name in ("accelerate", "bitsandbytes", "diffusers", "peft", "torchao", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
