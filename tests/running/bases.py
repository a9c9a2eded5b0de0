"""Tiny bases that run, made on the spot from the real classes."""

from __future__ import annotations

from pathlib import Path

import torch

from tests import factories

WORDS = ("a", "b", "c", "d", "e", "0", "1", "2", "3", "4", "+", "=")


def tokenizer(length: int = 8):
    """A word-level tokenizer: start 0, end and padding 1, then the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(("[BOS]", "[EOS]", "[UNK]", *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=length,
        bos_token="[BOS]",
        eos_token="[EOS]",
        pad_token="[EOS]",
        unk_token="[UNK]",
    )


def clip_tokenizer():
    """A CLIP tokenizer with single letters only."""
    from transformers import CLIPTokenizer

    letters = [*"abcdefgh", *(f"{c}</w>" for c in "abcdefgh")]
    vocabulary = {w: i for i, w in enumerate(("<|startoftext|>", "<|endoftext|>", *letters))}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)


def stable_diffusion_folder(
    folder: Path, *, xl: bool = False, prediction: str = "epsilon", seed: int = 0
) -> Path:
    """A whole pipeline of random weights, about 100 kB: 16-pixel pictures."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    parts = {
        "vae": vae,
        "unet": factories.unet(factories.TINY_XL if xl else factories.TINY_SD, seed),
        "text_encoder": factories.clip(seed),
        "tokenizer": clip_tokenizer(),
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type=prediction,
        ),
    }
    if xl:
        parts |= {
            "text_encoder_2": factories.clip(seed + 1, projection=True),
            "tokenizer_2": clip_tokenizer(),
        }
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return factories.save(pipeline, folder)


def language_folder(folder: Path, seed: int = 0) -> Path:
    """A tiny Llama with a tokenizer."""
    factories.save(factories.llama(seed), folder)
    tokenizer(16).save_pretrained(folder)
    return folder
