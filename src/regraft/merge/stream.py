"""One checkpoint file with some of its tensors changed: the rest is copied byte for byte.

Names, their order, the order of the data and the metadata stay. Tensors are written as they are
ready; a few more than there are workers are in memory at any time.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from regraft.errors import MalformedFile
from regraft.files import TensorFile, TensorInfo
from regraft.files.tensorfile import DTYPES
from regraft.merge.added import Measured, Part, added, cast
from regraft.parallel import WORKERS

T = TypeVar("T")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 23
#: Metadata that hold a hash of the file or of its data, which would be false.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")

#: Tensor name → the sites in it that change.
Changes = Mapping[str, tuple[Part, ...]]


def size_of(file: TensorFile, dtype: torch.dtype | None) -> int:
    """Bytes of the tensors of the file that :func:`rewrite` makes."""
    return sum(prod(i.shape) * _stored(i, dtype).itemsize for i in file.values())


def rewrite(
    file: TensorFile,
    out: Path,
    changes: Changes,
    *,
    replaced: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    metadata: Callable[[], Mapping[str, str]] | None = None,
    draft: Mapping[str, str] | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> list[Measured]:
    """Write ``file`` to ``out`` with the changes made.

    Parameters
    ----------
    file : TensorFile
    out : Path
        Written in place: call it inside :func:`regraft.files.atomic_file` or ``atomic_folder``.
    changes : mapping of str to tuple of Part
    replaced : mapping of str to Tensor, optional
        What is stored instead under these names, in any dtype and shape.
    dtype : torch.dtype, optional
        Of every floating-point tensor; default each as it is.
    metadata, draft : optional
        ``metadata`` is called when all tensors are written, and gives the file's metadata;
        ``draft`` is text of the same length that keeps their place. Default the file's own. Hashes
        of the data among them are left out.
    done : function
        Called with the number of sites finished so far.

    Returns
    -------
    list of Measured
        Of every site, in file order.

    Raises
    ------
    MalformedFile
        The file became shorter while it was read.
    NonFiniteTensor, OutputFailed
        As :func:`regraft.merge.added.added`.
    """
    forms = {info.name: (_stored(info, dtype), info.shape) for info in file.values()}
    forms |= {name: (new.dtype, tuple(new.shape)) for name, new in (replaced or {}).items()}
    infos = sorted(file.values(), key=lambda info: info.start)
    if any(forms[info.name][0] != info.dtype for info in infos):  # wide ones first: all aligned
        infos.sort(key=lambda info: -forms[info.name][0].itemsize)
    order = [info.name for info in infos]
    head = _header(file, order, forms, draft if metadata else file.metadata)
    found: list[Measured] = []

    def work(info: TensorInfo) -> tuple[Tensor, list[Measured]]:
        if replaced and info.name in replaced:
            return replaced[info.name], []
        if info.name in changes:
            return added(file, info.name, changes[info.name], dtype)
        return cast(file.read(info.name), dtype, file, info.name), []

    def same(info: TensorInfo) -> bool:
        new = info.name in changes or (replaced is not None and info.name in replaced)
        return not new and _stored(info, dtype) == info.dtype

    with open(file.path, "rb") as source, open(out, "wb") as stream:
        stream.write(head)
        results = _ahead(work, [info for info in infos if not same(info)])
        for info in infos:
            if same(info):
                _copy(source, stream, info, file)
                continue
            tensor, measured = next(results)
            stream.write(_bytes(tensor))
            found += measured
            done(len(found))
        if metadata is not None:
            final = _header(file, order, forms, metadata())
            assert len(final) == len(head)
            stream.seek(0)
            stream.write(final)
    return found


def _stored(info: TensorInfo, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and info.dtype.is_floating_point else info.dtype


def _header(
    file: TensorFile,
    order: Sequence[str],
    forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None,
) -> bytes:
    """Length and header: names in the file's order, data in ``order``."""
    places: dict[str, object] = {}
    position = 0
    for name in order:
        dtype, shape = forms[name]
        size = prod(shape) * dtype.itemsize
        places[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    said = {k: v for k, v in (metadata or {}).items() if k not in _HASHES}
    header: dict[str, object] = {"__metadata__": said} if said else {}
    header |= {name: places[name] for name in file}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _bytes(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _copy(source: BinaryIO, stream: BinaryIO, info: TensorInfo, file: TensorFile) -> None:
    source.seek(info.start)
    left = info.end - info.start
    while left:
        chunk = source.read(min(left, _CHUNK))
        if not chunk:
            raise MalformedFile(
                "The file became shorter while it was read.", file=file.path, tensor=info.name
            )
        stream.write(chunk)
        left -= len(chunk)


def _ahead(work: Callable[[TensorInfo], T], items: Sequence[TensorInfo]) -> Iterator[T]:
    """``work`` of each item, in order, by all workers, but never far ahead of the reader."""
    pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
