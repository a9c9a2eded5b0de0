"""Building and training the small text-to-image bases and their adapters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import Parameter, functional
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from lab import training
from regraft.demo.pair import EmojiPipeline
from regraft.demo.sampler import to_model, velocity

MAX_TOKENS = 8
HIDDEN = 96
CAPTION_DROPOUT = 0.12

LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("ff.net.0.proj", "ff.net.2"),
    *("proj_in", "proj_out"),
    *("conv1", "conv2"),
]


def build_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the captions' words; sequences of 8: start, words, end, pad."""
    words = sorted({word for caption in captions for word in caption.split()})
    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
    )


#: the embedded pair's U-Net: about 2.8 M parameters
PAIR_UNET: dict[str, Any] = {"block_out_channels": (32, 64, 96), "layers_per_block": 1}


def build_pipeline(
    captions: Sequence[str],
    seed: int,
    unet: dict[str, Any] = PAIR_UNET,
    hidden: int = HIDDEN,
) -> EmojiPipeline:
    """A fresh base: a U-Net of the given shape and a one-layer text encoder."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(captions)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            projection_dim=hidden,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    network = UNet2DConditionModel(
        sample_size=16,
        in_channels=12,
        out_channels=12,
        # no attention at 16x16: there it costs twice the time and adds little
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=hidden,
        attention_head_dim=8,
        norm_num_groups=8,
        **unet,
    )
    return EmojiPipeline(network, text_encoder, tokenizer)


def add_lora(
    pipeline: EmojiPipeline,
    rank: int,
    alpha: int,
    dropout: float,
    seed: int,
    targets: Sequence[str] = LORA_TARGETS,
) -> None:
    """Freeze the base and add a fresh LoRA on its linear and convolution sites."""
    torch.manual_seed(seed)
    pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)
    )
    pipeline.unet.add_adapter(config, adapter_name="default")


def fold_lora(pipeline: EmojiPipeline) -> None:
    """Let every LoRA layer compute with W + s·B·A instead of a second path beside W.

    The same function without dropout, at less than half the time for layers as small as these.
    """
    for module in pipeline.unet.modules():
        if isinstance(module, LoraLayer):
            module.forward = partial(_folded, module)


def _folded(layer: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    base, down, up = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    change = (up.weight.flatten(1) @ down.weight.flatten(1)).view_as(base.weight)
    weight = base.weight + layer.scaling["default"] * change
    if isinstance(base, nn.Conv2d):
        return functional.conv2d(x, weight, base.bias, base.stride, base.padding)
    return functional.linear(x, weight, base.bias)


def token_table(pipeline: EmojiPipeline, captions: Sequence[str]) -> Tensor:
    """Token ids ``[n + 1, 8]``; the last row is the empty caption."""
    rows = [*captions, ""]
    encoded = pipeline.tokenizer(rows, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


def train(
    pipeline: EmojiPipeline,
    images: np.ndarray,
    captions: Sequence[str],
    *,
    batch: int,
    **recipe: Any,
) -> dict[str, Any]:
    """Train what requires gradients on the rectified-flow loss; see :func:`lab.training.train`."""
    clean = to_model(images)
    tokens = token_table(pipeline, captions)

    def loss_of(draw: torch.Generator) -> Tensor:
        x0, mix, noise, ids = draw_batch(clean, tokens, batch, draw)
        condition = pipeline.text_encoder(input_ids=ids).last_hidden_state
        guess = velocity(pipeline, (1 - mix) * x0 + mix * noise, mix.flatten(), condition)
        return (guess - (noise - x0)).pow(2).mean()

    pipeline.unet.train()
    pipeline.text_encoder.train()
    return {"batch": batch, **training.train(trainable(pipeline), loss_of, **recipe)}


def trainable(pipeline: EmojiPipeline) -> list[Parameter]:
    """The parameters that require gradients, the U-Net's first."""
    modules = (pipeline.unet, pipeline.text_encoder)
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def draw_batch(
    clean: Tensor, tokens: Tensor, batch: int, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One batch: clean images, times ``[n, 1, 1, 1]``, noise, token ids (some captions empty)."""
    rows = torch.randperm(len(clean), generator=draw)[:batch]
    # logit-normal times: the middle of the path is the hardest (Esser et al. 2024,
    # arXiv:2403.03206)
    t = torch.sigmoid(torch.randn(len(rows), generator=draw))
    noise = torch.randn((len(rows), *clean.shape[1:]), generator=draw)
    dropped = torch.rand(len(rows), generator=draw) < CAPTION_DROPOUT
    ids = tokens[torch.where(dropped, torch.tensor(len(clean)), rows)]
    return clean[rows], t[:, None, None, None], noise, ids
