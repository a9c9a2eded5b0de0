"""What an adapter file was made for, from its module names and the shapes of its factors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from regraft.bases.language import language_models
from regraft.bases.published import FAMILIES, Published, published

#: (rows, columns) of the weight that a pair of factors changes; None where it is not known.
Sizes = tuple[int | None, int | None]

_FRONT = re.compile(
    r"(base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\."
    r"|lora_unet_|lora_transformer_|lora_prior_unet_|lycoris_)"
)
_ENCODER = re.compile(r"(?:base_model\.model\.)?(lora_te\d?_|text_encoders?[._](?:\d\.)?)")
_UNET = re.compile(
    r"(?:down|up)_blocks_\d+_(?:attentions|resnets|downsamplers|upsamplers)_|mid_block_"
    r"|(?:input|output)_blocks_\d+_|middle_block_|time_embed_|label_emb_"
)
_CROSS = re.compile(r"attn2_to_[kv]$")
#: In SSD-1B these have four transformer blocks, in SDXL ten.
_LOWEST = re.compile(
    r"(?:down_blocks_2_attentions_\d+|up_blocks_0_attentions_[01]|mid_block_attentions_0"
    r"|input_blocks_[78]_1|output_blocks_[01]_1|middle_block_1)_transformer_blocks_(\d+)_"
)
_CONTEXTS = {
    768: ("Stable Diffusion 1.x", "sd1"),
    1024: ("Stable Diffusion 2.x", "sd2"),
    2048: ("Stable Diffusion XL or SSD-1B", "sdxl"),
    1280: ("Stable Diffusion XL refiner", "sdxl"),
}
#: Of the names and of the shapes, this share must fit.
_FITS = 0.9


@dataclass(frozen=True)
class Candidate:
    """What an adapter may be made for.

    ``family`` groups what metadata spell in many ways ("sd1", "sdxl", "flux", "wan", …);
    ``evidence`` says what in the file speaks for it.
    """

    label: str
    family: str
    evidence: str


def made_for(modules: Mapping[str, Sizes]) -> list[Candidate]:
    """The models an adapter may be made for, the likeliest first.

    Parameters
    ----------
    modules : mapping of str to (int or None, int or None)
        Module names as the file writes them (kohya's or dotted, with any prefix) → the rows and
        columns of the weight that is changed: rows of the up factor, columns of the down factor.

    Returns
    -------
    list of Candidate
        Empty where nothing is recognised.
    """
    encoders = {n: s for n, s in modules.items() if _ENCODER.match(n)}
    inner = {_flat(n): s for n, s in modules.items() if n not in encoders}
    if not inner:
        return _by_encoders(encoders)
    if sum(bool(_UNET.match(n)) for n in inner) >= _FITS * len(inner):
        return _unet(inner, encoders)
    return _transformers(inner) or language_candidates(inner)


def language_candidates(names: Mapping[str, Sizes]) -> list[Candidate]:
    """Language models with these (flattened) module names."""
    return [Candidate(label, family, why) for label, family, why in language_models(names)]


def _flat(name: str) -> str:
    while match := _FRONT.match(name):
        name = name[match.end() :]
    return name.replace(".", "_")


def _unet(names: Mapping[str, Sizes], encoders: Mapping[str, Sizes]) -> list[Candidate]:
    widths = {s[1] for n, s in names.items() if _CROSS.search(n)} - {None}
    deep = [int(m[1]) for m in map(_LOWEST.search, names) if m]
    for width in sorted(w for w in widths if w is not None):
        label, family = _CONTEXTS.get(width, (f"A U-Net with text of width {width}", "unet"))
        why = f"cross-attention input {width}"
        if width == 2048 and deep and max(deep) > 3:
            label = "Stable Diffusion XL"
            why += f", {max(deep) + 1} transformer blocks where SSD-1B has 4"
        return [Candidate(label, family, why)]
    if any("transformer_blocks_1_" in n for n in names):
        label = "Stable Diffusion XL" if max(deep, default=0) > 3 else _CONTEXTS[2048][0]
        return [Candidate(label, "sdxl", "several transformer blocks in one attention")]
    return _by_encoders(encoders) or [
        Candidate(_CONTEXTS[w][0], _CONTEXTS[w][1], "a U-Net; nothing tells its text's width")
        for w in (768, 1024, 2048)
    ]


def _by_encoders(names: Mapping[str, Sizes]) -> list[Candidate]:
    """From adapters of text encoders only: CLIP's widths."""
    widths = {
        size
        for name, sizes in names.items()
        if re.search(r"self_attn[._](q|k|v|out)_proj$", name)
        for size in sizes
        if size is not None
    }
    several = any(n.startswith(("lora_te1_", "lora_te2_", "text_encoder_2.")) for n in names)
    if 1280 in widths and several:
        return [Candidate(_CONTEXTS[2048][0], "sdxl", "a second text encoder of width 1280")]
    if 1024 in widths:
        return [Candidate(_CONTEXTS[1024][0], "sd2", "a text encoder of width 1024")]
    if 768 in widths and not several:
        return [Candidate(_CONTEXTS[768][0], "sd1", "a text encoder of width 768")]
    return []


def _transformers(names: Mapping[str, Sizes]) -> list[Candidate]:
    fits = [f for f in (_fit(model, names) for model in published()) if f is not None]
    fitting = [f for f in fits if f.fits]
    # The fewer of the file's layers a model lacks, the likelier it is.
    least = min((f.unknown for f in fitting), default=0)
    fitting = [f for f in fitting if f.unknown == least]
    # What has exactly as many blocks as the file numbers is likelier than what has more.
    fitting = [f for f in fitting if f.whole] or fitting
    found: dict[str, Candidate] = {}
    for fit in fitting:
        alike = [f for f in fitting if f.model.together == fit.model.together]
        label = fit.model.label if len(alike) == 1 else fit.model.together
        family = family_of(fit.model)
        found.setdefault(fit.model.together, Candidate(label, family, fit.evidence))
    if found:
        return list(found.values())
    why = "its module names; the widths are others"
    return [
        Candidate(f"{FAMILIES[table]} of another size", table, why)
        for table in dict.fromkeys(f.model.names for f in fits)
    ]


def family_of(model: Published) -> str:
    """The family of a published transformer."""
    return "framepack" if model.label == "FramePack" else model.names


@dataclass(frozen=True)
class _Fit:
    """``unknown`` layers the model lacks; ``whole``: as many blocks as the file numbers."""

    model: Published
    fits: bool
    whole: bool
    unknown: int
    evidence: str


def _fit(model: Published, names: Mapping[str, Sizes]) -> _Fit | None:
    """How a file's layers fit a model, or None if the names are others."""
    seen = {n: h for n, h in ((n, model.flat.find(n)) for n in names) if h is not None}
    if len(seen) < _FITS * len(names):
        return None
    against = sum(not _agrees(names[n], place.shapes) for n, place in seen.items())
    last: dict[str, tuple[int, int]] = {}  # stack → the highest number in the file, its blocks
    for place in seen.values():
        if place.stack:
            number = max(last.get(place.stack, (-1, 0))[0], place.number)
            last[place.stack] = number, place.depth
    beyond = any(number >= depth for number, depth in last.values())
    fits = against <= (1 - _FITS) * len(seen) and not beyond
    whole = fits and all(number == depth - 1 for number, depth in last.values())
    sizes = [s for n in seen for s in names[n] if s is not None]
    evidence = "its module names"
    if sizes:
        evidence += f", width {max(set(sizes), key=sizes.count)}"
    if whole and last:
        evidence += f", {'+'.join(str(number + 1) for number, _ in last.values())} blocks"
    return _Fit(model, fits, whole, len(names) - len(seen), evidence)


def _agrees(sizes: Sizes, shapes: frozenset[tuple[int, int]]) -> bool:
    return any(
        all(own is None or own == size for own, size in zip(sizes, shape, strict=True))
        for shape in shapes
    )
