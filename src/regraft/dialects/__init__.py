"""Dialects: how adapter files name their tensors. Reading and writing, every key accounted for."""

from regraft.dialects.inspect import inspect_file
from regraft.dialects.load import load_adapter
from regraft.dialects.write import holdable, write_adapter
from regraft.dialects.writers import DIALECTS

__all__ = ["DIALECTS", "holdable", "inspect_file", "load_adapter", "write_adapter"]
