"""QA-LoRA (arXiv 2309.14717): a LoRA that merges into the zero points of a quantised base."""

from regraft.tuners.qa_lora.config import QALoraConfig
from regraft.tuners.qa_lora.layer import QALoraLayer
from regraft.tuners.qa_lora.model import QALoraModel
from regraft.tuners.registration import register

register("qa_lora", QALoraConfig, QALoraModel, QALoraModel.prefix)

__all__ = ["QALoraConfig", "QALoraLayer", "QALoraModel"]
