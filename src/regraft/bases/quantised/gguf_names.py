"""llama.cpp's names of a language model's parts → transformers'.

One table for the models laid out as Llama is, and what the others change of it.
The tests compare it with the map that transformers makes of gguf's ``TensorNameMap``.
"""

from __future__ import annotations

import re
from typing import Any

from regraft.errors import NotABase
from regraft.files.gguffile import GGUFFile

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = _LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_T5_TOP = {"token_embd": "shared", "output": "lm_head"}
_T5_TOP |= {f"{p[:3]}.output_norm": f"{p}.final_layer_norm" for p in ("encoder", "decoder")}
_T5 = (
    {f"attn_{w}": f"layer.0.SelfAttention.{w}" for w in ("q", "k", "v", "o")}
    | {f"cross_attn_{w}": f"layer.1.EncDecAttention.{w}" for w in ("q", "k", "v", "o")}
    | {
        "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
        "attn_norm": "layer.0.layer_norm",
        "cross_attn_norm": "layer.1.layer_norm",
    }
)
_LIKE_LLAMA = ("llama", "qwen2", "qwen3", "stablelm", "gemma")
#: Architecture → (names outside the blocks, where the blocks are, names inside them).
_LAYOUTS: dict[str, tuple[dict[str, str], str, dict[str, str]]] = {
    **dict.fromkeys(_LIKE_LLAMA, (_TOP, "model.layers", _LLAMA)),
    **dict.fromkeys(("gemma2", "gemma3"), (_TOP, "model.layers", _GEMMA)),
    "phi3": (
        _TOP,
        "model.layers",
        _LLAMA | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "starcoder2": (
        _TOP,
        "model.layers",
        _LLAMA | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    "gpt2": (_GPT2_TOP, "transformer.h", _GPT2),
    "t5": (_T5_TOP, "", _T5),
    "t5encoder": (_T5_TOP, "", _T5),
}
_BLOCK = re.compile(r"(?:(enc|dec)\.)?blk\.(\d+)\.(\w+)\.(weight|bias)")
_STACKS = {"enc": "encoder", "dec": "decoder"}


def architecture(file: GGUFFile) -> str:
    """llama.cpp's word for the model; "" for a file that keeps its model's own names.

    Raises
    ------
    NotABase
        llama.cpp's names, of an architecture without a table.
    """
    if not any(_BLOCK.fullmatch(t) for t in file):
        return ""
    found = str(file.settings.get("general.architecture", ""))
    if found not in _LAYOUTS:
        raise NotABase(
            f"The names of this GGUF file's architecture, {found[:40]!r}, are not mapped.",
            file=file.path,
            fix="Give the safetensors checkpoint it was made from.",
        )
    return found


def to_transformers(architecture: str, name: str, names: Any) -> str | None:
    """transformers' name of a tensor; None for one that is no parameter there.

    Parameters
    ----------
    architecture : str
    name : str
        Such as ``blk.0.attn_q.weight``. One that the table lacks keeps it.
    names : collection of str
        All tensors of the file: T5's two kinds of feed-forward differ by them.
    """
    if name.startswith(("rope_freqs", "rope_factors")):
        return None  # computed from the config
    top, blocks, inner = _LAYOUTS[architecture]
    match = _BLOCK.fullmatch(name)
    if match is None:
        part, _, parameter = name.rpartition(".")
        return f"{top[part]}.{parameter}" if part in top else name
    stack, number, part, parameter = match.groups()
    if part.startswith("rope_factors"):
        return None
    if stack is None:
        return f"{blocks}.{number}.{inner[part]}.{parameter}" if part in inner else name
    place = f"{_STACKS[stack]}.block.{number}."
    if part.startswith("ffn_"):
        layer = f"layer.{1 if stack == 'enc' else 2}."
        gated = f"{stack}.blk.{number}.ffn_gate.weight" in names
        dense = {"ffn_gate": "wi_0", "ffn_up": "wi_1" if gated else "wi", "ffn_down": "wo"}
        words = {"ffn_norm": "layer_norm"} | {k: f"DenseReluDense.{v}" for k, v in dense.items()}
        return f"{place}{layer}{words[part]}.{parameter}" if part in words else name
    return f"{place}{inner[part]}.{parameter}" if part in inner else name
