"""kohya: the files of sd-scripts and musubi-tuner, read by A1111, Forge, ComfyUI, diffusers.

A module's name is a prefix for the component and its path with underscores for dots. Every module
has its alpha, the same in the whole file; what its own scale differs by is folded into ``lora_up``.
Beside LoRA a file may hold whole changes under the names that LyCORIS gave them: ``.diff``,
``.diff_b`` (a bias), ``.w_norm`` and ``.b_norm`` (a normalisation).

The paths are those of the code that trainers run (facts from kohya-ss/sd-scripts and
kohya-ss/musubi-tuner, Apache-2.0, ``networks/*.py``: the prefix plus the module's name in the model
they load), :data:`NAMES`.
"""

from __future__ import annotations

import torch

from regraft.bases import Base
from regraft.dialects.names import flatten
from regraft.dialects.writers.factors import (
    file_alpha,
    held_in_factors,
    is_layer_bias,
    is_matrix,
    is_norm,
    is_table,
    with_alpha,
)
from regraft.dialects.writers.naming import (
    DENOISERS,
    FileModule,
    by_native_names,
    by_own_names,
    is_t5,
    model_of,
)
from regraft.dialects.writers.registry import Refused, Task, Tensors, Writer, register
from regraft.dialects.writers.whole import changes, is_lora
from regraft.parallel import in_order

#: Model → whose module names its kohya files carry, and why. A model with a table of native names
#: that is not here carries the native ones: ComfyUI reads them, and nothing else reads any.
NAMES: dict[str, tuple[str, str]] = {
    "sd": ("diffusers", "sd-scripts trains SD 1.x and 2.x on diffusers' U-Net"),
    "sdxl": ("native", "sd-scripts trains SDXL on the original U-Net (sdxl_original_unet)"),
    "flux": ("native", "sd-scripts lora_flux: DoubleStreamBlock and SingleStreamBlock, fused"),
    "chroma": ("native", "sd-scripts lora_flux"),
    "sd3": ("native", "sd-scripts lora_sd3: joint_blocks, fused"),
    "lumina-2": ("native", "sd-scripts lora_lumina: JointTransformerBlock, fused"),
    "flux-2": ("native", "musubi lora_flux_2: DoubleStreamBlock and SingleStreamBlock, fused"),
    "hunyuan-video": ("native", "musubi lora: MMDoubleStreamBlock and MMSingleStreamBlock, fused"),
    "wan": ("native", "musubi lora_wan: WanAttentionBlock"),
    "framepack": ("diffusers", "musubi lora_framepack: HunyuanVideoTransformerBlock, split"),
    "qwen-image": ("diffusers", "musubi lora_qwen_image; the only names there are"),
    "z-image": ("diffusers", "musubi lora_zimage: ZImageTransformerBlock, split"),
}


def prefixes(base: Base) -> dict[str, str]:
    """Component → what stands in front of its modules' names.

    Flux's T5 is its second encoder and te3 all the same: sd-scripts numbers the kinds of encoder.
    """
    found = dict.fromkeys(DENOISERS, "lora_unet_")
    several = "text_encoder_2" in base.components or model_of(base) in ("flux", "sd3", "sdxl")
    alone = "lora_te1_" if several or is_t5(base, "text_encoder") else "lora_te_"
    found["text_encoder"] = alone
    found["text_encoder_2"] = "lora_te3_" if is_t5(base, "text_encoder_2") else "lora_te2_"
    found["text_encoder_3"] = "lora_te3_"
    return found


def refused(task: Task) -> Refused:
    """What kohya's names, or the tools that read them, have no place for."""
    found: Refused = {}
    known = prefixes(task.target)
    for site, update in task.adapter.updates.items():
        if site.component not in known:
            found[site] = (
                f"kohya files have no names for {site.component}"
                if site.component
                else "kohya files have no names for this kind of base"
            )
        elif is_matrix(site, task.target):
            if is_table(site, update):
                found[site] = "kohya files hold no embedding tables"
            elif update.layout == "transposed":
                found[site] = "kohya files hold no weights stored as (in, out)"
        elif not (is_layer_bias(site, task.target) or is_norm(site, task.target)):
            found[site] = "no reader of kohya files applies a change to a bare parameter"
    return found


def named(task: Task) -> list[tuple[str, FileModule]]:
    """Every module of the file, with its kohya name."""
    model = model_of(task.target)
    own = NAMES.get(model, ("native", ""))[0] == "diffusers"
    modules = by_own_names(task) if own else by_native_names(task)
    known = prefixes(task.target)
    return [(known[m.component] + flatten(m.name), m) for m in modules]


def alpha_for(modules: list[FileModule]) -> float:
    """The one alpha of the file, chosen without decomposing anything."""
    matrices = [m.parameters["weight"] for m in modules if is_lora(m)]
    cheap = (p for p in matrices if all(held_in_factors(u) for _, u, _ in p.parts))
    bounds = (u.rank for p in matrices for _, u, _ in p.parts)
    return file_alpha((p.low_rank() for p in cheap), bounds)


def tensors(task: Task) -> Tensors:
    """Every tensor of the file, one module at a time."""
    modules = named(task)
    lora = task.form == "lora"
    alpha = alpha_for([m for _, m in modules]) if lora else 1.0

    def work(item: tuple[str, FileModule]) -> Tensors:
        name, module = item
        held = changes(module, name, task.dtype, lora=lora)
        if lora and is_lora(module):
            factors = module.parameters["weight"].low_rank()
            down, up = with_alpha(factors, alpha, task.dtype)
            held[f"{name}.lora_down.weight"], held[f"{name}.lora_up.weight"] = down, up
            held[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        return held

    return {key: tensor for part in in_order(work, modules) for key, tensor in part.items()}


WRITER = register(
    Writer(
        name="kohya",
        read_by="single .safetensors as kohya sd-scripts writes it (A1111, Forge, ComfyUI)",
        refused=refused,
        tensors=tensors,
        forms=("lora", "diff"),
        holds="weights of linear layers and convolutions; biases and normalisations as whole "
        "changes",
    )
)
