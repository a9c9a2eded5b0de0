"""Adapter families that PEFT lacks, as PEFT tuners under string keys.

Importing this makes them known to PEFT: ``get_peft_model``, ``PeftModel.from_pretrained``,
``inject_adapter_in_model`` and diffusers' ``add_adapter`` take them like PEFT's own.
"""

from regraft.tuners import registration  # first: it says so if PEFT is missing
from regraft.tuners.bottleneck import BottleneckConfig, BottleneckModel
from regraft.tuners.foura import FouRAConfig, FouRAModel
from regraft.tuners.lora_x import LoraXConfig, LoraXModel
from regraft.tuners.qa_lora import QALoraConfig, QALoraModel
from regraft.tuners.saved import load_onto
from regraft.tuners.svdiff import (
    SVDiffConfig,
    SVDiffModel,
    load_spectral_shifts,
    write_spectral_shifts,
)

register = registration.register

__all__ = [
    "BottleneckConfig",
    "BottleneckModel",
    "FouRAConfig",
    "FouRAModel",
    "LoraXConfig",
    "LoraXModel",
    "QALoraConfig",
    "QALoraModel",
    "SVDiffConfig",
    "SVDiffModel",
    "load_onto",
    "load_spectral_shifts",
    "register",
    "write_spectral_shifts",
]
