"""QA-LoRA on a whole model."""

from __future__ import annotations

from typing import ClassVar

from regraft.tuners.layer import Kind
from regraft.tuners.model import DeltaModel
from regraft.tuners.qa_lora.layer import QALoraLayer


class QALoraModel(DeltaModel):
    """A model with QA-LoRA adapters: ``get_peft_model(model, QALoraConfig(...))``."""

    prefix = "lora_"  # its tensors are named as PEFT names those of its own QA-LoRA
    tuner_layer_cls = QALoraLayer
    kinds: ClassVar[tuple[Kind, ...]] = ("linear",)
