"""The kind of layer and the component that a module name of a file speaks of, in any dialect."""

from __future__ import annotations

import re

from regraft.dialects.keys import PEFT_PREFIX
from regraft.dialects.names import split_dotted, split_kohya

_ATTENTION = (
    r"(attn1|attn2|self_attn|self_attention|cross_attn|attention|attn)[._]"
    r"(to_q|to_k|to_v|to_qkv|to_out|add_[qkv]_proj|to_add_out|q_proj|k_proj|v_proj|qkv_proj|o_proj"
    r"|out_proj|c_attn|c_proj|query_key_value|qkv|proj|[qkvo])"
    r"(?:[._]0)?"
)
#: The end of a module's name → what kind of layer it is. Dots and underscores count alike.
_KINDS = [
    (re.compile(rf"(?:^|[._]){pattern}$"), label)
    for pattern, label in (
        (r"((?:img|txt)_attn)[._](qkv|proj)", r"\1.\2"),
        (r"((?:img|txt)_m(?:lp|od))[._](\w+)", r"\1.\2"),
        (_ATTENTION, r"\1.\2"),
        (r"(ff(?:_context)?)[._]net[._]0[._]proj", r"\1.in"),
        (r"(ff(?:_context)?)[._]net[._]2", r"\1.out"),
        (r"mlp[._](\w+)", r"mlp.\1"),
        (r"(in|out|emb)_layers[._](\d)", r"resnet.\1_layers.\2"),
        (r"(conv1|conv2|conv_shortcut|time_emb_proj|skip_connection)", r"resnet.\1"),
        (r"(?:downsamplers[._]\d+[._]conv|op)", "downsampler"),
        (r"(?:upsamplers[._]\d+[._]conv)", "upsampler"),
        (r"(proj_in|proj_out|proj_mlp|conv_in|conv_out|lm_head|linear1|linear2)", r"\1"),
    )
]


def kind_of_name(name: str) -> str:
    """The kind of layer a module name speaks of, the same for kohya and dotted names.

    >>> kind_of_name("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q")
    'attn1.to_q'
    >>> kind_of_name("base_model.model.model.layers.3.mlp.gate_proj")
    'mlp.gate_proj'
    """
    for pattern, label in _KINDS:
        if match := pattern.search(name):
            return match.expand(label)
    if "." in name:
        return ".".join([p for p in name.split(".") if not p.isdigit()][-2:])
    return "_".join([p for p in name.split("_") if not p.isdigit()][-2:])


def component_of_name(name: str) -> str:
    """The likeliest component of a module name: its prefix's first, "model" if it has none.

    >>> component_of_name("lora_te2_text_model_encoder_layers_0_mlp_fc1")
    'text_encoder_2'
    >>> component_of_name("base_model.model.model.layers.3.mlp.gate_proj")
    'model'
    """
    plain = name.removeprefix(PEFT_PREFIX)
    split = split_kohya(plain) or split_dotted(plain)
    # "transformer.h.0…" is GPT-2's own name, and of no pipeline.
    if split is None or plain.startswith("transformer.h."):
        return "model"
    return split[1][0] or "model"
