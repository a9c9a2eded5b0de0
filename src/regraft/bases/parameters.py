"""From the tensors of a checkpoint's files to the parameters of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from regraft.adapters import Site
from regraft.bases.base import Weight
from regraft.errors import MalformedFile, NotABase
from regraft.files import TensorFile

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
#: Tensors beside a weight that mean: the weight alone is not the number it stands for.
_QUANTISED_MARKS = (
    ".absmax",
    ".quant_map",
    ".SCB",
    ".qweight",
    ".weight_scale",
    ".scale_weight",
    ".weight_scale_inv",
    ".weight_packed",
)


def tensors_of(files: Iterable[Path]) -> dict[str, TensorFile]:
    """tensor name → the file that holds it.

    Raises
    ------
    MalformedFile
        Two shards hold the same tensor.
    NotABase
        It is an adapter, or quantised.
    """
    found: dict[str, TensorFile] = {}
    for path in files:
        file = TensorFile(path)
        for tensor, info in file.items():
            if tensor in found:
                raise MalformedFile(
                    f"The tensor is in {found[tensor].path.name} as well.", file=path, tensor=tensor
                )
            found[tensor] = file
            dotted = f".{tensor}"
            if any(mark in dotted for mark in _ADAPTER_MARKS):
                raise NotABase(
                    "This is an adapter, not a base model.",
                    file=path,
                    tensor=tensor,
                    fix="--from and --to take the models; the adapter is the first argument.",
                )
            whole = tensor.endswith(".weight") and len(info.shape) >= 2
            if (whole and not info.dtype.is_floating_point) or any(
                mark in tensor for mark in _QUANTISED_MARKS
            ):
                raise NotABase(
                    "This checkpoint is quantised; quantised bases are not read yet.",
                    file=path,
                    tensor=tensor,
                    fix="Give the 16-bit or 32-bit checkpoint it was made from.",
                )
    return found


def parameters(tensors: Mapping[str, TensorFile], inside: str = "") -> Parameters:
    """Every floating-point parameter under ``inside``, under the file's own names."""
    found: Parameters = {}
    for tensor, file in tensors.items():
        info = file[tensor]
        if not tensor.startswith(inside) or not info.dtype.is_floating_point or not info.shape:
            continue
        module, _, parameter = tensor.removeprefix(inside).rpartition(".")
        site = Site("", module, parameter)
        found[site] = Weight(site, info.shape, info.dtype, file, tensor, module)
    return found
