"""Reading ``.safetensors`` files: every check before any allocation, one tensor at a time.

Format: 8 bytes little-endian header length, JSON header, then the raw data. The header is parsed
here (duplicate keys, holes, overlaps, sizes), then the safetensors library must agree.
Data are read with plain reads, not through a memory map: mapped pages count as resident memory,
and a 5 GB base would look like (and on small machines, be) 5 GB of memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regraft.errors import InputNotFound, MalformedFile, NonFiniteTensor, PickleRefused
from regraft.files.finite import is_finite

#: Limits: the first is the safetensors crate's own, the others are far above any real file.
MAX_HEADER = 100_000_000
MAX_TENSORS = 1_000_000
MAX_NAME = 1_024
MAX_DIMENSIONS = 16
_WANTED = "Give a .safetensors file, or a PEFT folder."
_DOWNLOAD = "Its download failed, perhaps for want of a login: download it again."
#: What is often taken for one, by its first bytes.
_OTHERS = {
    b"\x89PNG": ("a PNG picture", _WANTED),
    b"\xff\xd8\xff": ("a JPEG picture", _WANTED),
    b"<!DOCTYP": ("a web page", _DOWNLOAD),
    b"<!doctyp": ("a web page", _DOWNLOAD),
    b"<html": ("a web page", _DOWNLOAD),
    b"version ": ("a Git LFS pointer", "Fetch it with `git lfs pull`."),
}
MAX_NUMEL = 1 << 60

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}

PICKLE_ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. ``start`` and ``end`` are byte offsets in the whole file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def refuse_pickle(path: Path) -> None:
    """Raise :class:`PickleRefused` for a pickled file."""
    raise PickleRefused(
        "This is a pickled checkpoint; opening one can run code hidden in it.",
        file=path,
        fix="Ask its author for a .safetensors file. If you trust it, pass --allow-pickle "
        "(its name must end in .pt, .pth, .bin, .pkl or .ckpt).",
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key[:80]!r}")
        found[key] = value
    return found


class TensorFile(Mapping[str, TensorInfo]):
    """One safetensors file, opened lazily: names and shapes now, data on request.

    Parameters
    ----------
    path : Path
        The file.
    trusted : bool
        Skip the second opinion of the safetensors library (for files this program wrote).

    Raises
    ------
    InputNotFound, PickleRefused, MalformedFile
    """

    def __init__(self, path: str | os.PathLike[str], *, trusted: bool = False) -> None:
        self.path = Path(path)
        self._parts: dict[str, TensorInfo] = {}
        if not self.path.is_file():
            raise InputNotFound("No such file.", file=self.path, fix="Check the path.")
        try:
            self.metadata, self._tensors = self._parse()
        except OSError as error:
            raise self._unreadable(error) from error
        if not trusted:
            try:
                # "np" maps the file read-only; "pt" asks the system to set its whole size aside,
                # which fails for checkpoints larger than memory.
                with safe_open(str(self.path), framework="np"):
                    pass
            except (SafetensorError, OSError) as error:
                raise self._bad(str(error)) from error

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name] if name in self._tensors else self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _bad(self, why: str, tensor: str | None = None) -> MalformedFile:
        return MalformedFile(
            f"Not a valid safetensors file: {why}.",
            file=self.path,
            tensor=tensor,
            fix="Download it again, or save it again with the safetensors library.",
        )

    def _unreadable(self, error: OSError) -> InputNotFound:
        return InputNotFound(
            f"The file cannot be read: {error.strerror or error}.",
            file=self.path,
            fix="Check its permissions and the disk.",
        )

    def _parse(self) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        size = self.path.stat().st_size
        with open(self.path, "rb") as stream:
            head, after = stream.read(8), stream.read(1)
            zipped = head[:4] == b"PK\x03\x04"
            pickled = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
            # Those bytes could also be a header's length, but then a "{" follows them.
            if (zipped or pickled) and after != b"{":
                refuse_pickle(self.path)
            if len(head) < 8:
                raise self._bad("it is shorter than 8 bytes")
            length = int.from_bytes(head, "little")
            for start, (what, fix) in _OTHERS.items():
                if head.startswith(start) and after != b"{":
                    raise MalformedFile(
                        f"Not a valid safetensors file: it is {what}.", file=self.path, fix=fix
                    )
            if length > MAX_HEADER:
                raise self._bad(f"its header claims {length} bytes (limit {MAX_HEADER})")
            if length > size - 8:
                raise self._bad(f"its header claims {length} bytes, the file has {size - 8}")
            stream.seek(8)
            raw = stream.read(length)
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0][:200]
            if raw.endswith(b"\0"):  # some writers do; the library refuses it as well
                reason = "padded with NUL, where the format wants spaces"
            raise self._bad(f"its header is not clean JSON ({reason})") from error
        if not isinstance(header, dict):
            raise self._bad("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._bad("its metadata are not all text")
        if len(header) > MAX_TENSORS:
            raise self._bad(f"it lists {len(header)} tensors (limit {MAX_TENSORS})")
        data = 8 + length
        tensors = {name: self._entry(name, entry, data) for name, entry in header.items()}
        position = data
        for info in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
            if info.start != position:
                kind = "overlap" if info.start < position else "leave a hole"
                raise self._bad(f"its tensors {kind} at byte {info.start}", info.name)
            position = info.end
        if position != size:
            raise self._bad(f"it should end at byte {position} but has {size}")
        return metadata, tensors

    def _entry(self, name: str, entry: Any, data: int) -> TensorInfo:
        if len(name) > MAX_NAME:
            raise self._bad("a tensor's name is too long", name[:80])
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._bad("a header entry lacks dtype, shape or data_offsets", name)
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise self._bad(f"dtype {str(entry['dtype'])[:20]!r} is not known", name)
        dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]

        def natural(value: object) -> bool:
            return type(value) is int and value >= 0

        if not isinstance(shape, list) or not all(natural(n) for n in shape):
            raise self._bad("a shape is not a list of sizes", name)
        if len(shape) > MAX_DIMENSIONS or prod(max(n, 1) for n in shape) > MAX_NUMEL:
            raise self._bad("a shape is beyond any real tensor", name)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(natural, offsets)):
            raise self._bad("data_offsets are not two positions", name)
        start, end = offsets
        if end - start != prod(shape) * dtype.itemsize:
            raise self._bad("a tensor's bytes do not fit its shape", name)
        return TensorInfo(name, dtype, tuple(shape), data + start, data + end)

    def rows_of(self, name: str, first: int, last: int) -> str:
        """A name under which rows ``first`` to ``last`` of a tensor can be read as one of its own.

        It is not listed among the file's tensors; fused weights need it.
        """
        info = self._tensors[name]
        row = prod(info.shape[1:]) * info.dtype.itemsize
        alias = f"{name}[{first}:{last}]"
        self._parts[alias] = TensorInfo(
            alias,
            info.dtype,
            (last - first, *info.shape[1:]),
            info.start + first * row,
            info.start + last * row,
        )
        return alias

    def read_bytes(self, name: str, length: int | None = None) -> bytearray:
        """The tensor's raw bytes, or the first ``length`` of them."""
        info = self[name]
        buffer = bytearray(info.end - info.start if length is None else length)
        self._read_into(memoryview(buffer), name)
        return buffer

    def _read_into(self, view: memoryview, name: str) -> None:
        """Fill ``view`` from the start of the tensor's data."""
        done = 0
        try:
            with open(self.path, "rb", buffering=0) as stream:
                stream.seek(self[name].start)
                while done < len(view):
                    count = stream.readinto(view[done:])
                    if not count:
                        raise self._bad("it became shorter while being read", name)
                    done += count
        except OSError as error:
            raise self._unreadable(error) from error

    def read(self, name: str, *, rows: int | None = None, finite: bool = False) -> Tensor:
        """Read one tensor, or its first ``rows`` rows, in its stored dtype.

        Raises
        ------
        NonFiniteTensor
            ``finite`` is true and the tensor holds NaN or infinity.
        """
        info = self[name]
        shape = info.shape if rows is None else (rows, *info.shape[1:])
        raw = torch.empty(prod(shape) * info.dtype.itemsize, dtype=torch.uint8)
        if raw.numel():
            self._read_into(raw.numpy().data, name)
        tensor = raw.view(info.dtype).reshape(shape)
        if finite and not is_finite(tensor):
            raise NonFiniteTensor(
                "A tensor holds NaN or infinity.",
                file=self.path,
                tensor=name,
                fix="The file is damaged or its training diverged; use an earlier checkpoint.",
            )
        return tensor
