"""Where a site lies in its network: component, depth (the block) and kind of layer.

The heat map and the bar chart need one order for every architecture, and only names to find it in.
A number in a module name counts as depth when it follows the name of a list of blocks; any other
number (``to_out.0``, ``ff.net.2``, ``experts.7``) belongs to the layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
#: Some language models call their whole stack "transformer"; these names never start a
#: diffusion transformer's module.
_LANGUAGE_MODEL_PARTS = ("h", "wte", "wpe", "word_embeddings", "layer")
#: Names of lists of blocks.
_BLOCK_LIST = re.compile(r"(^h$|(blocks?|layers?|resnets|attentions|stages|motion_modules)$)")
#: Wrappers that say nothing about depth.
_WRAPPERS = ("model", "transformer", "base_model", "text_model", "language_model", "decoder")
_STAGES = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
_STAGE_ORDER = {"down": 1, "mid": 2, "up": 3}
#: Modules outside any block that come after all blocks; the others come before.
_LAST = re.compile(r"(out|head|final|proj_out|norm_out|score|classifier)")
_SAMPLERS = {"downsamplers": "↓", "upsamplers": "↑"}
#: Numbers that only count equal siblings: one row for all of them.
_SIBLINGS = re.compile(r"(?<=experts\.)\d+")
#: Sorts a stage's sampler behind its numbered blocks.
_BEHIND = 10**9

#: A sortable position: equal lengths are not needed, Python compares tuples left to right.
Order = tuple[tuple[int, str, int], ...]


@dataclass(frozen=True)
class Place:
    """A site's place.

    ``group`` and ``label`` name its column ("down 1" and "0.3"; "layers" and "12"); ``order`` sorts
    columns as data flows through the network. ``in_block`` is false for what lies outside any
    block, such as ``conv_in`` or an embedding.
    """

    component: str
    group: str
    label: str
    kind: str
    order: Order
    in_block: bool


def component_of(site: str) -> str:
    """The pipeline part a site name starts with, or "" for a bare model."""
    first, _, rest = site.partition(".")
    if first not in _COMPONENTS or not rest:
        return ""
    if first == "transformer" and rest.partition(".")[0] in _LANGUAGE_MODEL_PARTS:
        return ""
    return first


def split_site(site: str) -> Place:
    """Split a site name into component, depth and kind of layer.

    >>> place = split_site("unet.down_blocks.1.attentions.0.transformer_blocks.3.attn1.to_q")
    >>> place.component, place.group, place.label, place.kind
    ('unet', 'down 1', '0.3', 'attn1.to_q')
    >>> place = split_site("model.layers.12.self_attn.q_proj")
    >>> place.component, place.group, place.label, place.kind
    ('', 'layers', '12', 'self_attn.q_proj')
    """
    component = component_of(site)
    parts = site.removeprefix(f"{component}.").split(".") if component else site.split(".")
    if parts[0] in _STAGES:
        return _unet_place(component, parts)
    last = max(
        (i + 1 for i in range(len(parts) - 1) if _counts_blocks(parts, i)),
        default=None,
    )
    if last is None:
        return _outside(component, parts)
    depth, kind = parts[: last + 1], parts[last + 1 :]
    while len(depth) > 2 and depth[0] in _WRAPPERS:
        depth = depth[1:]
    names = [p for p in depth if not p.isdigit()]
    numbers = [p for p in depth if p.isdigit()]
    # "transformer_blocks" runs before "single_transformer_blocks", "encoder" before "decoder".
    rank = 2 if names[-1].startswith("single") or "decoder" in depth else 1
    order = ((rank, names[0], 0), *((0, "", int(n)) for n in numbers))
    return Place(component, ".".join(names), ".".join(numbers), _kind(kind), order, True)


def _counts_blocks(parts: list[str], index: int) -> bool:
    return bool(_BLOCK_LIST.search(parts[index])) and parts[index + 1].isdigit()


def _kind(parts: list[str]) -> str:
    return _SIBLINGS.sub("#", ".".join(parts)) or "weight"


def _outside(component: str, parts: list[str]) -> Place:
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    kind = _kind(parts)
    if _LAST.search(parts[0]):
        return Place(component, "out", "", kind, ((9, "", 0),), False)
    return Place(component, "in", "", kind, ((0, "", 0),), False)


def _unet_place(component: str, parts: list[str]) -> Place:
    """A U-Net's block: stage, then the number its resnet and attention share, then the depth
    inside the attention, so that what runs together stands in one column."""
    stage = _STAGES[parts[0]]
    rest = parts[1:]
    number = None
    if rest and rest[0].isdigit():
        number, rest = int(rest[0]), rest[1:]
    group = stage if number is None else f"{stage} {number}"
    head = (_STAGE_ORDER[stage], "", number or 0)
    if rest and rest[0] in _SAMPLERS:
        kind = _kind([p for p in rest if not p.isdigit()])
        return Place(component, group, _SAMPLERS[rest[0]], kind, (head, (0, "", _BEHIND)), True)
    numbers: list[int] = []
    index = 0
    while index + 1 < len(rest) and _counts_blocks(rest, index):
        numbers.append(int(rest[index + 1]))
        index += 2
    kind = _kind(rest[index:])
    # A resnet, and an attention's own projections, share the column of its first inner block.
    order = (head, *((0, "", n) for n in [*numbers, 0, 0][:2]))
    label = (
        ".".join(map(str, numbers)) if len(numbers) > 1 else f"{numbers[0]}.0" if numbers else ""
    )
    return Place(component, group, label, kind, order, True)
