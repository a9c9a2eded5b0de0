"""Recognising the family of an adapter from its keys, so that a "not yet" can name it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regraft.errors import FamilyNotYet

#: Key pattern → family. The first match names the family.
_MARKS: tuple[tuple[str, str], ...] = (
    (r"(\.|^)(vera_lambda_[bd]|vera_[AB])(\.|$)", "VeRA"),
    (r"(^|\.)(prompt_embeddings|prompt_encoder\..*)$", "prompt or prefix tuning"),
    (r"^(emb_params|string_to_param.*|clip_[lg]|t5xxl|<[^<>]+>)$", "textual inversion"),
    (r"\.(fourierft_spectrum|waveft_spectrum)(\.\w+)*$", "Fourier or wavelet"),
    (r"\.(hra_u|lora_xs_\w+|ln_tuning_layers|randlora_\w+)(\.|$)", "special PEFT"),
    (r"\.(adapter_down|adapter_up|down_sampler|up_sampler)\.", "bottleneck adapter"),
)
#: PEFT types whose files are read.
READ = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "ADALORA", "LORA_X", "SVDIFF", "FOURA")
_COMPILED = [(re.compile(pattern), family) for pattern, family in _MARKS]

_LATER = "docs/formats.md lists the families that this version reads."


def refuse_other_family(keys: Iterable[str], path: Path) -> None:
    """Raise :class:`FamilyNotYet` if any key belongs to a family that is not read yet."""
    for key in keys:
        for pattern, family in _COMPILED:
            if pattern.search(key):
                raise FamilyNotYet(
                    f"This is a {family} adapter, which is not read yet.",
                    file=path,
                    tensor=key,
                    fix=_LATER,
                )


def refuse_other_config(config: dict[str, Any], path: Path) -> None:
    """Raise :class:`FamilyNotYet` if a PEFT config asks for more than ordinary LoRA."""
    kind = str(config.get("peft_type", "LORA")).upper()
    reasons = {
        "layer_replication": "LoRA with layer replication",
        "alora_invocation_tokens": "activated LoRA",
        "use_bdlora": "block-diagonal LoRA",
        "kasa_config": "KaSA",
        "monteclora_config": "MonteCLoRA",
        "arrow_config": "Arrow-routed LoRA",
        "target_parameters": "LoRA on bare parameters (mixture-of-experts)",
        "megatron_config": "Megatron LoRA",
    }
    family = "" if kind in READ else kind
    family = family or next((f for k, f in reasons.items() if config.get(k)), "")
    if family:
        raise FamilyNotYet(
            f"This is a {family} adapter, which is not read yet.", file=path, fix=_LATER
        )
