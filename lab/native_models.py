"""The transformers whose checkpoints exist under two sets of names, as tiny real models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lab import native_back


@dataclass(frozen=True)
class Architecture:
    """How one transformer's two sets of names are made.

    ``models`` are (diffusers class, tiny config); all of them share the native names. ``converter``
    is the function of ``diffusers.loaders.single_file_utils``. ``sizes`` replaces sizes that the
    converter has written into it. ``seeds`` are native keys that a converter looks for before it
    pops; with them the names are recorded from what it pops. Else ``back`` leads from diffusers'
    names to native ones. ``ignored`` are parameters that one side has and the other does not.
    """

    models: tuple[tuple[str, Mapping[str, Any]], ...]
    converter: str
    stacks: tuple[str, ...]
    seeds: tuple[str, ...] = ()
    back: native_back.Back = ()
    sizes: Mapping[int, int] = field(default_factory=dict)
    ignored: str = r"(?!)"
    inside: str = ""

    def native_of(self, name: str) -> str:
        """The native key that one of diffusers' keys is stored in, by ``back``."""
        for pattern, native in self.back:
            name = re.sub(pattern, native, name)
        return self.inside + name


_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12}
_FLUX: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "num_layers": 3,
    "num_single_layers": 3,
    "joint_attention_dim": 8,
    "axes_dims_rope": (4, 4, 4),
}
_SD3: dict[str, Any] = {
    **_HEADS,
    "sample_size": 4,
    "in_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": 8,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 8,
    "out_channels": 4,
    "pos_embed_max_size": 4,
}
_HUNYUAN: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_single_layers": 3,
    "num_refiner_layers": 3,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 4, 4),
}
_WAN: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
_LTX2: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 24,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 12,
    "audio_cross_attention_dim": 24,
    "num_layers": 3,
    "caption_channels": 8,
}
_COSMOS: dict[str, Any] = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "text_embed_dim": 8,
    "adaln_lora_dim": 8,
    "max_size": (4, 8, 8),
}


def _of(class_name: str, *configs: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return tuple((class_name, config) for config in configs)


_FLUX_1 = {**_FLUX, "pooled_projection_dim": 8}
_FLUX_2 = {**_FLUX, "timestep_guidance_channels": 8, "axes_dims_rope": (4, 4, 2, 2)}
_CHROMA = {
    **_FLUX,
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 16,
    "approximator_layers": 3,
}
_I2V_HUNYUAN = {**_HUNYUAN, "guidance_embeds": False, "image_condition_type": "token_replace"}
_FRAMEPACK = {
    **_HUNYUAN,
    "has_image_proj": True,
    "image_proj_dim": 8,
    "has_clean_x_embedder": True,
}
_QWEN = {k: v for k, v in _FLUX.items() if k != "num_single_layers"}
_Z_IMAGE = {
    "in_channels": 4,
    "dim": 24,
    "n_layers": 3,
    "n_refiner_layers": 3,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 8,
    "axes_dims": [4, 4, 4],
    "axes_lens": [8, 8, 8],
}
_LTX = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 24,
    "num_layers": 3,
    "caption_channels": 8,
}
_GATED_LTX_2 = {
    **_LTX2,
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
}
_AURAFLOW = {
    **_HEADS,
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "num_mmdit_layers": 3,
    "num_single_dit_layers": 3,
    "joint_attention_dim": 8,
    "caption_projection_dim": 24,
    "pos_embed_max_size": 16,
}
_LUMINA_2 = {
    "sample_size": 4,
    "in_channels": 4,
    "hidden_size": 36,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
    "multiple_of": 4,
    "axes_dim_rope": (4, 4, 4),
    "axes_lens": (8, 8, 8),
    "cap_feat_dim": 8,
}
_HIDREAM = {
    **_HEADS,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_single_layers": 3,
    "caption_channels": [8, 8],
    "text_emb_dim": 8,
    "axes_dims_rope": (8, 4),
    "llama_layers": [0, 1],
}
_MOCHI = {
    **_HEADS,
    "num_layers": 3,
    "pooled_projection_dim": 12,
    "in_channels": 4,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "max_sequence_length": 8,
}
_SANA = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 8,
    "sample_size": 4,
}
_FLUX_3 = {
    **_HEADS,
    "in_channels": 4,
    "cond_in_channels": 4,
    "num_layers": 3,
    "num_single_layers": 3,
    "joint_attention_dim": 8,
    "timestep_channels": 8,
    "axes_dims_rope": (4, 4, 2, 2),
}
_KREA_2 = {
    **_HEADS,
    "in_channels": 4,
    "num_layers": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "timestep_embed_dim": 8,
    "text_hidden_dim": 24,
    "num_text_layers": 2,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 16,
    "num_layerwise_text_blocks": 3,
    "num_refiner_text_blocks": 3,
    "axes_dims_rope": (4, 4, 4),
}
_QWEN_21 = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "context_in_dim": 8,
    "axes_dims_rope": (4, 4, 4),
}
_FLUX_STACKS = ("double_blocks.#.", "single_blocks.#.")
_LUMINA_STACKS = ("layers.#.", "noise_refiner.#.", "context_refiner.#.")

ARCHITECTURES: dict[str, Architecture] = {
    "flux": Architecture(
        _of("FluxTransformer2DModel", {**_FLUX_1, "guidance_embeds": True}, _FLUX_1),
        "convert_flux_transformer_checkpoint_to_diffusers",
        _FLUX_STACKS,
        seeds=("double_blocks.2.", "single_blocks.2.", "guidance_in"),
        sizes={3072: 24},
    ),
    "chroma": Architecture(
        _of("ChromaTransformer2DModel", _CHROMA),
        "convert_chroma_transformer_checkpoint_to_diffusers",
        (
            *_FLUX_STACKS,
            "distilled_guidance_layer.layers.#.",
            "distilled_guidance_layer.norms.#.",
        ),
        seeds=("double_blocks.2.", "single_blocks.2.", "distilled_guidance_layer.layers.2."),
        sizes={3072: 24},
    ),
    "flux-2": Architecture(
        _of("Flux2Transformer2DModel", _FLUX_2, {**_FLUX_2, "guidance_embeds": False}),
        "convert_flux2_transformer_checkpoint_to_diffusers",
        _FLUX_STACKS,
        back=native_back.FLUX_2,
    ),
    "sd3": Architecture(
        _of(
            "SD3Transformer2DModel",
            {**_SD3, "dual_attention_layers": (0, 1, 2), "qk_norm": "rms_norm"},
            _SD3,
        ),
        "convert_sd3_transformer_checkpoint_to_diffusers",
        ("joint_blocks.#.",),
        seeds=tuple(f"joint_blocks.{i}.x_block.attn2.ln_q." for i in range(3)),
    ),
    "hunyuan-video": Architecture(
        (
            *_of("HunyuanVideoTransformer3DModel", _HUNYUAN, _I2V_HUNYUAN),
            *_of("HunyuanVideoFramepackTransformer3DModel", _FRAMEPACK),
        ),
        "convert_hunyuan_video_transformer_to_diffusers",
        (*_FLUX_STACKS, "txt_in.individual_token_refiner.blocks.#."),
        back=native_back.HUNYUAN,
        sizes={3072: 24},
    ),
    "wan": Architecture(
        (
            *_of("WanTransformer3DModel", _WAN, {**_WAN, "image_dim": 8, "added_kv_proj_dim": 24}),
            *_of(
                "WanVACETransformer3DModel",
                {**_WAN, "vace_layers": [0, 1, 2], "vace_in_channels": 4},
            ),
        ),
        "convert_wan_transformer_to_diffusers",
        ("blocks.#.", "vace_blocks.#."),
        back=native_back.WAN,
    ),
    "qwen-image": Architecture(
        _of("QwenImageTransformer2DModel", _QWEN), "", ("transformer_blocks.#.",)
    ),
    "z-image": Architecture(
        _of("ZImageTransformer2DModel", _Z_IMAGE),
        "convert_z_image_transformer_checkpoint_to_diffusers",
        _LUMINA_STACKS,
        back=native_back.Z_IMAGE,
    ),
    "ltx-video": Architecture(
        _of("LTXVideoTransformer3DModel", _LTX),
        "convert_ltx_transformer_checkpoint_to_diffusers",
        ("transformer_blocks.#.",),
        back=native_back.LTX,
    ),
    "ltx-2": Architecture(
        _of("LTX2VideoTransformer3DModel", _LTX2, _GATED_LTX_2),
        "convert_ltx2_transformer_to_diffusers",
        ("transformer_blocks.#.",),
        back=native_back.LTX_2,
    ),
    "auraflow": Architecture(
        _of("AuraFlowTransformer2DModel", _AURAFLOW),
        "convert_auraflow_transformer_checkpoint_to_diffusers",
        ("double_layers.#.", "single_layers.#."),
        seeds=tuple(f"{s}_layers.{i}." for s in ("double", "single") for i in range(3)),
    ),
    "lumina-2": Architecture(
        _of("Lumina2Transformer2DModel", _LUMINA_2),
        "convert_lumina2_to_diffusers",
        _LUMINA_STACKS,
        back=native_back.LUMINA_2,
        sizes={2304: 36, 768: 12},
    ),
    "hidream": Architecture(
        _of("HiDreamImageTransformer2DModel", _HIDREAM),
        "convert_hidream_transformer_to_diffusers",
        ("double_stream_blocks.#.", "single_stream_blocks.#.", "caption_projection.#."),
    ),
    "cosmos-2": Architecture(
        _of("CosmosTransformer3DModel", {**_COSMOS, "extra_pos_embed_type": None}),
        "convert_cosmos_transformer_checkpoint_to_diffusers",
        ("blocks.#.",),
        back=native_back.COSMOS_2,
        inside="net.",
    ),
    "mochi": Architecture(
        _of("MochiTransformer3DModel", _MOCHI),
        "convert_mochi_transformer_checkpoint_to_diffusers",
        ("blocks.#.",),
        seeds=("blocks.2.",),
        sizes={48: 3},
    ),
    "sana": Architecture(
        _of("SanaTransformer2DModel", _SANA),
        "convert_sana_transformer_to_diffusers",
        ("blocks.#.",),
        seeds=("blocks.2.",),
        ignored=r"pos_embed",
    ),
    "flux-3": Architecture(
        _of("Flux3Transformer2DModel", _FLUX_3, {**_FLUX_3, "flow_map": True}),
        "convert_flux3_transformer_checkpoint_to_diffusers",
        (
            "content_mode_blocks.image.#.",
            "content_mode_blocks.image_cond.#.",
            "txt_mode_blocks.#.",
            "single_blocks.#.",
        ),
        back=native_back.FLUX_3,
    ),
    "krea-2": Architecture(
        _of("Krea2Transformer2DModel", _KREA_2),
        "convert_krea2_transformer_checkpoint_to_diffusers",
        ("blocks.#.", "txtfusion.layerwise_blocks.#.", "txtfusion.refiner_blocks.#."),
        back=native_back.KREA_2,
        # The original keeps the six rows of each block's table as one vector.
        ignored=r"^transformer_blocks\.\d+\.scale_shift_table",
    ),
    "qwen-image-2.1": Architecture(
        _of("QwenImage21Transformer2DModel", _QWEN_21),
        "convert_qwen_image21_transformer_checkpoint_to_diffusers",
        ("transformer_blocks.#.",),
        back=native_back.QWEN_IMAGE_21,
    ),
}
