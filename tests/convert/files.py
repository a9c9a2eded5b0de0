"""Small adapter files of several families, as the trainers write them, and their exact ΔW."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def lora(
    name: str, m: int, n: int, rank: int, alpha: float, kernel: tuple[int, ...] = (), seed: int = 0
) -> dict[str, Tensor]:
    ones = [1] * len(kernel)
    return {
        f"{name}.lora_down.weight": rand(rank, n, *kernel, seed=seed),
        f"{name}.lora_up.weight": rand(m, rank, *ones, seed=seed + 1),
        f"{name}.alpha": torch.tensor(alpha),
    }


def kohya(path: Path) -> Path:
    """A U-Net's linear and 3×3 layers and a text encoder's, with alphas that differ."""
    tensors = lora(Q, 24, 20, 6, 3.0) | lora(CONV, 16, 8, 4, 4.0, (3, 3)) | lora(TEXT, 12, 10, 6, 1)
    metadata = {
        "ss_sd_model_name": "sd15.safetensors",
        "ss_sd_model_hash": "abc",
        "ss_network_module": "networks.lora",
        "ss_output_name": "ink",
        "sshs_model_hash": "of the input",
    }
    return save(path, tensors, metadata)


def deltas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ΔW of every plain module of a kohya file, as matrices in fp64, by the definition."""
    found = {}
    for key, up in tensors.items():
        if key.endswith(".lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            down = tensors[f"{name}.lora_down.weight"]
            scale = float(tensors[f"{name}.alpha"]) / down.shape[0]
            found[name] = up.flatten(1).double() @ down.flatten(1).double() * scale
        elif key.endswith(".diff"):
            found[key.removesuffix(".diff")] = up.flatten(1).double()
    return found


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]
