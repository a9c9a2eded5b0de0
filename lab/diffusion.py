"""Building and training the small text-to-image bases and their adapters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from regraft.demo.pair import EmojiPipeline
from regraft.demo.sampler import to_model, velocity

MAX_TOKENS = 8
HIDDEN = 96
CAPTION_DROPOUT = 0.12
EMA_DECAY = 0.998

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


def build_pipeline(captions: Sequence[str], seed: int) -> EmojiPipeline:
    """A fresh base: U-Net of about 2.8 M parameters and a one-layer text encoder."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(captions)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            projection_dim=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=12,
        out_channels=12,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        # no attention at 16x16: there it costs twice the time and adds little
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=HIDDEN,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return EmojiPipeline(unet, text_encoder, tokenizer)


def add_lora(pipeline: EmojiPipeline, rank: int, alpha: int, dropout: float, seed: int) -> None:
    """Freeze the base and add a fresh LoRA on its linear and convolution sites."""
    torch.manual_seed(seed)
    pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS)
    pipeline.unet.add_adapter(config, adapter_name="default")


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
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    checkpoint: Path,
    weight_decay: float = 1e-3,
    warmup: int = 100,
    save_every: int = 250,
    ema: bool = True,
    stop: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, object]:
    """Train what requires gradients on the rectified-flow loss; resumes from ``checkpoint``.

    Each step's draws come from a generator seeded by (seed, step), so an interrupted run goes on
    exactly as it would have. ``stop`` ends early on a schedule made for ``steps``. With ``ema``
    the weights' running average is what remains at the end.
    Returns steps, seconds and the mean loss of each tenth of the run.
    """
    clean = to_model(images)
    tokens = token_table(pipeline, captions)
    parameters = [
        p
        for module in (pipeline.unet, pipeline.text_encoder)
        for p in module.parameters()
        if p.requires_grad
    ]
    average = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.AdamW(
        parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), foreach=True
    )
    losses: list[float] = []
    spent = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for p, a, kept, kept_average in zip(
            parameters, average, state["weights"], state["average"], strict=True
        ):
            p.data.copy_(kept)
            a.copy_(kept_average)
        optimiser.load_state_dict(state["optimiser"])
        losses, spent = state["losses"], state["seconds"]
    pipeline.unet.train()
    pipeline.text_encoder.train()
    started = time.monotonic() - spent
    last = steps if stop is None else stop
    for step in range(len(losses), last):
        rate = lr * min(1.0, (step + 1) / warmup)
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.005
        for group in optimiser.param_groups:
            group["lr"] = rate
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randperm(len(clean), generator=draw)[:batch]
        # logit-normal times: the middle of the path is the hardest (Esser et al. 2024,
        # arXiv:2403.03206)
        t = torch.sigmoid(torch.randn(len(rows), generator=draw))
        noise = torch.randn((len(rows), *clean.shape[1:]), generator=draw)
        dropped = torch.rand(len(rows), generator=draw) < CAPTION_DROPOUT
        ids = tokens[torch.where(dropped, torch.tensor(len(clean)), rows)]
        condition = pipeline.text_encoder(input_ids=ids).last_hidden_state
        mix = t[:, None, None, None]
        x0 = clean[rows]
        guess = velocity(pipeline, (1 - mix) * x0 + mix * noise, t, condition)
        loss = (guess - (noise - x0)).pow(2).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        decay = min(EMA_DECAY, (step + 1) / (step + 10)) if ema else 0.0
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        done = step + 1
        if done % save_every == 0 or done == last:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state = {
                "weights": [p.detach() for p in parameters],
                "average": average,
                "optimiser": optimiser.state_dict(),
                "losses": losses,
                "seconds": time.monotonic() - started,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        if done % 100 == 0 or done == last:
            recent = float(np.mean(losses[-100:]))
            log(f"step {done}/{steps} loss {recent:.4f} {time.monotonic() - started:.0f} s")
    for p, a in zip(parameters, average, strict=True):
        p.data.copy_(a)
    tenths = [float(np.mean(part)) for part in np.array_split(np.array(losses), 10)]
    return {
        "steps": last,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "loss_by_tenth": [round(x, 4) for x in tenths],
    }
