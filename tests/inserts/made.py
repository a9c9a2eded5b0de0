"""Tiny bases that run, and inserts for them as PEFT itself writes them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests import factories
from tests.running.bases import language_folder, tokenizer

FAMILIES = ("prompt", "prefix", "bottleneck")
TOKENS, WIDTH = 3, 4
#: The layers of the short base, by their numbers in the other.
KEPT = (0, 1, 3, 4, 6, 8, 9, 11)


def base(folder: Path, seed: int = 0) -> Path:
    """A Llama of 12 layers, 16 wide, with two heads and one key head."""
    return language_folder(folder, seed)


def gpt2(folder: Path, seed: int = 0) -> Path:
    """A GPT-2 of 2 layers, 16 wide: fused projections, learned positions."""
    factories.save(factories.gpt2(seed), folder)
    tokenizer(16).save_pretrained(folder)
    return folder


def wide(folder: Path, seed: int = 3) -> Path:
    """A Llama of 2 layers, 24 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=40, max_position_embeddings=16, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    factories.save(LlamaForCausalLM(config).eval(), folder)
    tokenizer(16).save_pretrained(folder)
    return folder


def short(source: Path, folder: Path, layers: tuple[int, ...]) -> Path:
    """The base with only these layers."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": len(layers)}))
    state = {}
    for name, weight in load_file(source / "model.safetensors").items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in layers:
                continue
            parts[2] = str(layers.index(int(parts[2])))
        state[".".join(parts)] = weight
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def moved(source: Path, folder: Path, by: float, seed: int = 1) -> Path:
    """The base with every weight moved by a share of its size."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    draw = torch.Generator().manual_seed(seed)
    state = {
        name: w + by * w.std() * torch.randn(w.shape, generator=draw) if w.ndim > 1 else w
        for name, w in load_file(source / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def hosted(folder: Path, family: str, seed: int = 0, **options: Any) -> Any:
    """PEFT's model of an insert of random numbers, trained by nobody."""
    import peft
    from transformers import AutoModelForCausalLM

    import regraft.tuners as tuners

    makers = {
        "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": TOKENS}),
        "p-tuning": (
            peft.PromptEncoderConfig,
            {"num_virtual_tokens": TOKENS, "encoder_hidden_size": 8},
        ),
        "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": TOKENS}),
        "bottleneck": (tuners.BottleneckConfig, {"width": WIDTH, "init_weights": False}),
    }
    make, told = makers[family]
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, make(task_type="CAUSAL_LM", **{**told, **options}))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    return made.eval()


def saved(source: Path, folder: Path, family: str, **options: Any) -> Path:
    """The folder that PEFT writes of it."""
    made = hosted(source, family, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def logits(base_folder: Path, folder: Path | None, ids: torch.Tensor) -> torch.Tensor:
    """What transformers and PEFT compute, the rows of the input only."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import regraft.tuners  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder)
        out = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return out[:, -ids.shape[1] :]


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder: Path, out: Path, settings: dict[str, Any], tensors: Any = None) -> Path:
    """The adapter with other settings, and other tensors (a function of the old ones)."""
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps({**config(folder), **settings}))
    held = load_file(folder / "adapter_model.safetensors")
    held = tensors(held) if tensors else held
    save_file({k: v.contiguous() for k, v in held.items()}, out / "adapter_model.safetensors")
    return out
