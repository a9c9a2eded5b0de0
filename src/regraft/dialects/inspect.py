"""What an adapter file says of itself, without any base."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from pathlib import Path

from regraft.dialects.source import AdapterSource, open_source


def inspect_file(ref: str | Path) -> dict[str, object]:
    """What an adapter file says of itself, without any base.

    Returns
    -------
    dict
        family, dialect, modules, ranks (rank → modules), dtype, alpha, base named, trigger words,
        hashes (sha256, AutoV2, AutoV3), refused keys, zero modules.

    Raises
    ------
    NonFiniteTensor
        And everything :func:`regraft.dialects.source.open_source` raises.
    """
    source = open_source(ref)
    ranks: Counter[int | None] = Counter()
    kinds: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    alphas: Counter[str] = Counter()
    zero: list[str] = []
    parameters = 0
    for name, roles in source.modules.items():
        pair = {r: source.file[t] for r, t in roles.items() if r != "alpha"}
        ranks[source.rank(name)] += 1
        kinds[kind_of_name(name)] += 1
        for info in pair.values():
            dtypes[str(info.dtype).removeprefix("torch.")] += 1
            parameters += math.prod(info.shape)
        factors = {r: source.file.read(t, finite=True) for r, t in roles.items()}
        if not all(factors[r].any() for r in pair):
            zero.append(name)
        if "alpha" in factors and factors["alpha"].numel() == 1:
            alphas[f"{float(factors['alpha']):g}"] += 1
    sha = source.sha256()
    meta = source.file.metadata
    if not alphas and "lora_alpha" in source.config:
        alphas[f"{source.config['lora_alpha']}"] = len(source.modules)
    return {
        "kind": "adapter",
        "file": str(source.path),
        "family": source.family,
        "dialect": source.dialect,
        "sites": len(source.modules),
        "sites_by_kind": dict(sorted(kinds.items())),
        "ranks": {str(k): v for k, v in sorted(ranks.items())},
        "alpha": dict(alphas) or {"none (scale 1)": len(source.modules)},
        "dtypes": dict(dtypes),
        "parameters": parameters,
        "zero_sites": zero,
        "made_for": _made_for(source),
        "trigger_words": meta.get("modelspec.trigger_phrase", ""),
        "title": meta.get("modelspec.title", meta.get("ss_output_name", "")),
        "refused": source.refused,
        "carried_by_regraft": "regraft" in meta,
        "sha256": sha,
        "autov2": sha[:10],
        "autov3": _data_sha256(source)[:12],
    }


def _data_sha256(source: AdapterSource) -> str:
    digest = hashlib.sha256()
    with open(source.path, "rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


_ATTENTION = (
    r"(attn1|attn2|self_attn|self_attention|attention|attn)[._]"
    r"(to_q|to_k|to_v|to_out|q_proj|k_proj|v_proj|o_proj|out_proj|c_attn|c_proj|query_key_value)"
    r"(?:[._]0)?"
)
#: The end of a module's name → what kind of layer it is. Dots and underscores count alike.
_KINDS = [
    (re.compile(rf"(?:^|[._]){pattern}$"), label)
    for pattern, label in (
        (_ATTENTION, r"\1.\2"),
        (r"(ff(?:_context)?)[._]net[._]0[._]proj", r"\1.in"),
        (r"(ff(?:_context)?)[._]net[._]2", r"\1.out"),
        (r"mlp[._](\w+)", r"mlp.\1"),
        (r"(in|out|emb)_layers[._](\d)", r"resnet.\1_layers.\2"),
        (r"(conv1|conv2|conv_shortcut|time_emb_proj|skip_connection)", r"resnet.\1"),
        (r"(?:downsamplers[._]\d+[._]conv|op)", "downsampler"),
        (r"(?:upsamplers[._]\d+[._]conv)", "upsampler"),
        (r"(proj_in|proj_out|conv_in|conv_out|lm_head)", r"\1"),
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


def _made_for(source: AdapterSource) -> list[str]:
    meta, found = source.file.metadata, []
    if source.config.get("base_model_name_or_path"):
        found.append(str(source.config["base_model_name_or_path"]))
    for key in ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"):
        if meta.get(key):
            found.append(f"{meta[key]} ({key})")
    return found
