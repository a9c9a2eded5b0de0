"""Building and training the small language bases and their adapters."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab import training

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL = [PAD, BOS, EOS]
IGNORED = -100

#: tokens in a training row, the start token included
CONTEXT = 96

#: v1 and all that share its shape: about 0.49 M parameters with 259 tokens
SMALL: dict[str, int] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
#: wider and deeper: about 1.2 M
BIG: dict[str, int] = {
    "hidden_size": 128,
    "intermediate_size": 336,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}

LORA_TARGETS = [
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
]

Batch = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and three special ones: 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(SPECIAL + alphabet)}
    return _fast(Tokenizer(models.BPE(vocabulary, [])))


def bpe_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``size`` tokens, learned from ``texts`` line by line."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (line for text in texts for line in text.splitlines(keepends=True)), trainer
    )
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    start = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def build(tokenizer: PreTrainedTokenizerFast, shape: dict[str, int], seed: int) -> LlamaForCausalLM:
    """A fresh Llama of the given shape, its output layer not tied to its embedding."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            attention_dropout=0.0,
            use_cache=True,
            **shape,
        )
    )


def drop_layers(model: LlamaForCausalLM, kept: Sequence[int]) -> LlamaForCausalLM:
    """A copy with only the layers ``kept``, renumbered: the start of a pruned base."""
    student = copy.deepcopy(model)
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in kept)
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i
    student.config.num_hidden_layers = len(kept)
    return student


# --- batches ----------------------------------------------------------------------------------


def stream_batches(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    batch: int,
    context: int = CONTEXT,
    shares: Sequence[float] | None = None,
) -> Batch:
    """Rows that start at a line of one of ``texts``: the start token, then ``context`` - 1 tokens.

    ``shares`` says how often each text is drawn; alike if absent. Labels are the tokens themselves.
    """
    streams, starts = [], []
    for text in texts:
        lines = tokenizer(text.splitlines(keepends=True), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        lengths = torch.tensor([0, *map(len, lines)]).cumsum(0)
        streams.append(torch.tensor([token for line in lines for token in line]))
        starts.append(lengths[lengths < lengths[-1] - context])
    weights = torch.tensor(shares if shares is not None else [1.0] * len(texts))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.full((batch, context), tokenizer.bos_token_id)
        chosen = torch.multinomial(weights, batch, replacement=True, generator=generator)
        for row, i in zip(rows, chosen.tolist(), strict=True):
            at = starts[i][int(torch.randint(len(starts[i]), (1,), generator=generator))]
            row[1:] = streams[i][at : at + context - 1]
        return rows, rows

    return draw


def item_batches(
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[dict[str, str]],
    batch: int,
    context: int = CONTEXT,
) -> Batch:
    """Whole items, padded to the longest of all; loss on completions and whole texts only."""
    rows, labels = [], []
    start = int(tokenizer.bos_token_id)
    for item in items:
        prompt = tokenizer(item["prompt"])["input_ids"] if "prompt" in item else [start]
        text = item.get("completion", item.get("text", ""))
        body = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows.append((prompt + body)[:context])
        labels.append(([IGNORED] * len(prompt) + body)[:context])
    width = max(map(len, rows))
    pad = int(tokenizer.pad_token_id)
    table = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    wanted = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels])

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(table), (batch,), generator=generator)
        return table[chosen], wanted[chosen]

    return draw


# --- training ---------------------------------------------------------------------------------


def train(
    model: LlamaForCausalLM | PeftModel,
    batches: Batch,
    *,
    teacher: LlamaForCausalLM | None = None,
    **recipe: Any,
) -> dict[str, Any]:
    """Train what requires gradients; see :func:`lab.training.train` for ``recipe``.

    The loss is next-token cross-entropy; with a ``teacher``, the cross-entropy to its
    distribution instead (Hinton et al. 2015, arXiv:1503.02531, temperature 1).
    """

    def loss_of(draw: torch.Generator) -> Tensor:
        ids, labels = batches(draw)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        if teacher is None:
            return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
        with torch.no_grad():
            goal = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, goal.softmax(-1))

    model.train()
    parameters: list[Parameter] = [p for p in model.parameters() if p.requires_grad]
    facts = training.train(parameters, loss_of, **recipe)
    model.eval()
    return facts


def add_lora(
    model: LlamaForCausalLM, rank: int, alpha: int, dropout: float, seed: int
) -> PeftModel:
    """Freeze the base and add a fresh LoRA on the seven linear layers of each block."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


# --- files ------------------------------------------------------------------------------------


def open_base(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A saved base, in float32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a transformers folder with float16 weights; renamed into place when complete."""
    draft = _draft(folder)
    copy.deepcopy(model).half().save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / "generation_config.json").unlink(missing_ok=True)
    _rewrite(draft / "config.json", drop=("_name_or_path", "transformers_version"))
    # written by hand: the saver's own file differs between releases
    (draft / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": CONTEXT,
                "pad_token": PAD,
                "bos_token": BOS,
                "eos_token": EOS,
                "clean_up_tokenization_spaces": False,
            },
            indent=2,
        )
        + "\n"
    )
    _place(draft, folder)


def save_adapter(model: PeftModel, base: str, folder: Path) -> None:
    """Write a PEFT folder with float16 factors; its configuration calls the base ``base``."""
    draft = _draft(folder)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    model.peft_config["default"].base_model_name_or_path = base
    # or PEFT asks the base's configuration whether its vocabulary grew
    model.save_pretrained(draft, save_embedding_layers=False)
    (draft / "README.md").unlink(missing_ok=True)
    _rewrite(draft / "adapter_config.json", drop=("peft_version",))
    _place(draft, folder)


def _draft(folder: Path) -> Path:
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def _rewrite(path: Path, drop: Sequence[str]) -> None:
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    # PEFT keeps the targets as a set: sorted, so that a rebuild writes the same file
    if isinstance(content.get("target_modules"), list):
        content["target_modules"].sort()
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _place(draft: Path, folder: Path) -> None:
    for path in draft.rglob("*.*"):
        path.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
