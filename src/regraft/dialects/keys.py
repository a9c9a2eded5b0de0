"""From the keys of a file to modules and roles: which suffix is which tensor of which family."""

from __future__ import annotations

import re
from collections.abc import Iterable

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
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_B.bias": "up_bias",
    ".alpha": "alpha",
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
    ".boft_R": "boft_r",
    ".boft_s": "boft_s",
    **{f".{r}.weight": r for r in ("a1", "a2", "b1", "b2", "bm")},
    ".on_input": "on_input",
    ".ia3_l": "ia3_l",
    ".q_layer.weight": "t_q",
    ".p_layer.weight": "t_p",
    ".lambda_layer": "t_lambda",
    # whole changes
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
    ".set_weight": "set_weight",
    # singular values, and the frequency domain
    ".delta": "delta",
    ".foura_A": "foura_a",
    ".foura_B": "foura_b",
    ".foura_mask": "foura_mask",
}
#: PEFT keeps the adapter's name inside the key when a state dict is saved by hand.
_NAMED = re.compile(r"\.default(?=(\.weight|\.bias)?$)")
#: diffusers before 0.20 hung the LoRA on the attention's processor.
_OLD_DIFFUSERS = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")


def split_key(key: str) -> tuple[str, str] | None:
    """(module name, role) of a key, or None if no suffix is known."""
    if old := _OLD_DIFFUSERS.fullmatch(key):
        layer = "to_out.0" if old[2] == "to_out" else old[2]
        return f"{old[1]}.{layer}", old[3]
    plain = _NAMED.sub("", key)
    # The longest suffix first: ".lora_B.weight" also ends in nothing else, but ".a1.weight" might.
    for length in (3, 2, 1):
        parts = plain.rsplit(".", length)
        if len(parts) == length + 1:
            suffix = "." + ".".join(parts[1:])
            if suffix in SUFFIXES:
                return parts[0], SUFFIXES[suffix]
    return None


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
