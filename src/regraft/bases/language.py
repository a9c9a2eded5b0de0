"""Language models, known by the module names and widths in an adapter file."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LLAMA = re.compile(
    r"layers_\d+_(?:self_attn_(?P<attn>q|k|v|o)_proj|mlp_(?P<mlp>gate|up|down)_proj)$"
)
#: Other families: the end of a (flattened) module name → what it is called.
_OTHERS = (
    (re.compile(r"h_\d+_(attn_c_attn|attn_c_proj|mlp_c_fc|mlp_c_proj)$"), "GPT-2", "gpt2"),
    (re.compile(r"layers_\d+_(self_attn_qkv_proj|mlp_gate_up_proj)$"), "Phi-3", "phi"),
    (re.compile(r"layers_\d+_attention_(query_key_value|dense)$"), "GPT-NeoX", "gpt-neox"),
    (re.compile(r"h_\d+_self_attention_(query_key_value|dense)$"), "BLOOM or Falcon", "bloom"),
    (re.compile(r"block_\d+_layer_\d_(SelfAttention|EncDecAttention)_[qkvo]$"), "T5", "t5"),
    (re.compile(r"layer_\d+_attention_self_(query|key|value)$"), "BERT", "bert"),
    (re.compile(r"layers_\d+_self_attn_(q|k|v|out)_proj$"), "OPT", "opt"),
)
#: hidden width, rows of q, rows of k and v, width of the feed-forward → whose they are.
_SIZES: dict[tuple[int, int, int, int], tuple[str, str]] = {
    (4096, 4096, 4096, 11008): ("Llama 1 or 2 7B", "llama"),
    (5120, 5120, 5120, 13824): ("Llama 1 or 2 13B", "llama"),
    (8192, 8192, 1024, 28672): ("Llama 2 or 3 70B", "llama"),
    (4096, 4096, 1024, 14336): ("Llama 3 8B or Mistral 7B", "llama"),
    (2048, 2048, 512, 8192): ("Llama 3.2 1B", "llama"),
    (3072, 3072, 1024, 8192): ("Llama 3.2 3B", "llama"),
    (2048, 2048, 256, 5632): ("TinyLlama 1.1B", "llama"),
    (576, 576, 192, 1536): ("SmolLM 135M", "llama"),
    (960, 960, 320, 2560): ("SmolLM 360M", "llama"),
    (2048, 2048, 2048, 8192): ("SmolLM 1.7B", "llama"),
    (896, 896, 128, 4864): ("Qwen 2 or 2.5 0.5B", "qwen"),
    (1536, 1536, 256, 8960): ("Qwen 2 or 2.5 1.5B", "qwen"),
    (2048, 2048, 256, 11008): ("Qwen 2.5 3B", "qwen"),
    (3584, 3584, 512, 18944): ("Qwen 2 or 2.5 7B", "qwen"),
    (5120, 5120, 1024, 13824): ("Qwen 2.5 14B", "qwen"),
    (5120, 5120, 1024, 27648): ("Qwen 2.5 32B", "qwen"),
    (1024, 2048, 1024, 3072): ("Qwen 3 0.6B", "qwen"),
    (2048, 2048, 1024, 6144): ("Qwen 3 1.7B", "qwen"),
    (2560, 4096, 1024, 9728): ("Qwen 3 4B", "qwen"),
    (4096, 4096, 1024, 12288): ("Qwen 3 8B", "qwen"),
    (5120, 5120, 1024, 17408): ("Qwen 3 14B", "qwen"),
    (2048, 2048, 256, 16384): ("Gemma 1 2B", "gemma"),
    (3072, 4096, 4096, 24576): ("Gemma 1 7B", "gemma"),
    (2304, 2048, 1024, 9216): ("Gemma 2 2B", "gemma"),
    (3584, 4096, 2048, 14336): ("Gemma 2 9B", "gemma"),
    (1152, 1024, 256, 6912): ("Gemma 3 1B", "gemma"),
    (2560, 2048, 1024, 10240): ("Gemma 3 4B", "gemma"),
    (3840, 4096, 2048, 15360): ("Gemma 3 12B", "gemma"),
}
_GPT2 = {768: "GPT-2", 1024: "GPT-2 medium", 1280: "GPT-2 large", 1600: "GPT-2 XL"}
#: Role of a layer → which of the four sizes are its rows and its columns.
_ROLES = {
    "q": (1, 0),
    "k": (2, 0),
    "v": (2, 0),
    "o": (0, 1),
    "gate": (3, 0),
    "up": (3, 0),
    "down": (0, 3),
}


def language_models(
    names: Mapping[str, tuple[int | None, int | None]],
) -> list[tuple[str, str, str]]:
    """(label, family, evidence) of the language models that an adapter may be made for.

    Parameters
    ----------
    names : mapping of str to (int or None, int or None)
        Flattened module names → rows and columns of the weight that is changed.
    """
    roles = {n: m["attn"] or m["mlp"] for n in names if (m := _LLAMA.search(n))}
    if roles and len(roles) >= len(names) / 2:
        return _llama_like(names, roles)
    for pattern, label, family in _OTHERS:
        if sum(bool(pattern.search(n)) for n in names) >= len(names) / 2:
            width = _width(names, pattern)
            if family == "gpt2":
                label = _GPT2.get(width or 0, label)
            return [(label, family, _why(width))]
    return []


def _llama_like(
    names: Mapping[str, tuple[int | None, int | None]], roles: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    seen: list[set[int]] = [set(), set(), set(), set()]
    for name, role in roles.items():
        for place, size in zip(_ROLES[role], names[name], strict=True):
            if size is not None:
                seen[place].add(size)
    width = min(seen[0]) if len(seen[0]) == 1 else None
    fitting = [
        (label, family, _why(width))
        for sizes, (label, family) in _SIZES.items()
        if all(not own or own == {size} for own, size in zip(seen, sizes, strict=True))
    ]
    if fitting and any(seen):
        return fitting
    wide = f" of width {width}" if width else ""
    return [(f"A Llama-, Qwen- or Gemma-like language model{wide}", "llama", _why(width))]


def _width(
    names: Mapping[str, tuple[int | None, int | None]], pattern: re.Pattern[str]
) -> int | None:
    """The size nearly every layer has on one side: the smallest that is seen."""
    sizes = [s for n, both in names.items() if pattern.search(n) for s in both if s is not None]
    return min(sizes, default=None)


def _why(width: int | None) -> str:
    return "its module names" + (f", width {width}" if width else "")
