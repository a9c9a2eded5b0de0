"""Recognising the family of an adapter from its keys, so that a "not yet" can name it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regraft.errors import FamilyNotYet

#: Key pattern → family. The first match names the family.
_MARKS: tuple[tuple[str, str], ...] = (
    (r"\.(dora_scale|lora_magnitude_vector(\.\w+)*|magnitude)$", "DoRA"),
    (r"\.hada_(w[12]_[ab]|t[12])$", "LoHa"),
    (r"\.lokr_(w[12](_[ab])?|t[12])$", "LoKr"),
    (r"\.lora_mid\.weight$", "LoCon with Tucker decomposition"),
    (r"\.(oft_blocks|oft_diag|oft_r|oft_R\.weight|boft_R|boft_s)$", "OFT/BOFT"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "GLoRA"),
    (r"\.(diff|diff_b|w_norm|b_norm|set_weight)$", "full difference"),
    (r"\.(ia3_l(\.\w+)*|on_input)$", "(IA)³"),
    (r"(\.|^)(vera_lambda_[bd]|vera_[AB])(\.|$)", "VeRA"),
    (r"\.(q_layer|p_layer|lambda_layer)(\.weight)?$", "T-LoRA"),
    (r"(^|\.)(prompt_embeddings|prompt_encoder\..*)$", "prompt or prefix tuning"),
    (r"^(emb_params|string_to_param.*|clip_[lg]|t5xxl|<[^<>]+>)$", "textual inversion"),
    (r"\.(fourierft_spectrum|waveft_spectrum)(\.\w+)*$", "Fourier or wavelet"),
    (r"\.(hra_u|lora_xs_\w+|ln_tuning_layers|randlora_\w+)(\.|$)", "special PEFT"),
    (r"\.delta$", "SVDiff"),
    (r"\.(adapter_down|adapter_up|down_sampler|up_sampler)\.", "bottleneck adapter"),
)
_COMPILED = [(re.compile(pattern), family) for pattern, family in _MARKS]

_LATER = "This version carries ordinary LoRA (linear and convolution) and LoRA-X."


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
        "use_dora": "DoRA",
        "use_qalora": "QA-LoRA",
        "layer_replication": "LoRA with layer replication",
        "alora_invocation_tokens": "activated LoRA",
        "use_bdlora": "block-diagonal LoRA",
        "kasa_config": "KaSA",
        "monteclora_config": "MonteCLoRA",
        "arrow_config": "Arrow-routed LoRA",
        "target_parameters": "LoRA on bare parameters (mixture-of-experts)",
        "megatron_config": "Megatron LoRA",
    }
    family = kind if kind != "LORA" else next((f for k, f in reasons.items() if config.get(k)), "")
    start = str(config.get("init_lora_weights", "")).lower()
    if not family and start.startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
        # These change the base's weights at the start of training, so B·A alone is not ΔW.
        family = f"LoRA started by {start} (it changes the base itself)"
    if family:
        raise FamilyNotYet(
            f"This is a {family} adapter, which is not read yet.", file=path, fix=_LATER
        )
