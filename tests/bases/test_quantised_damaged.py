"""Quantised checkpoints that are damaged, or of a format that is not read; what is read when."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from regraft.adapters import Site
from regraft.bases import open_base
from regraft.errors import MalformedFile, MissingDependency, NonFiniteTensor, NotABase
from regraft.files import TensorFile
from regraft.subspaces import Cache, SubspaceLibrary

LAYERS = ("a", "b")
F8 = torch.float8_e4m3fn


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()


def nf4(name: str, nested: bool) -> dict[str, Tensor]:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(
        torch.randn(64, 96), quant_type="nf4", compress_statistics=nested
    )
    mates = {f"{name}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return {f"{name}.weight": codes, **mates}


def torchao(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    about = {
        "_type": "Int8Tensor",
        "_data": {
            "act_quant_kwargs": None,
            "reduce_range": False,
            "block_size": [1, 96],
            "dtype": {"_type": "torch.dtype", "_data": "float32"},
        },
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    }
    tensors = {
        f"{name}._weight_qdata": torch.ones(64, 96, dtype=torch.int8),
        f"{name}._weight_scale": torch.rand(64, 1),
        f"{name}._weight_zero_point": torch.zeros(64, 1, dtype=torch.int8),
    }
    return tensors, {f"{name}.weight": json.dumps(about)}


def layer(kind: str, name: str) -> dict[str, Tensor]:
    """One layer of 96 inputs and 64 outputs in a format."""
    codes = torch.ones(64, 96, dtype=torch.int8)
    if kind.startswith("NF4"):
        return nf4(name, nested="nested" in kind)
    if kind == "torchao":
        return torchao(name)[0]
    return {
        "int8": lambda: {
            f"{name}.weight": codes,
            f"{name}.SCB": torch.rand(64),
            f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
        },
        "quanto int8": lambda: {
            f"{name}.weight._data": codes,
            f"{name}.weight._scale": torch.rand(64, 1),
        },
        "quanto int4": lambda: {
            f"{name}.weight._data._data": torch.ones(96, 32, dtype=torch.uint8),
            f"{name}.weight._scale": torch.rand(192, 1),
            f"{name}.weight._shift": torch.rand(192, 1),
            f"{name}.bias": torch.zeros(64),
        },
        "scaled fp8": lambda: {
            f"{name}.weight": torch.randn(64, 96).to(F8),
            f"{name}.weight_scale_inv": torch.rand(1, 1),
        },
        "GPTQ": lambda: {
            f"{name}.qweight": words(12, 64),
            f"{name}.qzeros": words(3, 8),
            f"{name}.scales": torch.rand(3, 64),
            f"{name}.g_idx": torch.arange(96).int() // 32,
        },
        "AWQ": lambda: {
            f"{name}.qweight": words(96, 8),
            f"{name}.qzeros": words(3, 8),
            f"{name}.scales": torch.rand(3, 64),
        },
        "compressed-tensors": lambda: {
            f"{name}.weight_packed": words(64, 12),
            f"{name}.weight_scale": torch.rand(64, 3),
            f"{name}.weight_shape": torch.tensor([64, 96]),
            f"{name}.weight_zero_point": words(8, 3),
        },
    }[kind]()


FORMATS = ("NF4", "NF4 nested", "int8", "torchao", "quanto int8", "quanto int4", "scaled fp8")
FORMATS += ("GPTQ", "AWQ", "compressed-tensors")
#: Parts that a weight can do without: it is another valid weight then.
OPTIONAL = {"weight_format", "bias", "g_idx", "weight_zero_point", "weight_scale_inv"}


def checkpoint(kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {"norm.weight": torch.ones(64)}
    metadata: dict[str, str] = {}
    for name in LAYERS:
        tensors |= layer(kind, name)
        metadata |= torchao(name)[1] if kind == "torchao" else {}
    return tensors, metadata


def opened(folder, tensors, metadata=None):
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata=metadata or None)
    return open_base(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_one_weight_is_read_and_nothing_else(tmp_path, kind, monkeypatch):
    read = []
    fill = TensorFile._read_into
    monkeypatch.setattr(
        TensorFile,
        "_read_into",
        lambda self, view, name: (read.append(name), fill(self, view, name)),
    )
    base = opened(tmp_path, *checkpoint(kind))
    assert set(base.weights) == {Site("", "a"), Site("", "b")}
    assert all(w.shape == (64, 96) for w in base.weights.values())
    # Only what holds a shape, or the layout.
    assert all(n.endswith(("quant_state.bitsandbytes__nf4", "_shape", "_format")) for n in read)
    read.clear()
    assert base.read(Site("", "a")).shape == (64, 96)
    assert read
    assert all(name.startswith("a.") for name in read)
    assert set(read) == {tensor for _, tensor in base.at(Site("", "a")).stored()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_every_stored_tensor_counts_for_the_hash(tmp_path, kind):
    library = SubspaceLibrary(Cache(tmp_path / "cache"), device="cpu")
    tensors, metadata = checkpoint(kind)
    site = Site("", "a")
    base = opened(tmp_path, tensors, metadata)
    whole = library.content_hash(base, site)
    assert whole == library.content_hash(open_base(tmp_path), site)
    changed = [t for _, t in base.at(site).stored() if "state" not in t and "shape" not in t]
    for i, name in enumerate(changed):
        other = tmp_path / str(i)
        other.mkdir()
        turned = tensors | {
            name: tensors[name]
            .view(torch.uint8)
            .bitwise_xor(1)
            .view_as(tensors[name].view(torch.uint8))
            .view(tensors[name].dtype)
        }
        assert library.content_hash(opened(other, turned, metadata), site) != whole, name


@pytest.mark.parametrize("kind", FORMATS)
def test_a_missing_part(tmp_path, kind):
    tensors, metadata = checkpoint(kind)
    for i, name in enumerate(t for t in layer(kind, "a") if t.rpartition(".")[2] not in OPTIONAL):
        folder = tmp_path / str(i)
        folder.mkdir()
        rest = {k: v for k, v in tensors.items() if k != name}
        with pytest.raises((MalformedFile, NotABase)):
            opened(folder, rest, metadata)


def damaged(data, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor lost, or of another shape, dtype or content."""
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    how = data.draw(st.sampled_from(["lost", "shape", "dtype", "bytes"]))
    if how == "lost":
        return {k: v for k, v in tensors.items() if k != name}
    if how == "shape":
        flat = tensor.reshape(-1)
        count = data.draw(st.integers(0, max(len(flat) - 1, 0)))
        other = flat[:count].reshape(data.draw(st.sampled_from([(count,), (count, 1), (1, count)])))
    elif how == "dtype":
        kinds = [torch.float32, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16]
        other = tensor.float().nan_to_num().clamp(-100, 100).to(data.draw(st.sampled_from(kinds)))
    else:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        noise = data.draw(st.binary(min_size=1, max_size=8))
        raw = raw.clone()
        place = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        for offset, byte in enumerate(noise[: len(raw) - place]):
            raw[place + offset] = byte
        other = raw.view(tensor.dtype).reshape(tensor.shape)
    return tensors | {name: other.contiguous()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_is_an_error_or_a_weight(tmp_path, kind, data):
    tensors, metadata = checkpoint(kind)
    tensors = damaged(data, tensors)
    try:
        base = opened(tmp_path, tensors, metadata)
        for site, weight in base.weights.items():
            assert base.read(site).shape == weight.shape
    except (MalformedFile, NotABase, NonFiniteTensor):
        pass


STATES = [b"", b"{", b"[]", b"null", b"{}", b'{"shape": [64, 96]}', b"\xff\xfe", b"9" * 40]
GOOD = {"shape": [64, 96], "blocksize": 64, "dtype": "float32", "quant_type": "nf4"}
STATES += [
    json.dumps(GOOD | change).encode()
    for change in (
        {"shape": [64, 95]},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": "64"},
        {"shape": [-64, -96]},
        {"blocksize": 0},
        {"blocksize": 32},
        {"blocksize": True},
        {"dtype": "load"},
        {"nested_blocksize": 256},
        {"quant_type": ["nf4"]},
    )
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", STATES)
def test_a_quant_state_that_cannot_be(tmp_path, state):
    tensors, _ = checkpoint("NF4")
    raw = torch.tensor(list(state), dtype=torch.uint8)
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = raw
    with pytest.raises(MalformedFile):
        opened(tmp_path, tensors).read(Site("", "a"))


ONE = torch.ones(2, 2)
OTHERS = {
    "nunchaku": {  # whose factors look like an adapter's
        "a.qweight": words(2, 2),
        "a.wscales": ONE,
        "a.lora_down": ONE,
    },
    "SDNQ": {"a.weight": words(2, 2), "a.svd_up": ONE, "a.scale": ONE},
    "HQQ": {"a.W_q": words(2, 2), "a.scale": ONE},
    "EXL2": {"a.q_weight": words(2, 2), "a.q_invperm": words(2)},
    "EXL3": {"a.trellis": words(2, 2, 2)},
    "AQLM": {"a.codes": words(2, 2), "a.codebooks": ONE},
    "NVFP4": {"a.weight": ONE.byte(), "a.weight_scale": ONE, "a.weight_scale_2": ONE},
    "MXFP4": {"a.down_proj_blocks": ONE.byte(), "a.down_proj_scales": ONE.byte()},
    "MLX": {"a.weight": words(2, 2), "a.scales": ONE, "a.biases": ONE},
    "nvfp4": {
        "a.weight": ONE.byte(),
        "a.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8),
    },
    "not known": {"a.weight": words(2, 2)},
}


@pytest.mark.parametrize("form", OTHERS)
def test_a_format_that_is_not_read_is_named(tmp_path, form):
    with pytest.raises(NotABase, match=form) as caught:
        opened(tmp_path, OTHERS[form] | {"norm.weight": torch.ones(2)})
    assert "16-bit" in str(caught.value)


@pytest.mark.parametrize(("method", "form"), [("sdnq", "SDNQ"), ("bitnet", "BitNet")])
def test_or_by_its_config(tmp_path, method, form):
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": method}})
    )
    with pytest.raises(NotABase, match=form):
        opened(tmp_path, {"a.weight": ONE.byte(), "a.weight_scale": torch.ones(1)})


def test_awqs_other_layouts_are_malformed_not_wrong(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"version": "gemv"}}')
    with pytest.raises(MalformedFile, match="gemv"):
        opened(tmp_path, checkpoint("AWQ")[0])


def test_a_library_that_is_not_installed(tmp_path, monkeypatch):
    base = opened(tmp_path, *checkpoint("torchao"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    module = "torchao.prototype.safetensors.safetensors_support"
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match="torchao") as caught:
        base.read(Site("", "a"))
    assert "regraft[quantised]" in str(caught.value)
