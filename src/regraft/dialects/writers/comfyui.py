"""comfyui: ComfyUI's own names, ``diffusion_model.`` or ``text_encoders.`` and a module's path.

Rules of ComfyUI's reader (facts from ``comfy/lora.py`` and ``comfy/weight_adapter/lora.py``,
GPL-3.0, restated):

* for every ``X.weight`` of the model it looks for the names ``X`` with one of the LoRA suffixes
  (``.lora_A.weight``, …), ``.alpha``, ``.diff`` or ``.w_norm`` (a change of the weight),
  ``.diff_b`` or, beside ``.w_norm``, ``.b_norm`` (a change of the bias);
* any other parameter of the denoiser is looked for under its whole name, with ``.diff``;
* ΔW = alpha / r · B A, reshaped to the weight as stored; without alpha B A.

The scale is folded into ``lora_B``: other readers of such names (diffusers, trainers) treat alpha
each in its own way. Models are named, and fused, as in their original code; HunyuanVideo's are
renamed where ComfyUI differs, :data:`RENAMED`.
"""

from __future__ import annotations

import re

from regraft.adapters import Site
from regraft.bases import Base
from regraft.bases.native import native_parts
from regraft.dialects.writers.factors import folded, is_layer_bias, is_matrix, is_norm, stored
from regraft.dialects.writers.naming import (
    DENOISERS,
    FileModule,
    by_native_names,
    is_clip,
    is_t5,
    model_of,
)
from regraft.dialects.writers.registry import Refused, Task, Tensors, Writer, register
from regraft.dialects.writers.whole import changes, is_lora
from regraft.parallel import in_order

_HUNYUAN = (
    (r"(_embedder|_in)\.mlp\.0$", r"\1.in_layer"),
    (r"(_embedder|_in)\.mlp\.2$", r"\1.out_layer"),
    (r"c_embedder\.linear_1$", "c_embedder.in_layer"),
    (r"c_embedder\.linear_2$", "c_embedder.out_layer"),
    (r"_attn_q_norm$", "_attn.norm.query_norm"),
    (r"_attn_k_norm$", "_attn.norm.key_norm"),
    (r"\.q_norm$", ".norm.query_norm"),
    (r"\.k_norm$", ".norm.key_norm"),
)
#: The original name → ComfyUI's, where ComfyUI reads LoRA only under its own. It reads the blocks
#: of HunyuanVideo (``img_attn_qkv``, ``mlp.fc1``, …) under both; diffusers only under the original.
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "hunyuan-video": _HUNYUAN,
    "framepack": _HUNYUAN,
}
#: Normalisations of Flux and its kin: the original code's ``scale`` is ``weight`` in ComfyUI.
_FLUX_NORM = re.compile(r"(.+\.(query|key)_norm|distilled_guidance_layer\.norms\.\d+)")
#: The width of CLIP ViT-H, the encoder of SD 2.x.
_CLIP_H = 1024


def _encoder(base: Base, component: str) -> str | None:
    """ComfyUI's name of a text encoder; None if it is of a kind that no tool trains."""
    if is_t5(base, component):
        return {"wan": "umt5xxl", "auraflow": "pile_t5xl"}.get(model_of(base), "t5xxl")
    if not is_clip(base, component):
        return None
    if component == "text_encoder_2":
        return "clip_l" if model_of(base) == "hunyuan-video" else "clip_g"
    width = max(
        (w.shape[1] for s, w in base.weights.items()
         if s.component == component and s.module.endswith("q_proj")),
        default=0,
    )  # fmt: skip
    return "clip_h" if model_of(base) == "sd" and width == _CLIP_H else "clip_l"


def _front(base: Base, component: str) -> str | None:
    if component in DENOISERS:
        return "diffusion_model."
    encoder = _encoder(base, component) if component.startswith("text_encoder") else None
    return None if encoder is None else f"text_encoders.{encoder}.transformer."


def refused(task: Task) -> Refused:
    """What ComfyUI has no name for."""
    found: Refused = {}
    fronts = {c: _front(task.target, c) for c in task.components}
    known = _named_sites(task)
    for site in task.adapter.updates:
        if fronts[site.component] is None:
            found[site] = "ComfyUI has no name for this component that is known here"
        elif site.component in DENOISERS:
            if known is not None and site not in known:
                found[site] = "the original name of this module, which ComfyUI reads, is not known"
        elif not (
            is_matrix(site, task.target)
            or is_layer_bias(site, task.target)
            or is_norm(site, task.target)
        ):
            found[site] = "ComfyUI applies no change to a bare parameter of a text encoder"
    return found


def _named_sites(task: Task) -> set[Site] | None:
    """The sites of the denoiser whose names ComfyUI knows; None: all of them."""
    if model_of(task.target) in ("sd", "sdxl"):
        parts = native_parts(task.target, "unet").values()
        return {part.site for found in parts for part in found}
    return None if model_of(task.target) else set()


def _name(module: FileModule, model: str) -> str:
    name = module.name
    if module.component in DENOISERS:
        for pattern, own in RENAMED.get(model, ()):
            name = re.sub(pattern, own, name)
    return name


def tensors(task: Task) -> Tensors:
    """Every tensor of the file, one module at a time."""
    model, lora = model_of(task.target), task.form == "lora"
    fronts = {c: _front(task.target, c) for c in task.components}

    def work(module: FileModule) -> Tensors:
        name = f"{fronts[module.component]}{_name(module, model)}"
        scale_is_weight = _FLUX_NORM.fullmatch(module.name) is not None
        held = changes(module, name, task.dtype, lora=lora, scale=scale_is_weight)
        if lora and is_lora(module):
            down, up = folded(stored(module.parameters["weight"].low_rank()), task.dtype)
            held[f"{name}.lora_A.weight"], held[f"{name}.lora_B.weight"] = down, up
        for parameter, change in module.parameters.items():
            if parameter not in ("weight", "bias", "scale" if scale_is_weight else ""):
                held[f"{name}.{parameter}.diff".replace("..", ".")] = change.diff().to(task.dtype)
        return held

    return {key: t for part in in_order(work, by_native_names(task)) for key, t in part.items()}


WRITER = register(
    Writer(
        name="comfyui",
        read_by="single .safetensors with ComfyUI's own names (ComfyUI; diffusers for many "
        "transformers)",
        refused=refused,
        tensors=tensors,
        forms=("lora", "diff"),
        holds="weights of every kind; biases, normalisations and bare parameters as whole changes",
    )
)
