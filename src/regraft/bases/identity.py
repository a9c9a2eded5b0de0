"""What a base is, read off its shapes: the names that users' tools expect in metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from regraft.adapters.update import matrix_shape
from regraft.bases.base import Base
from regraft.bases.native_tables import recognise
from regraft.bases.published import Published, published


@dataclass(frozen=True)
class Architecture:
    """``modelspec`` is the ModelSpec architecture without "/lora"; ``kohya`` is kohya's (for newer
    models musubi-tuner's) ``ss_base_model_version``, empty where neither tool has a word for it."""

    label: str
    modelspec: str
    kohya: str


_SD2_V = Architecture("Stable Diffusion 2.x (v-prediction)", "stable-diffusion-v2-768-v", "sd_v2_v")
_BY_CONTEXT = {
    768: Architecture("Stable Diffusion 1.x", "stable-diffusion-v1", "sd_v1"),
    1024: Architecture("Stable Diffusion 2.x", "stable-diffusion-v2-512", "sd_v2"),
    2048: Architecture("Stable Diffusion XL", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
_REFINER = Architecture(
    "Stable Diffusion XL refiner", "stable-diffusion-xl-v1-refiner", "sdxl_base_v1-0"
)
#: Transformer blocks of the U-Net's lowest level → what SDXL with so many is called.
_XL_DEPTHS = {10: "Stable Diffusion XL", 4: "SSD-1B"}


def architecture(base: Base) -> Architecture | None:
    """The known architecture with these shapes, or None.

    A U-Net is known by its first convolution and the width of its text condition; a transformer by
    its module names and the shapes of all its weights.
    """
    if "unet" in base.components:
        return _unet(base)
    if "transformer" in base.components:
        return _transformer(base)
    return None


def _unet(base: Base) -> Architecture | None:
    shapes = {s.module: w.shape for s, w in base.weights.items() if s.component == "unet"}
    first = shapes.get("conv_in", (0, 0))
    context = next((s[1] for m, s in shapes.items() if m.endswith(".attn2.to_k")), 0)
    if (first[0], context) == (384, 1280):
        return _REFINER
    found = _BY_CONTEXT.get(context) if first[0] == 320 else None
    if found is None:
        return None
    if context == 1024 and _predicts_v(base):
        found = _SD2_V
    if context == 2048:
        inside = "down_blocks.2.attentions.0.transformer_blocks."
        depth = len({m.removeprefix(inside).split(".")[0] for m in shapes if m.startswith(inside)})
        found = replace(found, label=_XL_DEPTHS.get(depth, f"{found.label} with fewer blocks"))
    return replace(found, label=f"{found.label} inpainting") if first[1] == 9 else found


def _predicts_v(base: Base) -> bool:
    """What the scheduler says; without one, the size of picture the U-Net is for (768 is v)."""
    path = base.path / "scheduler" / "scheduler_config.json"
    try:
        return bool(json.loads(path.read_text())["prediction_type"] == "v_prediction")
    except (OSError, ValueError, KeyError, TypeError):
        return base.configs.get("unet", {}).get("sample_size") == 96


def _transformer(base: Base) -> Architecture | None:
    modules = {
        s.module
        for held in (base.weights, base.others)
        for s in held
        if s.component == "transformer"
    }
    names = recognise(modules)
    if names is None:
        return None
    shapes = {
        s.module: matrix_shape(w.shape)
        for s, w in base.weights.items()
        if s.component == "transformer"
    }
    fitting = [p for p in published() if p.names == names[0].architecture and _is_like(p, shapes)]
    if not fitting:
        return None
    found = max(fitting, key=lambda p: p.depths == _depths(p, shapes))
    label = _label(base, found.label)
    own = _depths(found, shapes)
    if own != dict(found.depths):
        label = f"{label} with {sum(own.values())} of {sum(found.depths.values())} blocks"
    return Architecture(label, found.modelspec, found.kohya)


def _is_like(model: Published, shapes: dict[str, tuple[int, int]]) -> bool:
    """The same weights with the same shapes, whatever the depth."""
    patterns = {m: model.pattern_of(m) for m in shapes}
    if set(patterns.values()) != set(model.shapes):
        return False
    return all(shapes[m] in model.shapes[p] for m, p in patterns.items() if p is not None)


def _depths(model: Published, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    return {
        stack: len({m[len(stack) + 1 :].split(".")[0] for m in shapes if m.startswith(f"{stack}.")})
        for stack in model.depths
    }


def _label(base: Base, label: str) -> str:
    """Beside the shapes: Wan 2.1 is one model where 2.2 is two of its size side by side; one of
    HunyuanVideo's image-to-video models is told by its config."""
    image = base.configs.get("transformer", {}).get("image_condition_type")
    if label == "HunyuanVideo" and image:
        return "HunyuanVideo I2V"
    if label != "Wan 2.1 T2V 14B":
        return label
    if (base.path / "transformer_2").is_dir() or "2.2" in base.ref:
        return "Wan 2.2 T2V A14B"
    return label if "2.1" in base.ref else "Wan 2.1 T2V 14B or 2.2 T2V A14B"
