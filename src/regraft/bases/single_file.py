"""Single-file checkpoints that hold a whole pipeline: which prefix is which component."""

from __future__ import annotations

import re
from collections.abc import Iterable

from regraft.bases.native_tables import recognise

#: The parts of SD 1.x, 2.x and SDXL beside the U-Net.
_STABLE_DIFFUSION = (
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),  # SDXL's refiner has the second only
    ("cond_stage_model.transformer.", "text_encoder"),
    ("cond_stage_model.model.", "text_encoder"),
)
#: In front of a denoiser's names. Cosmos' own files have "net."
_DENOISER = ("model.diffusion_model.", "diffusion_model.", "net.")
_ENCODER = re.compile(r"text_encoders\.([^.]+)\.(transformer\.)?")
#: Text encoders of one file, in the order of the pipeline's components.
_ENCODERS = {
    "flux": ("clip_l", "t5xxl"),
    "sd3": ("clip_l", "clip_g", "t5xxl"),
    "hunyuan-video": ("llama", "clip_l"),
    "hidream": ("clip_l", "clip_g", "t5xxl", "llama"),
}
_NAMES = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


def denoiser(modules: Iterable[str]) -> str:
    """ "unet", "transformer", or "" if these are the module names of neither."""
    modules = list(modules)
    if any(m.startswith(("down_blocks.", "input_blocks.")) for m in modules):
        return "unet"
    return "transformer" if recognise(modules) else ""


def _modules(tensors: Iterable[str], prefix: str) -> set[str]:
    return {t.removeprefix(prefix).rpartition(".")[0] for t in tensors if t.startswith(prefix)}


def parts_of(tensors: Iterable[str]) -> list[tuple[str, str]]:
    """(prefix, component) of every part of a pipeline that a single file holds; no VAE.

    Parameters
    ----------
    tensors : iterable of str
        All tensor names of the file.

    Returns
    -------
    list of (str, str)
        Empty for a model without any such prefix.
    """
    tensors = list(tensors)
    parts: list[tuple[str, str]] = []
    architecture = ""
    for prefix in _DENOISER:
        modules = _modules(tensors, prefix)
        kind = denoiser(modules)
        if modules and (kind or prefix != "net."):
            found = recognise(modules)
            architecture = found[0].architecture if found else ""
            parts.append((prefix, kind or "transformer"))
            break
    parts += [(p, c) for p, c in _STABLE_DIFFUSION if any(t.startswith(p) for t in tensors)]
    return parts + _encoders(tensors, architecture)


def _encoders(tensors: Iterable[str], architecture: str) -> list[tuple[str, str]]:
    prefixes: dict[str, str] = {}
    for match in filter(None, map(_ENCODER.match, tensors)):
        if match[2] or match[1] not in prefixes:
            prefixes[match[1]] = match[0]
    if len(prefixes) == 1 and architecture not in _ENCODERS:
        return [(next(iter(prefixes.values())), _NAMES[0])]
    order = _ENCODERS.get(architecture, tuple(sorted(prefixes)))
    return [(prefixes[e], c) for e, c in zip(order, _NAMES, strict=False) if e in prefixes]
