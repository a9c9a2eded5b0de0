"""From the tensors of a checkpoint's files to the parameters of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from regraft.adapters import Site
from regraft.bases.base import Weight
from regraft.bases.quantised.recognise import recognise
from regraft.bases.quantised.refused import refuse
from regraft.errors import MalformedFile, NotABase
from regraft.files import TensorFile
from regraft.files.gguffile import GGUFFile

#: Site without a component, named as the file names it → its weight.
Parameters = dict[Site, Weight]

_ADAPTER_MARKS = (
    ".lora_",
    "lora.up.",
    "lora.down.",
    "lora_unet_",
    "lora_te",
    "lycoris_",
    ".hada_",
    ".lokr_",
    ".dora_scale",
)


def tensors_of(files: Iterable[Path]) -> dict[str, TensorFile]:
    """tensor name → the file that holds it.

    Raises
    ------
    MalformedFile
        Two shards hold the same tensor.
    NotABase
        It is an adapter, or quantised in a format that is not read.
    """
    found: dict[str, TensorFile] = {}
    for path in files:
        file = GGUFFile(path) if path.suffix.lower() == ".gguf" else TensorFile(path)
        for tensor in file:
            if tensor in found:
                raise MalformedFile(
                    f"The tensor is in {found[tensor].path.name} as well.", file=path, tensor=tensor
                )
            found[tensor] = file
    refuse(found)  # before the next: nunchaku's files hold factors called lora_down
    for tensor, file in found.items():
        dotted = f".{tensor}"
        if any(mark in dotted for mark in _ADAPTER_MARKS):
            raise NotABase(
                "This is an adapter, not a base model.",
                file=file.path,
                tensor=tensor,
                fix="--from, --to and --base take the models; the adapter is the first argument.",
            )
    return found


def parameters(tensors: Mapping[str, TensorFile], inside: str = "") -> Parameters:
    """Every parameter under ``inside``, under the file's own names (llama.cpp's: transformers').

    A quantised weight is one parameter: its scales and whatever else it is stored with are not.

    Raises
    ------
    MalformedFile
        The parts of a quantised weight are missing or do not fit each other.
    NotABase
        It is quantised in a format that is not read.
    """
    here = {t: f for t, f in tensors.items() if t.startswith(inside)} if inside else tensors
    recognised = recognise(here)
    found: Parameters = {}
    for tensor, file in here.items():
        packed, info = recognised.weights.get(tensor), file[tensor]
        name, shape = (tensor, info.shape) if packed is None else (packed.name, packed.shape)
        module, _, parameter = name.removeprefix(inside).rpartition(".")
        site = Site("", module, parameter)
        if packed is not None:
            native = tensor.rpartition(".")[0] if isinstance(file, GGUFFile) else module
            storage = None if packed.plain else packed
            found[site] = Weight(site, shape, packed.dtype, file, tensor, native, quantised=storage)
        elif isinstance(file, GGUFFile):
            continue  # what llama.cpp computes once and stores, such as rotary factors
        elif tensor not in recognised.mates and info.dtype.is_floating_point and shape:
            found[site] = Weight(site, shape, info.dtype, file, tensor, module)
    return found
