"""Writing ``.safetensors`` with the same bytes for the same content, always.

The safetensors library writes metadata in random order, so equal content gives different files.
Here the header is canonical: tensors in the library's own order (its dtypes from wide to narrow,
then names), metadata by key, padded with spaces to a multiple of 8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from regraft.errors import BadOption
from regraft.files.tensorfile import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: The safetensors library sorts dtypes so; sorting alike makes its files and ours the same bytes.
_ORDER = ["U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"]
_ORDER += ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"]
_RANK = {dtype: _ORDER.index(name) for dtype, name in _NAMES.items()}


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise BadOption(f"safetensors files cannot hold {tensor.dtype}.", tensor=name)
    return sorted(tensors.items(), key=lambda item: (_RANK[item[1].dtype], item[0].encode()))


def _bytes(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")  # torch cannot view it as bytes
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _digest(head: bytes, ordered: list[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(head)
    for _, tensor in ordered:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the data part alone: kohya's ``sshs_model_hash``, civitai's AutoV3."""
    return _digest(b"", _ordered(tensors))


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
    head = len(raw).to_bytes(8, "little") + raw
    # Hashing takes about as long as writing, and both leave Python alone.
    with ThreadPoolExecutor(1) as pool, open(path, "wb") as stream:
        sha = pool.submit(_digest, head, ordered)
        stream.write(head)
        for _, tensor in ordered:
            stream.write(_bytes(tensor))
        stream.flush()
        return sha.result()
