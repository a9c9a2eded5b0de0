"""One cell of the catalogue: a family in a dialect on one kind of layer, and who writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

#: The kinds of layer, in the order of the table's columns.
LAYERS = (
    "linear",
    "1×1 conv",
    "3×3 conv",
    "embedding",
    "Conv1D",
    "fused",
    "norm",
    "bias",
)


#: Dialect of the catalogue → how its files name a module.
DIALECTS = {
    "kohya": "`lora_unet_`, `lora_te_`, `lora_te1_` … and the name with `_` for every dot: "
    "diffusers' for SD 1.x and 2.x, the original checkpoint's for SDXL and the transformers",
    "lycoris": "`lycoris_` and the name with `_` for every dot",
    "musubi other": "`diffusion_model.` and a dotted name guessed back (convert_lora's other)",
    "onetrainer legacy": "`lora_unet_` or `lora_transformer_`, diffusers' names with `_`",
    "onetrainer kohya": "as kohya, fused layers too",
    "onetrainer diffusers": "`unet.` or `transformer.`, `lora_A` and `lora_B`, alpha folded in",
    "onetrainer original": "the original names, dotted, no prefix, alpha kept",
    "onetrainer comfy": "`diffusion_model.`, `text_encoders.`, the original names, alpha kept",
    "ai-toolkit": "`transformer.` or `diffusion_model.`, diffusers' names; for Wan the original",
    "diffusers": "`unet.`, `transformer.`, `text_encoder.` …, dotted; `lora_adapter_metadata`",
    "diffusers old": "`….processor.to_q_lora.down`, `….lora_linear_layer.down`, `….lora.down`",
    "peft": "a folder with its config; `base_model.model.` and dotted",
    "peft file": "`adapter_model.safetensors` without its config, or a state dict with `.default`",
    "comfyui": "`diffusion_model.`, `text_encoders.clip_l.transformer.` …, the original names",
    "bfl": "the original names, dotted, no prefix",
    "fal": "`base_model.model.` and the original names",
    "xlabs": "`double_blocks.0.processor.qkv_lora1.down` …",
    "omi": "`transformer.`, `unet.`, `clip_l.`, `t5.`, the original names, fused parts numbered",
    "svdiff-pytorch": "diffusers' names, dotted",
    "regraft": "the component and diffusers' name",
    "adapters": "the names of the adapters library",
}


@dataclass(frozen=True)
class Made:
    """A file as its writer makes it, its base, and ΔW at every site by an oracle of its own."""

    adapter: Path
    base: Path
    wanted: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A family in a dialect on a kind of layer.

    ``outcome`` is "exact", or what the reading's note or refusal must say: "note: …" for exact
    results that need a remark, "refused: …" for what is not carried.
    """

    family: str
    dialect: str
    layer: str
    writer: str
    make: Callable[[Path], Made]
    outcome: str = "exact"
    what: str = ""

    def __post_init__(self) -> None:
        assert self.layer in LAYERS, self.layer
        assert self.dialect in DIALECTS, self.dialect

    @property
    def name(self) -> str:
        text = f"{self.family}, {self.dialect}, {self.layer}"
        return f"{text}, {self.what}" if self.what else text


def add_to(cases: list[Case]) -> Callable[..., None]:
    """A function that declares a case in a list, the outcome last."""

    def add(
        family: str,
        dialect: str,
        layer: str,
        writer: str,
        make: Callable[[Path], Made],
        outcome: str = "exact",
        what: str = "",
    ) -> None:
        cases.append(Case(family, dialect, layer, writer, make, outcome, what))

    return add
