"""Regraft carries adapters (LoRA and its relatives) from one base model to another.

>>> import regraft
>>> report = regraft.transfer("style.safetensors", source="base-a", target="base-b",
...                           output="style-b.safetensors")  # doctest: +SKIP
"""

from regraft.bases import Base, open_base
from regraft.compare import compare
from regraft.convert import convert
from regraft.dialects import inspect_file, load_adapter
from regraft.errors import RegraftError
from regraft.files import allow_pickles
from regraft.merge import merge
from regraft.methods import methods
from regraft.result import ConvertResult, MergeResult, TransferResult, VerifyResult
from regraft.retention.measure import measure
from regraft.transfer import transfer
from regraft.verify import verify
from regraft.versions import regraft_version

__version__ = regraft_version()

__all__ = [
    "Base",
    "ConvertResult",
    "MergeResult",
    "RegraftError",
    "TransferResult",
    "VerifyResult",
    "__version__",
    "allow_pickles",
    "compare",
    "convert",
    "inspect_file",
    "load_adapter",
    "measure",
    "merge",
    "methods",
    "open_base",
    "transfer",
    "verify",
]
