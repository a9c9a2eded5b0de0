"""The two names of every U-Net module: diffusers' and the original (LDM) one.

SD 1.x, 2.x and SDXL single files, and kohya's SDXL adapters, number blocks in one flat list
(``input_blocks.4.1``); diffusers nests them (``down_blocks.1.attentions.0``). The numbering follows
from the structure alone, so the map is computed from the module names themselves, not from a table
per model. The tests hold it against diffusers' own ``convert_ldm_unet_checkpoint``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_RESNET_BACK = {ldm: name for name, ldm in _RESNET.items()}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_TOP_BACK = {ldm: name for name, ldm in _TOP.items()}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_MIDDLE_BACK = {ldm: name for name, ldm in _MIDDLE.items()}
_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_LDM_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)")


def _inner(rest: str, table: dict[str, str]) -> str:
    return table.get(rest, rest)


def _starts(seen: list[re.Match[str]], side: str) -> dict[int, tuple[int, int]]:
    """Block → (its first flat number, its layers). A down-sampler takes a number of its own."""
    layers: dict[int, int] = {}
    closing: set[int] = set()
    for match in seen:
        if match[1] == side:
            block = int(match[2])
            inside = match[3] in ("resnets", "attentions")
            layers[block] = max(layers.get(block, 0), int(match[4]) + 1 if inside else 0)
            if match[3] == "downsamplers":
                closing.add(block)
    starts, position = {}, 0
    for block in sorted(layers):
        starts[block] = (position, layers[block])
        position += layers[block] + (block in closing)
    return starts


def to_ldm(modules: Iterable[str]) -> dict[str, str]:
    """diffusers module name → LDM module name, for the modules of one U-Net.

    Names that have no LDM counterpart are left out.
    """
    modules = list(modules)
    seen = [m for m in map(_BLOCK.fullmatch, modules) if m]
    starts = {side: _starts(seen, side) for side in ("down", "up")}
    with_attention = {(m[1], m[2]) for m in seen if m[3] == "attentions"}
    names = {}
    for module in modules:
        if module in _TOP:
            names[module] = _TOP[module]
        elif module.startswith("mid_block."):
            part, _, rest = module.removeprefix("mid_block.").partition(".")
            index, _, rest = rest.partition(".")
            if f"{part}.{index}" in _MIDDLE:
                names[module] = f"middle_block.{_MIDDLE[f'{part}.{index}']}.{_inner(rest, _RESNET)}"
        elif match := _BLOCK.fullmatch(module):
            side, block, part, index, rest = match.groups()
            start, count = starts[side][int(block)]
            j = int(index)
            if side == "down":
                flat = 1 + start + (count if part == "downsamplers" else j)
                slot = "1" if part == "attentions" else "0"
                tail = "op" if part == "downsamplers" else _inner(rest, _RESNET)
                names[module] = f"input_blocks.{flat}.{slot}.{tail}"
            else:
                flat = start + (count - 1 if part == "upsamplers" else j)
                upper = "2" if (side, block) in with_attention else "1"
                slot = {"resnets": "0", "attentions": "1", "upsamplers": upper}[part]
                names[module] = f"output_blocks.{flat}.{slot}.{_inner(rest, _RESNET)}"
    return names


def to_diffusers(modules: Iterable[str]) -> dict[str, str]:
    """LDM module name → diffusers module name; empty if the names are diffusers' already."""
    modules = list(modules)
    found = [m for m in map(_LDM_BLOCK.fullmatch, modules) if m]
    if not found:
        return {}
    # A block that is only a down-sampling convolution closes its level.
    closing = {int(m[2]) for m in found if m[1] == "input" and m[4] == "op"}
    place: dict[int, tuple[int, int]] = {}
    level, j = 0, 0
    for flat in sorted({int(m[2]) for m in found if m[1] == "input"} - {0}):
        if flat in closing:
            place[flat] = (level, -1)
            level, j = level + 1, 0
        else:
            place[flat] = (level, j)
            j += 1
    opening = sorted(
        {int(m[2]) for m in found if m[1] == "output" and m[4] == "conv" and m[3] in "12"}
    )
    names = {}
    for module in modules:
        if module in _TOP_BACK:
            names[module] = _TOP_BACK[module]
        elif module.startswith("middle_block."):
            index, _, rest = module.removeprefix("middle_block.").partition(".")
            if index in _MIDDLE_BACK:
                names[module] = f"mid_block.{_MIDDLE_BACK[index]}.{_inner(rest, _RESNET_BACK)}"
        elif match := _LDM_BLOCK.fullmatch(module):
            side, number, slot, rest = match.groups()
            flat = int(number)
            if side == "input":
                if flat not in place:
                    continue
                level, j = place[flat]
                if rest == "op":
                    names[module] = f"down_blocks.{level}.downsamplers.0.conv"
                    continue
            else:
                level = sum(flat > o for o in opening)
                j = flat - (opening[level - 1] + 1 if level else 0)
                if rest == "conv" and slot in "12":
                    names[module] = f"up_blocks.{level}.upsamplers.0.conv"
                    continue
            part = "attentions" if slot == "1" else "resnets"
            side_name = "down" if side == "input" else "up"
            names[module] = f"{side_name}_blocks.{level}.{part}.{j}.{_inner(rest, _RESNET_BACK)}"
    return names
