"""Reading ``.gguf`` files: header now, one tensor's bytes on request.

Format (ggml's docs/gguf.md, versions 2 and 3, little-endian): magic, version, counts, key-value
pairs, tensor entries, padding, data. The gguf package's own reader maps the whole file and makes
an array of every vocabulary entry, so the header is parsed here; the sizes of the types are the
package's.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from regraft.errors import MissingDependency
from regraft.files.tensorfile import (
    MAX_DIMENSIONS,
    MAX_NAME,
    MAX_NUMEL,
    MAX_TENSORS,
    TensorFile,
    TensorInfo,
)

#: Types of key-value pairs → their struct code.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
_STRING, _ARRAY = 8, 9
#: Longer arrays are vocabularies, and are skipped.
_LONGEST_KEPT = 4_096
#: Tensor types that are plain numbers.
_PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}


class GGUFFile(TensorFile):
    """One GGUF file, opened lazily.

    Tensors of plain numbers have their own dtype and shape. Those of a quantised type have uint8
    and ``(*rows, bytes per row)``; their type is in ``kinds`` and their real shape in ``shapes``.

    Attributes
    ----------
    settings : dict
        The key-value pairs, without long arrays and arrays of text.
    kinds : dict of tensor name to type name
        Such as ``Q4_K``.
    shapes : dict of tensor name to shape
        Outermost dimension first, as torch has it.

    Raises
    ------
    InputNotFound, MalformedFile
    MissingDependency
        The gguf package is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.settings: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        super().__init__(path, trusted=True)

    def _bad(self, why: str, tensor: str | None = None) -> Any:
        error = super()._bad(why, tensor)
        return type(error)(
            f"Not a valid GGUF file: {why}.",
            file=self.path,
            tensor=tensor,
            fix="Download it again; files of GGUF version 1 have to be converted again.",
        )

    def _parse(self) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        size = self.path.stat().st_size
        with open(self.path, "rb") as stream:
            try:
                return {}, self._header(_Cursor(stream, size), size)
            except (_Short, UnicodeDecodeError) as error:
                raise self._bad(str(error) or "it ends inside its header") from error

    def _header(self, at: _Cursor, size: int) -> dict[str, TensorInfo]:
        if at.take(4) != b"GGUF":
            raise self._bad("it does not begin with GGUF")
        version = at.number("I")
        if version not in (2, 3):
            raise self._bad(f"its version is {version} (2 and 3 are read)")
        tensors, pairs = at.number("Q"), at.number("Q")
        if max(tensors, pairs) > MAX_TENSORS:
            raise self._bad(f"it lists {max(tensors, pairs)} entries (limit {MAX_TENSORS})")
        for _ in range(pairs):
            key = at.text()
            value = at.value(at.number("I"))
            if value is not None:
                self.settings[key] = value
        entries = [self._described(at) for _ in range(tensors)]
        align = self.settings.get("general.alignment", 32)
        if not isinstance(align, int) or not 1 <= align <= 1 << 20:
            raise self._bad("its alignment cannot be")
        data = -(-at.position // align) * align
        found: dict[str, TensorInfo] = {}
        for name, dtype, shape, offset in entries:
            if name in found:
                raise self._bad("it lists a tensor twice", name)
            end = data + offset + prod(shape) * dtype.itemsize
            if offset % align or end > size:
                raise self._bad("a tensor lies outside the file, or is not aligned", name)
            found[name] = TensorInfo(name, dtype, shape, data + offset, end)
        return found

    def _described(self, at: _Cursor) -> tuple[str, torch.dtype, tuple[int, ...], int]:
        name = at.text(MAX_NAME)
        count = at.number("I")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise self._bad("a tensor has no usable number of dimensions", name)
        shape = tuple(reversed([at.number("Q") for _ in range(count)]))
        kind, offset = at.number("I"), at.number("Q")
        if prod(max(n, 1) for n in shape) > MAX_NUMEL:
            raise self._bad("a shape is beyond any real tensor", name)
        self.shapes[name] = shape
        if kind in _PLAIN:
            self.kinds[name] = {torch.bfloat16: "BF16"}.get(
                _PLAIN[kind], f"{'F' if kind in (0, 1, 28) else 'I'}{_PLAIN[kind].itemsize * 8}"
            )
            return name, _PLAIN[kind], shape, offset
        types, sizes = _types()
        try:
            self.kinds[name] = types(kind).name
            numbers, length = sizes[types(kind)]
        except (ValueError, KeyError) as error:
            raise self._bad(
                f"a tensor is of type {kind}, which gguf does not know", name
            ) from error
        if shape[-1] % numbers:
            raise self._bad(f"a row is no multiple of {numbers} numbers", name)
        return name, torch.uint8, (*shape[:-1], shape[-1] // numbers * length), offset


def _types() -> tuple[Any, Any]:
    """gguf's enumeration of tensor types, and (numbers, bytes) of one block of each."""
    try:
        import gguf
    except ImportError as error:
        raise MissingDependency(
            "Reading a .gguf file needs gguf.", fix="pip install 'regraft[quantised]'"
        ) from error
    return gguf.GGMLQuantizationType, gguf.GGML_QUANT_SIZES


class _Short(Exception):
    """The header ends too early, or says what cannot be."""


class _Cursor:
    """A place in a header that moves on as it is read."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self.stream, self.size, self.position = stream, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise _Short("it ends inside its header")
        self.position += count
        return self.stream.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, longest: int | None = None) -> str:
        length = self.number("Q")
        if longest is not None and length > longest:
            raise _Short("a tensor's name is too long")
        return self.take(length).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A key's value; None for one that is not kept."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _Short(f"a key is of type {kind}, which is not known")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[inner]}")
            raw = self.take(count * width)
            return (
                list(struct.unpack(f"<{count}{_SCALARS[inner]}", raw))
                if count <= _LONGEST_KEPT
                else None
            )
        if inner != _STRING:
            raise _Short("an array holds what is not known")
        for _ in range(count):
            self.take(self.number("Q"))
        return None
