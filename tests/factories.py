"""Tiny models of the real classes, and the files that hold them.

Everything is seeded and made in memory: no download, a few hundred kilobytes at most.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from regraft.bases.unet_names import to_ldm

#: The U-Nets of Stable Diffusion, as their configs on the hub have them.
SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
_TINY = {
    "sample_size": 8,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
}
TINY_SD = {
    **_TINY,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TINY_XL = {
    **_TINY,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 16,
    "use_linear_projection": True,
    "cross_attention_dim": 32,
}
#: One module of each kind of layer that the tiny U-Nets have.
UNET_LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UNET_1X1 = "mid_block.attentions.0.proj_in"  # linear where use_linear_projection is set
UNET_3X3 = "mid_block.resnets.0.conv1"


def unet(config: dict[str, Any] = TINY_SD, seed: int = 0) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**config).eval()


def clip(seed: int = 0, *, projection: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def llama(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=12,  # so that layers.1 is the beginning of layers.11
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    """Save with the model's own ``save_pretrained``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def pipeline_folder(folder: Path, config: dict[str, Any] = TINY_SD, seed: int = 0) -> Path:
    """A diffusers pipeline folder: U-Net and text encoder(s), no VAE."""
    save(unet(config, seed), folder / "unet")
    save(clip(seed), folder / "text_encoder")
    if "addition_embed_type" in config:
        save(clip(seed + 1, projection=True), folder / "text_encoder_2")
    (folder / "model_index.json").write_text("{}")
    return folder


def ldm_state(model: nn.Module) -> dict[str, Tensor]:
    """A U-Net's tensors under their original (LDM) names, as single-file checkpoints have them."""
    state = model.state_dict()
    names = to_ldm({key.rpartition(".")[0] for key in state})
    return {
        f"model.diffusion_model.{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v
        for k, v in state.items()
    }


def open_clip_state(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A CLIP text encoder's tensors as OpenCLIP names and fuses them."""
    state = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
    }
    inner = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layers."))
    for i in range(layers):
        for kind in ("weight", "bias"):
            ours = f"encoder.layers.{i}."
            theirs = f"transformer.resblocks.{i}."
            out[f"{theirs}attn.in_proj_{kind}"] = torch.cat(
                [state[f"{ours}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            )
            for old, new in inner.items():
                out[f"{theirs}{new}.{kind}"] = state[f"{ours}{old}.{kind}"]
    return {prefix + key: value.contiguous() for key, value in out.items()}


def ldm_file(path: Path, config: dict[str, Any] = TINY_SD, seed: int = 0) -> Path:
    """An original single-file checkpoint with the same weights as :func:`pipeline_folder`."""
    state = ldm_state(unet(config, seed))
    first = {
        k if k.startswith("text_model.") else f"text_model.{k}": v
        for k, v in clip(seed).state_dict().items()
    }
    if "addition_embed_type" in config:
        inside = "conditioner.embedders.0.transformer."
        second = clip(seed + 1, projection=True)
        state |= open_clip_state(second, "conditioner.embedders.1.model.")
    else:
        inside = "cond_stage_model.transformer."
    state |= {inside + k: v for k, v in first.items()}
    state["first_stage_model.encoder.conv_in.weight"] = torch.zeros(2, 3, 3, 3)
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path
