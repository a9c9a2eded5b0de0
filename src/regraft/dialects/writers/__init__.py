"""Writing adapters: one file per dialect, each registering itself."""

from regraft.dialects.writers import comfyui, diffusers, kohya, lora_x, peft
from regraft.dialects.writers.registry import Form, Task, Writer, get_writer, writers

#: The dialects this version writes, with what reads them.
DIALECTS: dict[str, str] = {writer.name: writer.read_by for writer in writers()}

__all__ = [
    "DIALECTS",
    "Form",
    "Task",
    "Writer",
    "comfyui",
    "diffusers",
    "get_writer",
    "kohya",
    "lora_x",
    "peft",
    "writers",
]
