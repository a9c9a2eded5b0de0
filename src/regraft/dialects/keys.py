"""From the keys of a file to modules and roles: which suffix is which tensor of which family."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from regraft.adapters.families import families

PEFT_PREFIX = "base_model.model."

#: Key suffix → role. A dot-free kohya module name ends at the first dot, so this is unambiguous.
SUFFIXES: dict[str, str] = {
    # LoRA
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_down": "down",
    ".lora_up": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_B.bias": "up_bias",
    ".lora_up.bias": "up_bias",
    ".alpha": "alpha",
    # AdaLoRA
    ".lora_E": "lora_E",
    ".ranknum": "ranknum",
    # DoRA
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".magnitude": "magnitude",
    # LoRA-X (docs/formats.md)
    ".lora_x_U": "u",
    ".lora_x_S": "core",
    ".lora_x_V": "v",
    # LyCORIS and PEFT
    **{f".hada_{r}": f"hada_{r}" for r in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{r}": f"lokr_{r}" for r in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    ".oft_R.weight": "oft_r",
    ".oft_embedding_R.weight": "oft_embedding_r",
    ".oft_embedding_R": "oft_embedding_r",
    ".boft_R": "boft_r",
    ".boft_s": "boft_s",
    **{f".{r}.weight": r for r in ("a1", "a2", "b1", "b2", "bm")},
    ".on_input": "on_input",
    ".ia3_l": "ia3_l",
    ".q_layer.weight": "t_q",
    ".p_layer.weight": "t_p",
    ".lambda_layer": "t_lambda",
    # whole changes, and whole weights
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
    ".set_weight": "whole",
    ".ln_tuning_layers.weight": "whole",
    ".ln_tuning_layers.bias": "whole_bias",
    ".token_adapter.trainable_tokens_delta": "tokens",
    # singular values, and the frequency domain
    ".delta": "delta",
    ".foura_A": "foura_a",
    ".foura_B": "foura_b",
    ".foura_mask": "foura_mask",
}
#: Roles whose tensors stand beside any family in one module → the family they are themselves.
BESIDE: dict[str, str] = {"diff_b": "full", "b_norm": "full", "whole_bias": "whole"}


@cache
def suffixes() -> dict[str, str]:
    """Key suffix → role: :data:`SUFFIXES`, and PEFT's tuners, whose roles are the ends of keys."""
    known = set(SUFFIXES.values())
    ends = {
        role for f in families() for role in (*f.may, *f.marks, *(r for n in f.needs for r in n))
    }
    more = {f".{role}": role for role in sorted(ends - known) if "_" in role}
    return SUFFIXES | more


@cache
def _named() -> re.Pattern[str]:
    """PEFT keeps the adapter's name inside the key when a state dict is saved by hand."""
    ends = {s.removesuffix(".weight").removesuffix(".bias") for s in suffixes()}
    ours = sorted(re.escape(e) for e in ends if "_" in e and e.count(".") == 1)
    return re.compile(
        rf"({'|'.join(ours)}|\.glora_[A-E]|\.trainable_tokens_delta)"
        r"\.(?!(?:weight|bias|scaled_oft|Xd?|Xu|zeros)$)[^.]+(?=(?:\.(?:weight|bias|Xd?|Xu))?$)"
    )


#: Wrappers that training loops leave in names: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
#: PEFT's own wrappers around a layer that it saves whole.
_AROUND = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.[^.]+)?)$")
#: diffusers before 0.22 hung the LoRA on the attention's processor, or wrote ``_lora`` in the name.
_OLD_DIFFUSERS = re.compile(r"(.+?)(?:\.processor)?\.((?:to|add)_\w+?)_lora\.(down|up)\.weight")
_OLD_OUTPUT = {"to_out": "to_out.0"}
_OLD_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
#: XLabs' Flux trainer hangs it on the processor too; ``lookup`` knows what its layers are.
_XLABS = re.compile(r"(.+\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight")
#: A whole normalisation of a native checkpoint, as control LoRAs bring it.
_NORM_SCALE = re.compile(r".+\.(?:query|key)_norm\.scale")


def split_key(key: str) -> tuple[str, str] | None:
    """(module name, role) of a key, or None if no suffix is known."""
    key = _WRAPPERS.sub("", key)
    if old := _OLD_DIFFUSERS.fullmatch(key):
        text = old[1].endswith(".self_attn")
        layer = (_OLD_ENCODER if text else _OLD_OUTPUT).get(old[2], old[2])
        return f"{old[1]}.{layer}", old[3]
    if xlabs := _XLABS.fullmatch(key):
        return xlabs[1], xlabs[2]
    if _NORM_SCALE.fullmatch(key):
        return key, "whole"
    plain = _named().sub(r"\1", key)
    # The longest suffix first: ".lora_B.weight" also ends in nothing else, but ".a1.weight" might.
    for length in (3, 2, 1):
        parts = plain.rsplit(".", length)
        if len(parts) == length + 1:
            suffix = "." + ".".join(parts[1:])
            if suffix in suffixes():
                return parts[0], suffixes()[suffix]
    return None


def whole_parameter(key: str) -> tuple[str, str]:
    """(module, parameter) of a parameter that PEFT saves whole: its own wrappers are left out."""
    module, _, parameter = _WRAPPERS.sub("", key).rpartition(".")
    return _AROUND.sub("", module), parameter


def by_module(keys: Iterable[str]) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Keys sorted into modules.

    Returns
    -------
    modules : dict of module name to (role, key) pairs
    rest : list of keys that no suffix fits
    """
    modules: dict[str, list[tuple[str, str]]] = {}
    rest: list[str] = []
    for key in keys:
        split = split_key(key)
        if split is None:
            rest.append(key)
        else:
            modules.setdefault(split[0], []).append((split[1], key))
    # LyCORIS calls the vector of (IA)³ plainly ".weight"; only its neighbour gives it away.
    left = []
    for key in rest:
        module = key.removesuffix(".weight")
        if key != module and any(role == "on_input" for role, _ in modules.get(module, ())):
            modules[module].append(("ia3_weight", key))
        else:
            left.append(key)
    return modules, left
