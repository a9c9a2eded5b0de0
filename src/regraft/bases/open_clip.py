"""OpenCLIP text encoders, as single-file checkpoints of SD 2.x and SDXL keep them.

They fuse query, key and value into one ``in_proj_weight``; adapters name the three apart, as
transformers' CLIPTextModel does. Each then is a range of rows of the fused tensor.
"""

from __future__ import annotations

import re
from dataclasses import replace

from regraft.adapters import Site
from regraft.bases.base import Rows

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_INNER = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
_TOP = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_FUSED = ("q_proj", "k_proj", "v_proj")


def is_open_clip(stored: Site) -> bool:
    """Whether a stored parameter is one of an OpenCLIP text encoder's."""
    return _BLOCK.fullmatch(stored.module) is not None


def to_transformers(stored: Site, shape: tuple[int, ...]) -> list[tuple[Site, Rows]]:
    """The sites one OpenCLIP parameter holds, in transformers' names.

    Parameters
    ----------
    stored : Site
        Under its OpenCLIP name.
    shape : tuple of int

    Returns
    -------
    list of (site, rows)
        ``rows`` is the range of rows that is this site's, or empty for all of them.
    """
    if stored.module in _TOP:
        return [(replace(stored, module=_TOP[stored.module]), ())]
    if str(stored) == "positional_embedding":
        return [(Site("", "text_model.embeddings.position_embedding"), ())]
    match = _BLOCK.fullmatch(stored.module)
    if match is None:
        return []
    layer = f"text_model.encoder.layers.{match[1]}"
    if match[2] == "attn" and stored.parameter.startswith("in_proj_"):
        if shape[0] % 3:
            return []
        third, kind = shape[0] // 3, stored.parameter.removeprefix("in_proj_")
        return [
            (Site("", f"{layer}.self_attn.{part}", kind), ((i * third, (i + 1) * third),))
            for i, part in enumerate(_FUSED)
        ]
    if match[2] not in _INNER:
        return []
    return [(replace(stored, module=f"{layer}.{_INNER[match[2]]}"), ())]
