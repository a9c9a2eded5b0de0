"""LoRA-X (arXiv 2501.16559): a change of the singular values in a base's own singular bases."""

from regraft.tuners.lora_x.config import LoraXConfig
from regraft.tuners.lora_x.layer import LoraXLayer
from regraft.tuners.lora_x.model import LoraXModel
from regraft.tuners.registration import register

register("lora_x", LoraXConfig, LoraXModel, LoraXModel.prefix)

__all__ = ["LoraXConfig", "LoraXLayer", "LoraXModel"]
