"""Writing ``.safetensors`` with the same bytes for the same content, always.

The safetensors library writes metadata in random order, so equal content gives different files.
Here the header is canonical: tensors in the library's own order (its dtypes from wide to narrow,
then names), metadata by key, padded with spaces to a multiple of 8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from regraft.errors import BadOption
from regraft.files.tensorfile import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: The safetensors library sorts dtypes so; sorting alike makes its files and ours the same bytes.
_ORDER = ["U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"]
_ORDER += ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"]


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise BadOption(f"safetensors files cannot hold {tensor.dtype}.", tensor=name)
    return sorted(
        tensors.items(), key=lambda item: (_ORDER.index(_NAMES[item[1].dtype]), item[0].encode())
    )


def _bytes(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")  # torch cannot view it as bytes
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the data part alone: kohya's ``sshs_model_hash``, civitai's AutoV3."""
    digest = hashlib.sha256()
    for _, tensor in _ordered(tensors):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def serialize(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write ``tensors`` to ``path`` and return the SHA-256 of the whole file.

    Not atomic by itself: call it inside :func:`regraft.files.atomic_file`.

    Raises
    ------
    BadOption
        A dtype that the format lacks, or a tensor called ``__metadata__``.
    """
    if "__metadata__" in tensors:
        raise BadOption("A tensor cannot be called __metadata__.", tensor="__metadata__")
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    ordered = _ordered(tensors)
    for name, tensor in ordered:
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as stream:
        for chunk in (len(raw).to_bytes(8, "little"), raw):
            stream.write(chunk)
            digest.update(chunk)
        for _, tensor in ordered:
            view = _bytes(tensor)
            stream.write(view)
            digest.update(view)
        stream.flush()
    return digest.hexdigest()
