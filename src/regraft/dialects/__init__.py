"""Dialects: how adapter files name their tensors. Reading and writing, every key accounted for."""

from regraft.dialects.inspect import inspect_file
from regraft.dialects.load import load_adapter
from regraft.dialects.names import DIALECTS
from regraft.dialects.write import write_adapter

__all__ = ["DIALECTS", "inspect_file", "load_adapter", "write_adapter"]
