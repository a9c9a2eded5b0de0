"""diffusers: one file with dotted names, the component in front.

Readers outside diffusers ignore its metadata, so the scale is folded into ``lora_B``.
"""

from __future__ import annotations

from regraft.dialects.writers import layers
from regraft.dialects.writers.layers import Layer, layers_of
from regraft.dialects.writers.registry import Task, Tensors, Writer, register
from regraft.parallel import in_order


def tensors(task: Task) -> Tensors:
    """Every tensor of the file, one layer at a time."""
    adapter = task.adapter
    bare = adapter.dialect == "diffusers" and not adapter.prefixed and len(task.components) == 1

    def work(layer: Layer) -> Tensors:
        name = layer.site.module if bare else str(layer.site)
        return layer.tensors(name, task.dtype, fold=True)[0]

    made = in_order(work, layers_of(task))
    return {key: tensor for part in made for key, tensor in part.items()}


WRITER = register(
    Writer(
        name="diffusers",
        read_by="single .safetensors with diffusers names (diffusers; ComfyUI for transformers)",
        refused=layers.refused,
        tensors=tensors,
        holds="weights of linear layers, convolutions and embedding tables; biases where every "
        "layer of the adapter has one",
        instead="kohya",
    )
)
