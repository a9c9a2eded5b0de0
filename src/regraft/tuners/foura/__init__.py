"""FouRA (arXiv 2406.08798) as a PEFT tuner; page: docs/methods/families/foura.md."""

from regraft.tuners.foura.config import FouRAConfig
from regraft.tuners.foura.gate import freeze
from regraft.tuners.foura.layer import FouRALayer
from regraft.tuners.foura.model import FouRAModel
from regraft.tuners.registration import register

register("foura", FouRAConfig, FouRAModel, FouRAModel.prefix)

__all__ = ["FouRAConfig", "FouRALayer", "FouRAModel", "freeze"]
