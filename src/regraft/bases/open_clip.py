"""OpenCLIP text encoders, as single-file checkpoints of SD 2.x and SDXL keep them.

They fuse query, key and value into one ``in_proj_weight``; adapters name the three apart, as
transformers' CLIPTextModel does. Each then is a range of rows of the fused tensor.
"""

from __future__ import annotations

import re

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_INNER = {
    "attn.out_proj.weight": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
}
_TOP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding",
}
_FUSED = ("q_proj", "k_proj", "v_proj")


def is_open_clip(tensor: str) -> bool:
    """Whether a tensor name is one of an OpenCLIP text encoder's."""
    return _BLOCK.fullmatch(tensor) is not None


def to_transformers(
    tensor: str, shape: tuple[int, ...]
) -> list[tuple[str, tuple[int, int] | None]]:
    """The modules one OpenCLIP tensor holds, in transformers' names.

    Parameters
    ----------
    tensor : str
    shape : tuple of int

    Returns
    -------
    list of (module, rows)
        ``rows`` is the range of rows that is this module's, or None for all of them.
    """
    if tensor in _TOP:
        return [(_TOP[tensor], None)]
    match = _BLOCK.fullmatch(tensor)
    if match is None or len(shape) != 2:
        return []
    layer = f"text_model.encoder.layers.{match[1]}"
    if match[2] == "attn.in_proj_weight":
        if shape[0] % 3:
            return []
        third = shape[0] // 3
        return [
            (f"{layer}.self_attn.{part}", (i * third, (i + 1) * third))
            for i, part in enumerate(_FUSED)
        ]
    return [(f"{layer}.{_INNER[match[2]]}", None)] if match[2] in _INNER else []
