"""The writer: known bytes for known content, the same in every process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from regraft.errors import BadOption
from regraft.files import TensorFile, data_sha256, serialize
from regraft.files.tensorfile import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def test_the_exact_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor([[1.0]], dtype=torch.float16)}
    sha = serialize(path, tensors, {"z": "1", "format": "pt"})
    header = (
        b'{"__metadata__":{"format":"pt","z":"1"},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F16","shape":[1,1],"data_offsets":[8,10]}}'
    )
    header += b" " * (-len(header) % 8)
    data = b"\x00\x00\x80\x3f\x00\x00\x00\xc0" + b"\x00\x3c"
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + data
    assert sha == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data_sha256(tensors) == hashlib.sha256(data).hexdigest()


def test_a_file_of_nothing(tmp_path):
    serialize(tmp_path / "a.safetensors", {}, {})
    assert (tmp_path / "a.safetensors").read_bytes() == b"\x08" + b"\0" * 7 + b"{}      "
    assert len(TensorFile(tmp_path / "a.safetensors")) == 0


def test_the_same_bytes_as_the_safetensors_library(tmp_path):
    tensors = {f"{i}.{n}": torch.ones(3, 2).to(d) for i, (n, d) in enumerate(DTYPES.items())}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "turned": torch.eye(3).T}
    meta = {"one": 'é "quoted"\n\\ \x01'}
    serialize(tmp_path / "ours", tensors, meta)
    tensors["turned"] = tensors["turned"].contiguous()
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(tensors, meta)


PROGRAM = """
import sys, torch
from pathlib import Path
from regraft.files import serialize
tensors = {n: torch.arange(6.0).reshape(2, 3) * i for i, n in enumerate({"c", "a", "b", "d"})}
tensors = {n: torch.full((2, 3), float(ord(n))) for n in tensors}
print(serialize(Path(sys.argv[1]), tensors, {k: k for k in {"u", "v", "w", "x", "y"}}))
"""


def test_every_process_writes_the_same_bytes(tmp_path):
    # Sets of strings iterate in another order in each of these processes.
    shas = set()
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / seed)],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        shas.add(run.stdout.strip())
    assert len(shas) == 1
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
arrays = st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]).flatmap(
    lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@settings(deadline=None, max_examples=40)
@given(
    tensors=st.dictionaries(text.filter(lambda n: n != "__metadata__"), arrays, max_size=4),
    metadata=st.dictionaries(text, text, max_size=4),
)
def test_what_is_written_is_read(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    ours = {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}
    serialize(path, ours, metadata)
    file = TensorFile(path)
    assert file.metadata == metadata
    assert set(file) == set(ours)
    with safe_open(path, "pt") as theirs:
        assert (theirs.metadata() or {}) == metadata
        for name, tensor in ours.items():
            for found in (file.read(name), theirs.get_tensor(name)):
                assert found.dtype == tensor.dtype
                assert found.shape == tensor.shape
                assert found.numpy().tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_reads_back(tmp_path, dtype):
    tensor = torch.tensor([[0, 1], [1, 0], [1, 1]]).to(dtype)
    serialize(tmp_path / "a", {"x": tensor}, {})
    file = TensorFile(tmp_path / "a")
    assert file["x"].dtype == dtype
    assert file.read("x").view(torch.uint8).equal(tensor.view(torch.uint8))
    assert file.read("x", rows=1).shape == (1, 2)


def test_what_the_format_cannot_hold(tmp_path):
    with pytest.raises(BadOption, match="complex64"):
        serialize(tmp_path / "a", {"x": torch.zeros(2, dtype=torch.complex64)}, {})
    with pytest.raises(BadOption, match="__metadata__"):
        serialize(tmp_path / "a", {"__metadata__": torch.zeros(2)}, {})


def test_a_range_of_rows_reads_as_a_tensor_of_its_own(tmp_path: Path):
    whole = torch.arange(24.0).reshape(6, 4)
    serialize(tmp_path / "a", {"qkv": whole}, {})
    file = TensorFile(tmp_path / "a")
    name = file.rows_of("qkv", 2, 4)
    assert file[name].shape == (2, 4)
    assert file.read(name).equal(whole[2:4])
    assert list(file) == ["qkv"]
