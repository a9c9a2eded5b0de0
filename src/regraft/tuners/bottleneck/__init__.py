"""Bottleneck adapters (arXiv 1902.00751) as a PEFT tuner; docs/methods/families/bottleneck.md."""

from regraft.tuners.bottleneck.config import BottleneckConfig
from regraft.tuners.bottleneck.layer import BottleneckLayer
from regraft.tuners.bottleneck.model import BottleneckModel, bottlenecks
from regraft.tuners.bottleneck.parts import Bottleneck, from_tensors, to_tensors
from regraft.tuners.registration import register

register("bottleneck", BottleneckConfig, BottleneckModel, BottleneckModel.prefix)

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "bottlenecks",
    "from_tensors",
    "to_tensors",
]
