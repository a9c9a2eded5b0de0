"""Formats that are recognised but not read, by the names of their tensors."""

from __future__ import annotations

import torch

from regraft.bases.quantised.packed import Names, files, method
from regraft.bases.quantised.scaled import format_in
from regraft.errors import NotABase
from regraft.files import TensorFile

#: Ends of names that only this format has → what users call it.
_ENDS = {
    ".wscales": "nunchaku (SVDQuant)",
    ".smooth_factor_orig": "nunchaku (SVDQuant)",
    ".svd_up": "SDNQ with SVD",
    ".W_q": "HQQ",
    ".q_invperm": "EXL2",
    ".q_group_size": "EXL2",
    ".trellis": "EXL3",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP#",
    ".centroids.weight": "VPTQ",
    ".weight_scales": "EETQ",
    ".tables2": "HIGGS",
    "_blocks": "MXFP4",
    ".weight_global_scale": "NVFP4",
    ".weight_scale_2": "NVFP4",
}
#: ``quant_method`` in the config → what users call it, where names alone are not enough.
_METHODS = {
    "sdnq": "SDNQ",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "quip": "QuIP#",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "bitnet": "BitNet",
    "mxfp4": "MXFP4",
    "exl2": "EXL2",
    "exl3": "EXL3",
}
_COMFY = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "")


def refuse(tensors: Names) -> None:
    """Refuse a checkpoint in a format that is not read.

    Raises
    ------
    NotABase
    """
    for tensor, file in tensors.items():
        for end, form in _ENDS.items():
            mate = tensor.removesuffix(end) + "_scales"
            if tensor.endswith(end) and (end != "_blocks" or mate in tensors):
                raise _not_read(form, file, tensor)
        if tensor.endswith(".comfy_quant") and (form := format_in(file, tensor)) not in _COMFY:
            raise _not_read(f"ComfyUI's {form[:40]!r}", file, tensor)
        if tensor.endswith(".biases") and f"{tensor.removesuffix('.biases')}.scales" in tensors:
            raise _not_read("MLX", file, tensor)
    for file in files(tensors):
        form = _METHODS.get(str(method(file).get("quant_method", "")).lower(), "")
        first = next((t for t, f in tensors.items() if f is file and _is_code(f, t)), None)
        if form and first:
            raise _not_read(form, file, first)


def _is_code(file: TensorFile, tensor: str) -> bool:
    info = file[tensor]
    return len(info.shape) >= 2 and not info.dtype.is_floating_point and info.dtype != torch.bool


def refuse_unknown(file: TensorFile, tensor: str) -> None:
    """Refuse a checkpoint with a matrix of integers that no format has claimed."""
    raise _not_read("", file, tensor)


def _not_read(form: str, file: TensorFile, tensor: str) -> NotABase:
    return NotABase(
        f"This checkpoint is quantised ({form}), and that format is not read."
        if form
        else "This checkpoint is quantised in a format that is not known.",
        file=file.path,
        tensor=tensor,
        fix="Give the 16-bit or 32-bit checkpoint it was made from.",
    )
