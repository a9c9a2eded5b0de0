"""LoRA-X on a whole model."""

from __future__ import annotations

from regraft.tuners.config import TunerConfig
from regraft.tuners.lora_x.config import LoraXConfig
from regraft.tuners.lora_x.layer import LoraXLayer
from regraft.tuners.model import DeltaModel


class LoraXModel(DeltaModel):
    """A model with LoRA-X adapters: ``get_peft_model(model, LoraXConfig(...))``."""

    prefix = "lora_x_"
    tuner_layer_cls = LoraXLayer

    def needs_hash(self, config: TunerConfig) -> bool:
        return isinstance(config, LoraXConfig) and not config.store_bases
