"""Pickles: refused unless asked for, and then nothing of them runs and only tensors come out."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch

from regraft.bases import open_base
from regraft.dialects import inspect_file, load_adapter
from regraft.errors import MalformedFile, MissingDependency, PickleRefused
from regraft.files import TensorFile, allow_pickles, locate, pickle_child, pickle_gate
from regraft.files.pickle_gate import original, unpickled
from tests.factories import llama
from tests.methods.worlds import SHAPES, make_base


class Payload:
    """What a hostile pickle does: calls ``function`` with ``arguments`` when it is loaded."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile(canary):
    touch = f"touch {canary}"
    return {
        "os.system": {"a": Payload(os.system, touch)},
        "subprocess": {"a": torch.ones(2), "b": Payload(subprocess.call, ["touch", str(canary)])},
        "eval": {"a": Payload(eval, f"open({str(canary)!r}, 'w')")},
        "in a list in a dict": {"state_dict": {"a": [torch.ones(2), Payload(os.system, touch)]}},
        "a reduce in a reduce": {"a": Payload(print, Payload(os.system, touch))},
        "torch.load again": {"a": Payload(torch.load, str(canary))},
        "getattr": {"a": Payload(getattr, "x", "format")},
        "a class's set state": {"a": Payload(zipfile.ZipFile, str(canary), "w")},
    }


@pytest.mark.parametrize("kind", hostile("x"))
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_hostile_pickle_runs_nothing(kind, form, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    value = hostile(canary)[kind]
    if form == "plain":
        path.write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises((pickle_child.Refused, pickle_child.Malformed)):
        pickle_child.load(str(path))
    assert not canary.exists()


def test_the_whole_way_around_a_hostile_pickle(tmp_path):
    canary = tmp_path / "canary"
    torch.save(hostile(canary)["os.system"], tmp_path / "a.pt")
    with allow_pickles() as gate, pytest.raises(PickleRefused, match=r"asks for more.*system"):
        locate(tmp_path / "a.pt")
    assert not canary.exists()
    assert not gate.folder.exists()


@pytest.mark.parametrize(
    "deed",
    [
        "os.system('touch canary')",
        "__import__('subprocess').run(['touch', 'canary'])",
        "os.fork()",
        "open('canary', 'w')",
        "os.remove('kept')",
        "__import__('socket').socket()",
        "__import__('ctypes').CDLL(None)",
    ],
)
def test_the_guard_ends_the_process(deed, tmp_path):
    (tmp_path / "kept").touch()
    folder = os.path.dirname(pickle_child.__file__)
    code = (
        f"import os, sys; sys.path.insert(0, {folder!r}); import pickle_child\n"
        f"pickle_child._guard('out'); open('out', 'w').close()\n{deed}\nprint('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == pickle_child.CAUGHT
    assert done.stdout == b""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "out"]


NO_TENSORS = {
    "a list": [torch.ones(2)],
    "numbers": {"a": 1},
    "inside itself": None,
    "a name that is no text": {1: torch.ones(2)},
    "empty": {},
}


@pytest.mark.parametrize("kind", NO_TENSORS)
def test_what_holds_no_named_tensors(kind):
    value = NO_TENSORS[kind]
    if value is None:
        value = {}
        value["state_dict"] = value
    with pytest.raises(pickle_child.Malformed):
        pickle_child.tensors_of(value)


def test_where_the_tensors_of_a_training_checkpoint_are():
    inner = {"a": torch.ones(2), "steps": 3}
    found, left = pickle_child.tensors_of(
        {"state_dict": inner, "epoch": 1, "optimizer_states": [{}]}
    )
    assert list(found) == ["a"]
    assert left == ["optimizer_states"]


ODD = {
    "a view of one number": torch.ones(1).expand(1 << 40),
    "without numbers": torch.ones(3, device="meta"),
    "sparse": torch.ones(3).to_sparse(),
    "complex": torch.ones(3, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_cannot_be_written(kind, tmp_path):
    with pytest.raises(pickle_child.Malformed):
        pickle_child.write({"a": ODD[kind]}, str(tmp_path / "out"), 1 << 20)
    assert not (tmp_path / "out").exists()


def test_the_copy_has_the_same_numbers(tmp_path):
    tensors = {
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "scalar": torch.tensor(3.0),
        "none": torch.ones(0, 4),
        "b": torch.ones(3).bfloat16(),
        "e": torch.ones(3).to(torch.float8_e4m3fn),
        "i": torch.tensor([1, 2]),
    }
    pickle_child.write(tensors, str(tmp_path / "out"), 1 << 20)
    file = TensorFile(tmp_path / "out")
    assert set(file) == set(tensors)
    for name, tensor in tensors.items():
        assert file[name].dtype == tensor.dtype
        assert torch.equal(file.read(name).float(), tensor.float())


def lora(shapes=SHAPES, rank=2):
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.lora_A.weight"] = torch.ones(rank, *shape[1:])
        found[f"{name}.lora_B.weight"] = torch.ones(shape[0], rank, *[1] * (len(shape) - 2))
    return found


def test_a_peft_folder_with_a_pickle(tmp_path):
    base = make_base(tmp_path / "base", 0)
    folder = tmp_path / "my-lora"
    folder.mkdir()
    named = {f"base_model.model.{k}": v for k, v in lora().items()}
    torch.save(named, folder / "adapter_model.bin")
    sha256 = hashlib.sha256((folder / "adapter_model.bin").read_bytes()).hexdigest()
    torch.save({"x": 1}, folder / "optimizer.bin")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8})
    )
    with pytest.raises(PickleRefused, match="run code") as caught:
        load_adapter(folder, base)
    assert "--allow-pickle" in caught.value.fix
    with allow_pickles():
        for ref in (folder, folder / "adapter_model.bin"):  # one copy serves both
            adapter = load_adapter(ref, base)
            assert adapter.name == "my-lora"
            assert {u.scale for u in adapter.updates.values()} == {4.0}
            assert adapter.sha256 == sha256
        facts = inspect_file(folder)
        assert facts["file"] == str(folder / "adapter_model.bin")
        assert facts["alpha_from"] == "adapter_config.json"
    with pytest.raises(PickleRefused):
        locate(folder / "adapter_model.bin")


@pytest.mark.slow
def test_sharded_and_single_pickled_bases(tmp_path):
    state = llama().state_dict()
    names = sorted(state)
    half = len(names) // 2
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    folder = tmp_path / "model"
    folder.mkdir()
    for file, part in zip(files, (names[:half], names[half:]), strict=True):
        torch.save({n: state[n] for n in part}, folder / file)
    whole = {n: files[i >= half] for i, n in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": whole}))
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "one.ckpt")
    with allow_pickles() as gate:
        for ref, name in ((folder, "model"), (tmp_path / "one.ckpt", "one")):
            base = open_base(ref)
            assert base.name == name
            assert {s.module for s in base.weights} <= {n.removesuffix(".weight") for n in names}
            for site in base.weights:
                assert torch.equal(base.read(site), state[f"{site.module}.weight"])
        assert gate.folder.stat().st_mode & 0o077 == 0
        assert original(base.path) == tmp_path / "one.ckpt"
        os.remove(folder / files[0])
        with pytest.raises(Exception, match="shard"):
            open_base(folder)


@pytest.mark.slow
def test_bombs_end_at_their_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_gate, "_SECONDS", 4)
    # Tuples of tuples as a key: hashing it takes 2^60 steps.
    steps = b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    (tmp_path / "hash.pkl").write_bytes(b"\x80\x02}K\x01q\x00" + steps + b"K\x01s.")
    torch.save({"a": torch.zeros(1 << 28)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as old,
        zipfile.ZipFile(tmp_path / "zip.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (tmp_path / "junk.bin").write_bytes(b"hello" * 99)
    (tmp_path / "empty.bin").touch()
    for name in ("hash.pkl", "zip.pt", "junk.bin", "empty.bin"):
        with allow_pickles(), pytest.raises(MalformedFile) as caught:
            unpickled(tmp_path / name)
        assert caught.value.file == str(tmp_path / name)


def test_old_versions_of_torch_are_not_trusted(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(MissingDependency, match="CVE-2025-32434"), allow_pickles():
        pass


def test_the_file_the_user_gave_is_named(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(Exception, match=r"Nothing|None of") as caught, allow_pickles():
        inspect_file(tmp_path / "a.pt")
    assert caught.value.file == str(tmp_path / "a.pt")
