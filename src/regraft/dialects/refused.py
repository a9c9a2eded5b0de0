"""What is not read, recognised by its keys or its config, so that the refusal can name it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from regraft.adapters.families import Family, families
from regraft.dialects.inserted import TYPES
from regraft.dialects.keys import PEFT_PREFIX, whole_parameter
from regraft.errors import FamilyNotYet, MalformedFile
from regraft.files import TensorFile

_GATED = "gated FouRA"
#: Key pattern → family. The first match names the family.
_MARKS: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(prompt_embeddings|prompt_encoder\..*)$", "prompt or prefix tuning"),
    (r"^(emb_params|string_to_param.*|clip_[lg]|t5xxl|<[^<>]+>)$", "textual inversion"),
    (r"\.(lora_xs_\w+|randlora_\w+|vblora_\w+|unilora_\w+|tinylora_\w+)(\.|$)", "shared-matrix"),
    (r"\.(adapter_down|adapter_up|down_sampler|up_sampler)\.", "bottleneck adapter"),
    (r"\.bottleneck_(down|up|norm)\.", "bottleneck adapter"),
    (r"\.foura_gate\.", _GATED),
    (r"\.oft_R\.scaled_oft$", "Scaled OFT (OneTrainer)"),
    (r"\.lora_route\.|\.moe_gate\.|\.lora_diag(\.|$)", "routed or KaSA LoRA"),
)
_COMPILED = [(re.compile(pattern), family) for pattern, family in _MARKS]

#: PEFT types that are families of another name.
_ALIKE = ("LORA_X", "SVDIFF", "FOURA", "QA_LORA", "LN_TUNING")

#: Starts of a LoRA that take the base's own weight apart: the base that the file was saved for is
#: not the one it was trained on.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_LATER = "docs/families.md lists the families that this version reads."
#: Keys of families whose settings say what the tensors are.
_INSERTS = re.compile(r"(^prompt_embeddings|\.bottleneck_(down|up|norm)\.\w+)$")


def _a(name: str) -> str:
    return f"an {name}" if name[:1].upper() in "AEIO" else f"a {name}"


def refuse_other_family(keys: Iterable[str], path: Path) -> None:
    """Raise :class:`FamilyNotYet` if any key belongs to a family that is not read."""
    for key in keys:
        for pattern, family in _COMPILED:
            if pattern.search(key) and family == _GATED:
                raise FamilyNotYet(
                    "This is a gated FouRA adapter, which is not read: its gate depends on the "
                    "input, so it has no one ΔW.",
                    file=path,
                    tensor=key,
                    fix="Freeze the gate where it runs, regraft.tuners.foura.freeze(model, "
                    "batches), and save it again; `regraft train` does so by itself.",
                )
            if pattern.search(key):
                raise FamilyNotYet(
                    f"This is {_a(family)} adapter, which is not read yet.",
                    file=path,
                    tensor=key,
                    fix="`transfer` and `measure` read it in its PEFT folder, with its "
                    "adapter_config.json."
                    if _INSERTS.search(key)
                    else _LATER,
                )


def refuse_other_config(config: dict[str, Any], path: Path) -> None:
    """Raise :class:`FamilyNotYet` if a PEFT config asks for something that is not read."""
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind in TYPES:
        raise FamilyNotYet(
            f"This is {_a(kind)} adapter: it changes no weight, so there is no ΔW of it.",
            file=path,
            fix="`transfer` and `measure` take it as it is.",
        )
    reasons = {
        "layer_replication": "LoRA with layer replication",
        "alora_invocation_tokens": "activated LoRA",
        "use_bdlora": "block-diagonal LoRA",
        "kasa_config": "KaSA",
        "monteclora_config": "MonteCLoRA",
        "arrow_config": "Arrow-routed LoRA",
        "megatron_config": "Megatron LoRA",
    }
    read = {f.name.upper() for f in families()} | set(_ALIKE)
    family = "" if kind in read else kind
    family = family or next((f for k, f in reasons.items() if config.get(k)), "")
    if family:
        raise FamilyNotYet(
            f"This is {_a(family)} adapter, which is not read yet.", file=path, fix=_LATER
        )


def refuse_unchosen(family: Family, config: dict[str, Any], path: Path) -> None:
    """Raise :class:`FamilyNotYet` if the settings ask for a family that the tensors alone hide.

    PiSSA, OLoRA and others look like LoRA but sit on a base they have changed; QA-LoRA's A is
    narrower than the weight.
    """
    start = str(config.get("init_lora_weights", "")).lower()
    asked = next((s for s in _CHANGE_THE_BASE if start.startswith(s)), "")
    asked = "QA-LoRA" if config.get("use_qalora") else asked
    if asked and family.chosen is None and family.name == "lora":
        raise FamilyNotYet(
            f"This is {_a(asked)} adapter, which is not read yet.", file=path, fix=_LATER
        )


def beside(key: str, config: dict[str, Any]) -> tuple[str, str] | str | None:
    """What a tensor that fits no suffix is: PEFT and others save more than factors.

    Returns
    -------
    (module, role), or why it is not carried, or None if it is unknown
    """
    if key.startswith("bundle_emb."):
        return "a textual inversion embedding bundled with the adapter"
    if key.endswith(".reshape_weight"):
        return "the new shape of a weight that the adapter widens; the base has it as it is"
    if not config or not key.startswith(PEFT_PREFIX):
        return None
    if ".original_module." in key:
        return "the base's own, which PEFT keeps beside what was trained whole"
    module, parameter = whole_parameter(key)
    plain = module.removeprefix(PEFT_PREFIX)
    saved = [str(name) for name in config.get("modules_to_save") or []]
    if any(f"{name}." in f"{plain}." for name in saved):  # PEFT asks for the end of a name, no dot
        roles = {"weight": "whole", "bias": "whole_bias"}
        return (
            (module, roles[parameter]) if parameter in roles else (f"{module}.{parameter}", "whole")
        )
    if parameter == "bias" and config.get("bias", "none") != "none":
        return module, "whole_bias"
    if plain.endswith(("embed_tokens", "lm_head", "wte", "word_embeddings")):
        return "a copy of the base's own embedding, saved beside the adapter"
    return None


def said_twice(file: TensorFile, first: str, key: str) -> str:
    """Why a second tensor for one parameter is left out: PEFT saves some twice.

    Raises
    ------
    MalformedFile
        They differ, and nothing says which is meant.
    """
    if not torch.equal(file.read(first), file.read(key)):
        raise MalformedFile(
            f"Two tensors are given for one parameter, and they differ: {first} and {key}.",
            file=file.path,
            tensor=key,
            fix="Remove one of them.",
        )
    return f"the same as {first}"
