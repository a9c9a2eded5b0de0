"""LoRA-X on a whole model."""

from __future__ import annotations

from typing import Any

from torch import nn

from regraft.subspaces.reproducible import signs_of
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

    def _create_and_replace(
        self,
        config: LoraXConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(
            config, adapter_name, target, target_name, parent, current_key, **kwargs
        )
        if config.core != "full" or not self.needs_hash(config) or not config.check_base:
            return
        layer = getattr(parent, target_name)
        assert isinstance(layer, LoraXLayer)
        if current_key in config.signs and not config.own_hashes:
            layer.expect(adapter_name, config.signs[current_key])
        elif not config.inference_mode:
            config.signs[current_key] = signs_of(layer.bases(adapter_name)[0])
