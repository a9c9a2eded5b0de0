"""Shapes of weights as an adapter's own tensors tell them, for conversions without the base.

A pair of factors gives them. LyCORIS flattens the kernels of convolutions, so a LoHa or LoKr on one
does not say what kernel it has: where a module's name leaves that open, the shape is None.
"""

from __future__ import annotations

import re
from math import prod

from regraft.dialects.shapes import weight_shape
from regraft.dialects.source import AdapterSource

Shape = tuple[int, ...]

#: Names of modules that are, or may be, convolutions with a kernel.
_CONVOLUTION = re.compile(
    r"conv|(^|_)op$|in_layers|out_layers|skip_connection|patch_embed|x_embedder|pos_embed|"
    r"input_blocks_0_0$|(^|_)out_2$"
)
#: Layers around a U-Net's attention: 1×1 convolutions in Stable Diffusion 1.x, else linear.
_AROUND_ATTENTION = re.compile(r"(attentions|put_blocks|middle_block)_.*proj_(in|out)$")
_TEXT_INPUT = re.compile(r"attn2_to_[kv]$")
#: Width of the text condition → whether those layers are convolutions.
_BY_WIDTH = {768: True, 1024: False, 1280: False, 2048: False}
#: Families whose factors are narrower than the weight.
_POOLED = ("qa-lora",)


def weight_shapes(source: AdapterSource) -> dict[str, Shape | None]:
    """Module name → the shape of its weight, or None if only the base can tell.

    Modules that change only a bias have that bias's shape.
    """
    stored = {name: _stored(source, name) for name in source.modules}
    widths = {
        prod(shape[1:]) for name, (shape, _) in stored.items() if shape and _is_text_input(name)
    }
    around = _BY_WIDTH.get(widths.pop()) if len(widths) == 1 else None
    return {name: _shape(name, shape, flat, around) for name, (shape, flat) in stored.items()}


def may_be_convolution(name: str) -> bool:
    """Whether a module of this name may have a kernel."""
    flat = name.replace(".", "_")
    return bool(_CONVOLUTION.search(flat) or _AROUND_ATTENTION.search(flat))


def _is_text_input(name: str) -> bool:
    return bool(_TEXT_INPUT.search(name.replace(".", "_")))


def _stored(source: AdapterSource, name: str) -> tuple[Shape | None, bool]:
    """The shape that the tensors say, and whether a kernel may be flattened in it."""
    shapes = {role: source.file[t].shape for role, t in source.modules[name].items()}
    if source.families[name] in _POOLED:
        return None, False
    if shapes.keys() <= {"diff_b", "b_norm", "alpha"}:
        return shapes.get("diff_b") or shapes.get("b_norm"), False
    shape = weight_shape(shapes)
    if shape is not None and len(shape) == 2 and "up" in shapes and _turned(source):
        shape = shape[::-1]
    flat = ("hada_w1_a" in shapes and "hada_t1" not in shapes) or (
        "lokr_w2_a" in shapes and "lokr_t2" not in shapes
    )
    return shape, flat


def _turned(source: AdapterSource) -> bool:
    """Whether the config says that the base stores (in, out)."""
    return bool(source.config.get("fan_in_fan_out"))


def _shape(name: str, shape: Shape | None, flat: bool, around: bool | None) -> Shape | None:
    if shape is None or not flat:
        return shape
    if _AROUND_ATTENTION.search(name.replace(".", "_")):
        return None if around is None else (*shape, 1, 1) if around else shape
    return None if may_be_convolution(name) else shape
