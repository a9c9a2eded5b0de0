"""The sizes of the transformers that are published, to tell what a base or an adapter file is.

``python -m lab.published`` builds each model without its numbers and writes the shapes of its
weights into ``src/regraft/bases/published.json``. The sizes are those of the configs on the hub;
most are diffusers' defaults. Run after ``lab.native_names``.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import torch

from lab.native_names import MAPS

FILE = MAPS.parent / "published.json"

_SD3 = {"pos_embed_max_size": 192, "out_channels": 16}
_FLUX_2 = "Flux2Transformer2DModel"
_WAN = "WanTransformer3DModel"
_WAN_S: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_LTX_13B: dict[str, Any] = {
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "num_layers": 48,
}
_SANA_S: dict[str, Any] = {
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "num_layers": 28,
}
_COSMOS: dict[str, Any] = {"in_channels": 17, "out_channels": 16, "extra_pos_embed_type": None}

#: (label, table of names, ModelSpec architecture, kohya's or musubi's ss_base_model_version or "",
#: diffusers class, config)
PUBLISHED: tuple[tuple[str, str, str, str, str, dict[str, Any]], ...] = (
    ("Flux.1 dev", "flux", "flux-1-dev", "flux1", "FluxTransformer2DModel",
     {"guidance_embeds": True}),
    ("Flux.1 schnell", "flux", "flux-1-schnell", "flux1", "FluxTransformer2DModel", {}),
    ("Flux.1 Fill dev", "flux", "flux-1-dev", "flux1", "FluxTransformer2DModel",
     {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}),
    ("Flux.1 Depth or Canny dev", "flux", "flux-1-dev", "flux1", "FluxTransformer2DModel",
     {"guidance_embeds": True, "in_channels": 128, "out_channels": 64}),
    ("Chroma", "chroma", "chroma", "chroma", "ChromaTransformer2DModel", {}),
    ("Flux.2 dev", "flux-2", "Flux.2-dev", "flux_2_dev", _FLUX_2, {}),
    ("Flux.2 klein 9B", "flux-2", "Flux.2-klein-9b", "flux_2_klein_9b", _FLUX_2,
     {"num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
      "guidance_embeds": False}),
    ("Flux.2 klein 4B", "flux-2", "Flux.2-klein-4b", "flux_2_klein_4b", _FLUX_2,
     {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
      "joint_attention_dim": 7680, "guidance_embeds": False}),
    ("Stable Diffusion 3 Medium", "sd3", "stable-diffusion-3-m", "", "SD3Transformer2DModel",
     {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}),
    ("Stable Diffusion 3.5 Medium", "sd3", "stable-diffusion-3-5-medium", "",
     "SD3Transformer2DModel",
     {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
      "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}),
    ("Stable Diffusion 3.5 Large", "sd3", "stable-diffusion-3-5-large", "",
     "SD3Transformer2DModel",
     {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
      "qk_norm": "rms_norm"}),
    ("HunyuanVideo", "hunyuan-video", "hunyuan-video", "hunyuan_video",
     "HunyuanVideoTransformer3DModel", {}),
    ("HunyuanVideo I2V", "hunyuan-video", "hunyuan-video", "hunyuan_video",
     "HunyuanVideoTransformer3DModel",
     {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"}),
    ("FramePack", "hunyuan-video", "framepack", "framepack",
     "HunyuanVideoFramepackTransformer3DModel",
     {"has_image_proj": True, "has_clean_x_embedder": True}),
    ("Wan 2.1 T2V 1.3B", "wan", "wan2.1", "wan", _WAN, _WAN_S),
    ("Wan 2.1 T2V 14B", "wan", "wan2.1", "wan", _WAN, {}),
    ("Wan 2.1 I2V 14B", "wan", "wan2.1", "wan", _WAN,
     {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}),
    ("Wan 2.2 I2V A14B", "wan", "wan2.1", "wan", _WAN, {"in_channels": 36}),
    ("Wan 2.2 TI2V 5B", "wan", "wan2.1", "wan", _WAN,
     {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336,
      "num_layers": 30}),
    ("Wan 2.1 VACE 1.3B", "wan", "wan2.1", "wan", "WanVACETransformer3DModel",
     {**_WAN_S, "vace_layers": list(range(0, 30, 2))}),
    ("Wan 2.1 VACE 14B", "wan", "wan2.1", "wan", "WanVACETransformer3DModel", {}),
    ("Qwen-Image", "qwen-image", "Qwen-Image", "qwen_image", "QwenImageTransformer2DModel", {}),
    ("Qwen-Image 2.1", "qwen-image-2.1", "Qwen-Image-2.1", "", "QwenImage21Transformer2DModel", {}),
    ("Flux.3", "flux-3", "Flux.3", "", "Flux3Transformer2DModel", {}),
    ("Krea 2", "krea-2", "Krea-2", "krea2", "Krea2Transformer2DModel", {}),
    ("Z-Image", "z-image", "Z-Image", "z_image", "ZImageTransformer2DModel", {}),
    ("LTX-Video 2B", "ltx-video", "ltx-video", "", "LTXVideoTransformer3DModel", {}),
    ("LTX-Video 13B", "ltx-video", "ltx-video", "", "LTXVideoTransformer3DModel", _LTX_13B),
    ("LTX-2", "ltx-2", "ltx-2", "", "LTX2VideoTransformer3DModel", {}),
    ("AuraFlow", "auraflow", "auraflow", "", "AuraFlowTransformer2DModel", {}),
    ("Lumina-Image 2.0", "lumina-2", "lumina-2", "lumina2", "Lumina2Transformer2DModel",
     {"cap_feat_dim": 2304}),
    ("HiDream-I1", "hidream", "hidream-i1", "", "HiDreamImageTransformer2DModel",
     {"patch_size": 2, "in_channels": 16, "out_channels": 16, "caption_channels": [4096, 4096],
      "llama_layers": [*range(32), *[31] * 16]}),
    ("Cosmos-Predict2 2B", "cosmos-2", "cosmos-predict2", "", "CosmosTransformer3DModel",
     {**_COSMOS, "num_attention_heads": 16}),
    ("Cosmos-Predict2 14B", "cosmos-2", "cosmos-predict2", "", "CosmosTransformer3DModel",
     {**_COSMOS, "num_attention_heads": 40, "num_layers": 36}),
    ("Mochi 1", "mochi", "mochi-1", "", "MochiTransformer3DModel", {}),
    ("Sana 1.6B", "sana", "sana", "", "SanaTransformer2DModel", {}),
    ("Sana 0.6B", "sana", "sana", "", "SanaTransformer2DModel", _SANA_S),
)  # fmt: skip


def _stacks(names: str) -> set[str]:
    """Where diffusers' names count blocks, such as "transformer_blocks."."""
    table = json.loads((MAPS / f"{names}.json").read_text(encoding="utf-8"))["names"]
    found = [[parts] if isinstance(parts, str) else list(parts) for parts in table.values()]
    return {c.partition("#")[0] for canonical in found for c in canonical if "#" in c}


def sizes(names: str, class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Depths of a model's stacks of blocks, and the matrix shapes of its weights.

    Returns
    -------
    dict
        ``depths``: stack → blocks. ``shapes``: module, its block's number written ``#`` →
        "rows x columns", several where blocks differ.
    """
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**config)
    block = re.compile(rf"({'|'.join(map(re.escape, _stacks(names)))})(\d+)")
    depths: dict[str, int] = {}
    shapes: dict[str, list[str]] = {}
    for name, tensor in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        if parameter != "weight" or tensor.ndim < 2:
            continue
        match = block.match(module)
        if match:
            stack = match[1].removesuffix(".")
            depths[stack] = max(depths.get(stack, 0), int(match[2]) + 1)
            module = f"{match[1]}#{module[match.end() :]}"
        size = f"{tensor.shape[0]}x{math.prod(tensor.shape[1:])}"
        found = shapes.setdefault(module, [])
        if size not in found:
            found.append(size)
    return {"depths": depths, "shapes": {m: " ".join(s) for m, s in shapes.items()}}


def written() -> str:
    """The file's text."""
    found = [
        {"label": label, "names": names, "modelspec": spec, "kohya": kohya}
        | sizes(names, class_name, config)
        for label, names, spec, kohya, class_name, config in PUBLISHED
    ]
    return json.dumps(found, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
