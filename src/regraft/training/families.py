"""One PEFT config per family, the modules it goes on, and the form in which it is saved."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regraft.errors import BadOption
from regraft.running import optional
from regraft.training.settings import FAMILIES, Settings

#: Where a U-Net is changed if nothing is said: the attention projections, as diffusers' scripts do.
_ATTENTION = r".*\.attn[12]\.to_(q|k|v|out\.0)"
_PURPOSE = "Training"
#: Families that change a matrix only: PEFT's layers for convolutions lack these.
_LINEAR_ONLY = ("pissa", "qa-lora")


def config_for(settings: Settings, module: Any, kind: str) -> Any:
    """The PEFT config of a run.

    Parameters
    ----------
    settings : Settings
    module : nn.Module
        The bare component.
    kind : "diffusion" or "language"

    Raises
    ------
    BadOption
        The pattern names nothing, or the family takes no such option.
    MissingDependency
    """
    family, size = settings.family, settings.size
    if FAMILIES[family].language_only and kind != "language":
        raise BadOption(
            f"{family} is for language models, and this base is a {kind} model.",
            fix="Choose another family.",
        )
    reads = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if FAMILIES[family].language_only and reads and size and size >= reads:
        raise BadOption(
            f"{size:g} virtual tokens leave no room for text: the base reads {reads} tokens.",
            fix="Give a lower rank.",
        )
    with optional(_PURPOSE):
        import peft

        from regraft import tuners

    alpha = settings.alpha if settings.alpha is not None else size
    made: Any
    told: dict[str, Any] = {}
    if family not in ("prompt", "prefix"):
        told["target_modules"] = targets(settings, module, kind)
    rank = int(size) if size is not None and size >= 1 else size
    if family in ("lora", "dora", "pissa"):
        made = peft.LoraConfig
        whole = alpha is not None and float(alpha).is_integer()
        told |= {"r": rank, "lora_alpha": int(alpha) if whole and alpha else alpha}
        told["fan_in_fan_out"] = any(type(m).__name__ == "Conv1D" for m in module.modules())
        if family == "dora":
            told["use_dora"] = True
        elif family == "pissa":
            told["init_lora_weights"] = "pissa"
    elif family in ("loha", "lokr"):
        made = peft.LoHaConfig if family == "loha" else peft.LoKrConfig
        told |= {"r": rank, "alpha": alpha}
    elif family == "foura":
        made = tuners.FouRAConfig
        told |= {"r": rank, "alpha": alpha}
    elif family == "qa-lora":
        made = tuners.QALoraConfig
        told |= {"r": rank, "lora_alpha": alpha, "qalora_group_size": settings.group}
    elif family == "lora-x":
        made = tuners.LoraXConfig
        told["r"] = rank
    elif family == "svdiff":
        made = tuners.SVDiffConfig
    elif family == "bottleneck":
        made = tuners.BottleneckConfig
        told |= {} if rank is None else {"width": rank}
    else:
        made = peft.PromptTuningConfig if family == "prompt" else peft.PrefixTuningConfig
        told["num_virtual_tokens"] = rank
    if kind == "language":
        told["task_type"] = "CAUSAL_LM"
    try:
        return made(**{**told, **settings.options})
    except (TypeError, ValueError) as error:
        raise BadOption(
            f"{family} does not take these options: {error}.",
            fix=f"They are arguments of {made.__name__}.",
        ) from error


def targets(settings: Settings, module: nn.Module, kind: str) -> Any:
    """``target_modules``: the pattern that was given, made to mean leaves only; or the usual ones.

    Returns
    -------
    str, or None where the family itself knows

    Raises
    ------
    BadOption
        The pattern is none, or matches no module that can be changed.
    """
    family, pattern = settings.family, settings.targets
    if pattern is None:
        if family in ("svdiff", "bottleneck"):
            return None
        if kind == "language":
            return _language_linears(module)
        pattern = _ATTENTION
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise BadOption(
            f"The targets {pattern!r} are no regular expression: {error}.",
            fix="Give a pattern of whole module names, such as .*attn1.to_q",
        ) from error
    matched = {name: m for name, m in module.named_modules() if name and found.fullmatch(name)}
    if family == "bottleneck" and matched:
        return pattern
    from regraft.tuners.config import exactly
    from regraft.tuners.layer import kind_of

    kinds: tuple[str, ...] = ("linear", "transposed", "conv")
    kinds = kinds[:2] if family in _LINEAR_ONLY else kinds
    kinds += ("embedding", "vector") if family == "svdiff" else ()
    names = [name for name, m in matched.items() if kind_of(m) in kinds]
    if not names:
        raise BadOption(
            f"No module of the base that {family} changes has a name like {pattern!r}.",
            fix="The pattern must match whole names; `regraft compare BASE BASE` lists them.",
        )
    return pattern if len(names) == len(matched) else exactly(names)


def _language_linears(module: Any) -> str:
    """All linear layers but the output's, as PEFT's "all-linear", spelled out."""
    from regraft.tuners.config import exactly
    from regraft.tuners.layer import kind_of

    head = module.get_output_embeddings()
    return exactly(
        name
        for name, part in module.named_modules()
        if part is not head and kind_of(part) in ("linear", "transposed")
    )


def state_of(model: Any) -> dict[str, Tensor]:
    """What PEFT saves of the adapter, on the CPU."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}


def saved_form(
    settings: Settings, model: Any, first: dict[str, Tensor], calibration: Iterable[Any]
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """What is written of a trained adapter: tensors, ``adapter_config.json``, and notes.

    PiSSA becomes the LoRA of twice the rank that does the same on the base as it was,
    B A − B₀ A₀ = [B, −B₀] [A; A₀]; a gated FouRA is frozen at its mean gates.

    Parameters
    ----------
    first : dict
        The adapter before its first step, for PiSSA.
    calibration : iterable of calls
        What the gates are averaged over.
    """
    config = model.peft_config["default"]
    notes: list[str] = []
    if settings.family == "foura" and config.gate in ("soft", "hard"):
        from regraft.tuners.foura import freeze

        gate = config.gate
        freeze(model, calibration)
        config = model.peft_config["default"]
        notes.append(f"the {gate} gate was frozen at its mean over the training data")
    tensors = state_of(model)
    told = _plain(config)
    if settings.family == "pissa":
        tensors = {name: _doubled(name, new, first[name]) for name, new in tensors.items()}
        told |= {"r": 2 * told["r"], "lora_alpha": 2 * told["lora_alpha"]}
        for name in ("rank_pattern", "alpha_pattern"):
            told[name] = {key: 2 * value for key, value in (told.get(name) or {}).items()}
        told["init_lora_weights"] = True
        notes.append("PiSSA is written as the LoRA of twice the rank that fits the base as it was")
    told |= {"inference_mode": True}
    return {name: tensors[name].contiguous() for name in sorted(tensors)}, told, notes


def _doubled(name: str, new: Tensor, old: Tensor) -> Tensor:
    return torch.cat([new, old]) if "lora_A" in name else torch.cat([new, -old], dim=1)


def _plain(config: Any) -> dict[str, Any]:
    """A PEFT config as PEFT writes it, with its sets in order."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        text = (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    sets = {k for k in found if isinstance(getattr(config, k, None), set | frozenset)}
    return {k: sorted(v) if k in sets else v for k, v in found.items()}
