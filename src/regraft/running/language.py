"""Causal language models, through transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regraft.errors import CannotRun
from regraft.files import Located
from regraft.running.emoji import no_progress_bars
from regraft.running.model import Language, not_whole, optional
from regraft.running.quantised import settle

_CAUSAL = ("ForCausalLM", "LMHeadModel", "LMHead")


def open_language(
    located: Located, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> Language:
    """Load a folder in transformers' layout; no code of the folder's own is run.

    Raises
    ------
    CannotRun
        It is not a causal language model, or the folder is not whole.
    MissingDependency
    """
    with optional("Running a language model"):
        from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = located.path
    named = [str(name) for name in config.get("architectures") or []]
    if named and not any(name.endswith(_CAUSAL) for name in named):
        raise CannotRun(
            f"A {named[0]} is not a causal language model.",
            file=folder,
            fix="Regraft runs language models with a ...ForCausalLM or ...LMHeadModel class.",
        )
    try:
        with no_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise not_whole(error, folder) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CannotRun(
            "The folder holds no tokenizer that can be loaded, and a language model reads with it.",
            file=folder,
            fix="Put the tokenizer's files beside config.json (tokenizer.json or the like).",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CannotRun(
            f"{len(missing)} weight(s) of the model are not in the checkpoint, such as "
            f"{missing[0]}; transformers would make them up.",
            file=folder,
            fix="Give the whole checkpoint.",
        )
    model.to(device)
    settle(model)
    return Language(located.ref, model, tokenizer, device)
