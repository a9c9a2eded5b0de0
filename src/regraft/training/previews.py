"""What a run shows of itself at its checkpoints: a grid of pictures, or sampled completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from regraft.errors import BadOption, InputNotFound
from regraft.running import Diffusion, Language, optional
from regraft.running.data import read_texts

#: As a prompt: the first few of the held-out items' own.
HELD_OUT = "held-out"
_FEW = 4
#: Sides and gaps of the pictures in a grid, in pixels.
SIDE, _GAP = 256, 2
#: Tokens of a completion, and the temperature it is sampled at.
LONGEST, TEMPERATURE = 64, 0.7


def read_prompts(given: Sequence[str]) -> list[str]:
    """Prompts as they were given, with those of files in their place: a line each.

    Raises
    ------
    InputNotFound
        Something like a file is not there.
    BadData, BadOption
    """
    found: list[str] = []
    for text in given:
        path = Path(text).expanduser()
        if text.lower().endswith(".txt"):
            if not path.is_file():
                raise InputNotFound("No such file of prompts.", file=path)
            lines = [
                line for item in read_texts(path).items for line in item.completion.split("\n")
            ]
            found += [line.strip() for line in lines if line.strip()]
        elif text.strip():
            found.append(text)
        else:
            raise BadOption("A validation prompt is empty.", fix="Give a text or a .txt file.")
    return list(dict.fromkeys(found))


def with_held_out(prompts: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """``held-out`` replaced by the first few of the held-out items' prompts.

    Raises
    ------
    BadOption
        Nothing is held out.
    """
    if HELD_OUT not in prompts:
        return list(prompts)
    if not held_out:
        raise BadOption(
            "Nothing is held out.", fix="Give prompts, or hold out a share of the data."
        )
    at = list(prompts).index(HELD_OUT)
    return list(dict.fromkeys([*prompts[:at], *held_out[:_FEW], *prompts[at + 1 :]]))


def draw_grid(
    model: Diffusion, prompts: Sequence[str], seeds: int
) -> UInt8[np.ndarray, "height width 3"]:
    """A row of pictures for each prompt, with the seeds 0, 1, … from the left.

    Drawn as the base is usually drawn from; sides over :data:`SIDE` pixels are scaled down.
    """
    with optional("Drawing pictures"):
        from PIL import Image

    rows = []
    for prompt in prompts:
        drawn = model.sample([prompt] * seeds, list(range(seeds)))
        side = min(SIDE, model.size)
        size = (side, side)
        if drawn.shape[1:3] != size:
            fitted = [
                Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS) for picture in drawn
            ]
            drawn = np.stack([np.asarray(picture) for picture in fitted])
        rows.append(drawn)
    side = rows[0].shape[1] + _GAP
    grid = np.full((len(rows) * side - _GAP, seeds * side - _GAP, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            grid[i * side : (i + 1) * side - _GAP, j * side : (j + 1) * side - _GAP] = picture
    return grid


def as_png(picture: UInt8[np.ndarray, "height width 3"]) -> bytes:
    with optional("Drawing pictures"):
        from PIL import Image

    stream = BytesIO()
    Image.fromarray(picture).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


@torch.no_grad()
def complete(
    model: Language, module: Any, prompts: Sequence[str], seeds: int
) -> list[dict[str, Any]]:
    """Completions of each prompt, with the seeds 0, 1, …: at most :data:`LONGEST` tokens.

    Parameters
    ----------
    module : the language model of ``model``, perhaps with an adapter

    Returns
    -------
    list of dict
        prompt, seed, completion.
    """
    tokenizer = model.tokenizer
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    module.eval()
    found = []
    for prompt in prompts:
        ids = start + tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        given = torch.tensor([ids], device=model.device)
        for seed in range(seeds):
            torch.manual_seed(seed)
            out = module.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=LONGEST,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                pad_token_id=padding,
            )
            text = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
            found.append({"prompt": prompt, "seed": seed, "completion": text})
    return found


def as_lines(samples: Sequence[dict[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples)
