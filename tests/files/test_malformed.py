"""Every way a file can be broken ends in one clear error, never in a traceback."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import zipfile

import pytest
import torch

from regraft.errors import (
    InputNotFound,
    MalformedFile,
    NonFiniteTensor,
    PickleRefused,
    RegraftError,
)
from regraft.files import TensorFile, locate, serialize


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FOUR = b"\0" * 4
BROKEN = {
    "empty": (b"", "shorter than 8"),
    "seven bytes": (b"\x08" + b"\0" * 6, "shorter than 8"),
    "header beyond the file": (raw({}, length=1000), "claims 1000"),
    "header beyond the limit": (raw({}, length=100_000_001), "limit"),
    "header of u64 max": (b"\xff" * 8 + b"{}", "limit"),
    "truncated data": (raw({"a": entry()}, b"\0\0"), "end at byte"),
    "data left over": (raw({"a": entry()}, FOUR + b"x"), "end at byte"),
    "wrong shape": (raw({"a": entry(shape=(2,))}, FOUR), "do not fit its shape"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(2, 6))}, b"\0" * 6), "overlap"),
    "twice the same bytes": (raw({"a": entry(), "b": entry()}, FOUR), "overlap"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(8, 12))}, b"\0" * 12), "hole"),
    "hole at the start": (raw({"a": entry(offsets=(4, 8))}, b"\0" * 8), "hole"),
    "duplicate key": (
        raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), FOUR),
        "duplicate key",
    ),
    "duplicate metadata": (raw(b'{"__metadata__":{"k":"1","k":"2"}}'), "duplicate key"),
    "unknown dtype": (raw({"a": entry(dtype="F31")}, FOUR), "F31"),
    "dtype is a list": (raw({"a": entry(dtype=["F32"])}, FOUR), "not known"),
    "metadata not text": (raw({"__metadata__": {"k": 1}}), "not all text"),
    "metadata not an object": (raw({"__metadata__": "k"}), "not all text"),
    "NUL padding": (raw(b"{}\0\0\0\0\0\0"), "not clean JSON"),
    "bad UTF-8": (raw(b'{"\xff":1}'), "not clean JSON"),
    "lone surrogate": (raw(b'{"__metadata__":{"k":"\\ud800"}}'), "safetensors"),
    "deep nesting": (raw(b"[" * 200_000 + b"]" * 200_000), "not clean JSON"),
    "not an object": (raw(b"[1, 2]"), "not a JSON object"),
    "negative size": (raw({"a": entry(shape=(-1,))}, FOUR), "list of sizes"),
    "negative offset": (raw({"a": entry(offsets=(-4, 0))}, FOUR), "two positions"),
    "offsets turned": (raw({"a": entry(offsets=(4, 0))}, FOUR), "do not fit"),
    "bool as size": (raw({"a": entry(shape=(True,))}, FOUR), "list of sizes"),
    "float as size": (raw({"a": entry(shape=(1.0,))}, FOUR), "list of sizes"),
    "NaN as size": (raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "sizes"),
    "three offsets": (raw({"a": entry(offsets=(0, 2, 4))}, FOUR), "two positions"),
    "entry lacks a field": (raw({"a": {"dtype": "F32", "shape": [1]}}, FOUR), "lacks"),
    "entry is a number": (raw({"a": 1}), "lacks"),
    "name too long": (raw({"n" * 2000: entry()}, FOUR), "name is too long"),
    "a thousand dimensions": (raw({"a": entry(shape=(1,) * 1000)}, FOUR), "beyond any real"),
    "a shape that overflows": (
        raw({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}),
        "beyond any real",
    ),
    "number of 5000 digits": (raw(b'{"a":' + b"9" * 5000 + b"}"), "not clean JSON"),
    "HTML": (b"<!DOCTYPE html><html><body>404 not found</body></html>", "a web page"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(32), "a PNG picture"),
    "JPEG": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(32), "a JPEG picture"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
        "a Git LFS pointer",
    ),
}


@pytest.mark.parametrize(("content", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(tmp_path, content, says):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(MalformedFile, match="Not a valid safetensors file") as caught:
        TensorFile(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.fix
    assert caught.value.exit_code == 2


def test_a_header_of_100_mb_is_not_believed_before_it_is_there(tmp_path):
    # A sparse file: its size is right, its header is zeros.
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as stream:
        stream.write((90_000).to_bytes(8, "little"))
        stream.truncate(100_000)
    with pytest.raises(MalformedFile, match="JSON"):
        TensorFile(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_disguised_pickle(tmp_path, protocol):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"a": [1.0] * 100}, protocol=protocol))
    with pytest.raises(PickleRefused, match="run code") as caught:
        TensorFile(path)
    assert "safetensors" in caught.value.fix


def test_a_disguised_torch_checkpoint(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(PickleRefused):
        TensorFile(tmp_path / "model.safetensors")


def test_a_disguised_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    with pytest.raises(PickleRefused):
        TensorFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin", ".pkl", ".CKPT"])
def test_pickled_checkpoints_are_refused_by_name(tmp_path, ending):
    path = tmp_path / f"model{ending}"
    path.write_bytes(b"anything")
    with pytest.raises(PickleRefused, match="run code"):
        locate(path)


def test_a_header_that_begins_like_a_pickle_is_still_read(tmp_path):
    # 0x0280 bytes of header: the first two bytes are a pickle's.
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw(b"{}" + b" " * (0x0280 - 2)))
    assert len(TensorFile(path)) == 0


def test_no_such_file(tmp_path):
    with pytest.raises(InputNotFound):
        TensorFile(tmp_path / "none.safetensors")
    with pytest.raises(InputNotFound):
        TensorFile(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_found_when_asked(tmp_path, value, dtype):
    serialize(tmp_path / "a", {"x": torch.tensor([1.0, value], dtype=dtype)}, {})
    file = TensorFile(tmp_path / "a")
    file.read("x")
    with pytest.raises(NonFiniteTensor) as caught:
        file.read("x", finite=True)
    assert caught.value.tensor == "x"


def test_large_doubles_are_finite(tmp_path):
    serialize(tmp_path / "a", {"x": torch.tensor([1e300], dtype=torch.float64)}, {})
    assert TensorFile(tmp_path / "a").read("x", finite=True).item() == 1e300


def test_nan_in_fp8(tmp_path):
    serialize(tmp_path / "a", {"x": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}, {})
    with pytest.raises(NonFiniteTensor):
        TensorFile(tmp_path / "a").read("x", finite=True)


def test_a_file_that_shrinks_while_open(tmp_path):
    path = tmp_path / "a.safetensors"
    serialize(path, {"x": torch.ones(100)}, {})
    file = TensorFile(path)
    with open(path, "r+b") as stream:
        stream.truncate(200)
    with pytest.raises(MalformedFile, match="shorter"):
        file.read("x")
    path.unlink()
    with pytest.raises(InputNotFound, match="cannot be read"):
        file.read("x")


def test_mutated_bytes_never_escape_as_another_exception(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a.lora_A.weight": torch.ones(2, 3), "b": torch.ones(4).half()}
    serialize(path, tensors, {"format": "pt", "k": "v"})
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    refused = 0
    for _ in range(500):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            where = rng.randrange(end) if rng.random() < 0.9 else rng.randrange(len(bad))
            kind = rng.randrange(4)
            if kind == 0:
                bad[where] = rng.randrange(256)
            elif kind == 1:
                bad[where] ^= 1 << rng.randrange(8)
            elif kind == 2:
                del bad[where]
            else:
                bad.insert(where, rng.choice(b'0123456789{}[]",:-e. \0\xff'))
        path.write_bytes(bad)
        with contextlib.suppress(RegraftError):
            refused += 1
            file = TensorFile(path)
            for name in file:
                file.read(name, finite=True)
            refused -= 1
    assert refused > 400
