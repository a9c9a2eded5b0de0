"""A result as a transfer makes it, without making one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regraft.result import SiteResult, TransferResult

Make = Callable[..., TransferResult]

SITES = (
    "unet.conv_in",
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "unet.mid_block.attentions.0.proj_in",
    "unet.up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2",
)


def site(name: str, **facts: Any) -> SiteResult:
    defaults: dict[str, Any] = {
        "source": name,
        "kind": "kind",
        "shape": (64, 32),
        "rank_in": 8,
        "rank_out": 4,
        "share": 0.1,
        "kept": 0.8,
        "kept_by_copy": 1.0,
        "cosine": 0.97,
        "difference": 0.2,
    }
    return SiteResult(site=name, **{**defaults, **facts})


def make_result(**facts: Any) -> TransferResult:
    defaults: dict[str, Any] = {
        "verdict": "copy",
        "why": "The target's weights are still close to the source's.",
        "method": "copy",
        "parameters": {"dimension": 320, "rank": None},
        "adapter": {"name": "style", "sha256": "a" * 64, "family": "lora", "dialect": "kohya"},
        "source": {"name": "org/base-a", "sha256_of_used_weights": "b" * 64},
        "target": {"name": "org/base-b", "sha256_of_used_weights": "c" * 64},
        "evidence": {"method": "copy", "coverage": 1.0, "cosine": 0.97, "difference": 0.2},
        "pairing": "name",
        "sites": [site(name) for name in SITES],
        "energy_kept": 0.8,
        "energy_kept_by_copy": 1.0,
        "output": "/home/someone/out/style-b.safetensors",
        "sha256": "d" * 64,
        "dialect": "diffusers",
        "dtype": "bf16",
        "seconds": 1.25,
        "versions": {"regraft": "0.1.0", "torch": "2.9"},
    }
    return TransferResult(**{**defaults, **facts})
