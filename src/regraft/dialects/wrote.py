"""Which program wrote a file: by what its metadata say, else by habits of its keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_MUSUBI = {
    f"networks.lora_{model}"
    for model in (
        "wan", "framepack", "qwen_image", "zimage", "flux_2", "hv_1_5", "kandinsky", "krea2",
        "ideogram4", "hidream_o1",
    )
}  # fmt: skip
#: A habit of a key → the program that has it. The first that any key shows decides.
_HABITS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), program)
    for pattern, program in (
        (r".*\.processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight", "x-flux"),
        (r"bundle_emb\..*|lora_transformer_.*", "OneTrainer"),
        (r"(clip_l|clip_g|t5|transformer|unet)\.(?!.*lora_[AB]).*lora_(down|up)\.weight", "OMI"),
        (r"oft_unet_.*", "sd-scripts"),
        (r".*\.(hada|lokr)_\w+|.*\.(oft_blocks|on_input|w_norm|dora_scale)|lycoris_.*", "LyCORIS"),
        (r".*\.(a1|a2|b1|b2|q_layer)\.weight", "LyCORIS"),
        (r".*_lora\.(down|up)\.weight|.*\.lora_linear_layer\..*", "diffusers before 0.22"),
        (r".*\.lora\.(down|up)\.weight", "diffusers before 0.26"),
        (r".*\.magnitude", "ai-toolkit"),
        (r"lora_(unet|te\d?)_.*", "sd-scripts or musubi-tuner"),
        (r"(unet|transformer|text_encoder(_\d)?)\..*\.lora_[AB]\.weight", "diffusers"),
        (r"base_model\.model\..*", "PEFT"),
        (r"mid_block\..*\.delta|.*\.delta", "svdiff-pytorch"),
    )
)


def writer_of(keys: Iterable[str], metadata: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """The program that wrote an adapter file; "unknown" if nothing tells.

    Parameters
    ----------
    keys : iterable of str
        The file's tensor names.
    metadata : mapping
        Of the safetensors file.
    config : mapping
        A PEFT folder's ``adapter_config.json``.
    """
    if "regraft" in metadata:
        return "regraft"
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer"
    if "ai-toolkit" in metadata.get("software", ""):
        return "ai-toolkit"
    network = metadata.get("ss_network_module", "")
    if network.startswith("lycoris"):
        return "LyCORIS"
    if network in _MUSUBI or "musubi" in metadata.get("modelspec.implementation", ""):
        return "musubi-tuner"
    if network.startswith("networks."):
        return "sd-scripts"
    if config:
        return "PEFT"
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    names = list(keys)
    for pattern, program in _HABITS:
        if any(pattern.fullmatch(name) for name in names):
            return program
    return "unknown"
