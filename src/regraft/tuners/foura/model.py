"""FouRA as a PEFT tuner: which layers are wrapped."""

from __future__ import annotations

from regraft.tuners.foura.layer import FouRALayer
from regraft.tuners.model import DeltaModel


class FouRAModel(DeltaModel):
    """Wraps linear layers, GPT-2's Conv1D and convolutions without groups."""

    prefix = "foura_"
    tuner_layer_cls = FouRALayer
