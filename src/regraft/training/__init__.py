"""Training: an adapter of any family on a base that runs, to be carried or to compare with."""

from regraft.running.quantised import FORMS
from regraft.training.run import TrainResult, train
from regraft.training.settings import FAMILIES, PRESETS, Settings, read_config

__all__ = ["FAMILIES", "FORMS", "PRESETS", "Settings", "TrainResult", "read_config", "train"]
