"""The scale of each module: alpha over rank, wherever the file keeps its alpha.

* a ``.alpha`` tensor: alpha / rank; absent or 0 means alpha = rank (kohya's readers agree);
* PEFT's config: ``lora_alpha`` or ``alpha_pattern``, over ``r`` or ``rank_pattern``, with a
  square root for rsLoRA (arXiv 2312.03732);
* diffusers' ``lora_adapter_metadata``: the same settings, under the component's name;
* nothing at all: 1.
"""

from __future__ import annotations

import math
from typing import Any

from regraft.adapters.patterns import matches_end
from regraft.errors import MalformedFile


def pattern_value(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the whole name or its dotted end.

    Raises
    ------
    MalformedFile
    """
    for key, value in patterns.items():
        if matches_end(key, module):
            return value
    return patterns.get(module, default)


def component_config(config: dict[str, Any], component: str) -> dict[str, Any]:
    """The part of a diffusers metadata dict that speaks of ``component``."""
    inside = f"{component}."
    own = {k.removeprefix(inside): v for k, v in config.items() if k.startswith(inside)}
    return own if "lora_alpha" in own or "r" in own else config


def config_scale(config: dict[str, Any], module: str, rank: int, file: str) -> float:
    """alpha / rank (or alpha / √rank) by a PEFT config.

    Raises
    ------
    MalformedFile
        The config's rank for this module is not the tensor's, or a value is not a number.
    """
    try:
        said = pattern_value(config.get("rank_pattern") or {}, module, config.get("r", rank))
        alpha = pattern_value(
            config.get("alpha_pattern") or {},
            module,
            config.get("lora_alpha", config.get("alpha", rank)),
        )
        said, alpha = int(said), float(alpha)
    except MalformedFile as error:
        raise MalformedFile(f"{module}: {error.what}", file=file, fix=error.fix) from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise MalformedFile(
            f"The adapter's config gives no usable rank and alpha for {module} ({error}).",
            file=file,
        ) from error
    if said != rank:
        raise MalformedFile(
            f"The adapter's config says rank {said} for {module}, its tensors have rank {rank}.",
            file=file,
            fix="Restore the adapter_config.json that was saved with these weights.",
        )
    if not math.isfinite(alpha):
        raise MalformedFile(f"The alpha of {module} is not a finite number.", file=file)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
