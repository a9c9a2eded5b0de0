"""What bitsandbytes, torchao and quanto save is read as the numbers those libraries make of it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from regraft.adapters import Site
from regraft.bases import open_base
from regraft.errors import NotABase
from tests.factories import gpt2, llama, save

# The libraries themselves warn, at import and when they quantise.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if "proj" in n.rpartition(".")[2]}


def reloaded(folder, quantisation, model=None):
    """The model of a folder, quantised by transformers and saved again beside it."""
    from transformers import AutoModelForCausalLM

    save(model or llama(), folder / "whole")
    quantised = AutoModelForCausalLM.from_pretrained(
        folder / "whole", quantization_config=quantisation, dtype=torch.bfloat16
    )
    quantised.save_pretrained(folder / "quantised")
    return quantised, open_base(folder / "quantised"), open_base(folder / "whole")


def right(functional, codes, state):
    """bitsandbytes' numbers. On a CPU, 0.50.2 goes wrong where blocks cross rows: give it one."""
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
    return functional.dequantize_4bit(codes.reshape(-1, 1), state).reshape(shape)


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("fp4", False)])
def test_bitsandbytes_4_bits(tmp_path, kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import BitsAndBytesConfig

    model, base, whole = reloaded(
        tmp_path,
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
        ),
    )
    assert base.weights.keys() == whole.weights.keys()
    assert base.others.keys() == whole.others.keys()
    layers = linears(model)
    assert base.quantised == {f"bitsandbytes {kind.upper()}": len(layers)}
    for name, layer in layers.items():
        weight = base.at(Site("", name))
        own = right(functional, layer.weight.data, layer.weight.quant_state)
        assert weight.shape == whole.at(Site("", name)).shape == tuple(own.shape)
        assert weight.dtype == torch.uint8
        assert base.read(Site("", name)).equal(own.float()), name
    parts = {t.rpartition(".")[2] for _, t in weight.stored()}
    assert {"weight", "absmax", "quant_map", f"bitsandbytes__{kind}"} <= parts
    assert ("nested_absmax" in parts) == nested


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_4_bits_where_blocks_cross_rows(tmp_path, kind, nested, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(200, 96).to(dtype)
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    mates = {f"m.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    save_file({"m.weight": codes, **mates}, tmp_path / "model.safetensors")
    own = right(functional, codes, state)
    read = open_base(tmp_path).read(Site("", "m"))
    assert read.equal(own.float())
    assert (read - weight.float()).norm() / weight.float().norm() < 0.14


def test_bitsandbytes_int8(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import BitsAndBytesConfig

    model, base, whole = reloaded(tmp_path, BitsAndBytesConfig(load_in_8bit=True))
    assert base.weights.keys() == whole.weights.keys()
    assert set(base.quantised) == {"bitsandbytes int8"}
    for name, layer in linears(model).items():
        own = functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
        assert base.read(Site("", name)).equal(own), name
    # Its first releases wrote no weight_format.
    file = tmp_path / "quantised" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "weight_format" not in k}, file)
    assert open_base(file.parent).read(Site("", name)).equal(own)


def test_gpt2s_conv1d_has_the_models_shape(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    _, base, whole = reloaded(tmp_path, BitsAndBytesConfig(load_in_8bit=True), gpt2())
    site = Site("", "transformer.h.0.attn.c_proj")  # square: only the numbers tell
    assert base.at(site).shape == whole.at(site).shape
    torch.testing.assert_close(base.read(site), whole.read(site), atol=0.002, rtol=0)
    assert base.at(Site("", "transformer.h.0.mlp.c_fc")).shape == (16, 64)


def test_torchao_as_transformers_saves_it(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model, base, whole = reloaded(tmp_path, TorchAoConfig(torchao.Int8WeightOnlyConfig()))
    assert base.weights.keys() == whole.weights.keys()
    assert base.others.keys() == whole.others.keys()
    assert base.quantised == {"torchao int8": len(linears(model))}
    for name, layer in linears(model).items():
        assert base.read(Site("", name)).equal(layer.weight.dequantize().float()), name


@pytest.mark.parametrize(
    ("config", "form"), [("Float8WeightOnlyConfig", "fp8"), ("IntxWeightOnlyConfig", "intx")]
)
def test_other_torchao_tensors(tmp_path, config, form):
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    model = nn.Sequential(nn.Linear(32, 64).bfloat16(), nn.Linear(64, 32).bfloat16())
    torchao.quantize_(model, getattr(torchao, config)())
    flat, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(flat, tmp_path / "model.safetensors", metadata=metadata)
    base = open_base(tmp_path)
    assert base.quantised == {f"torchao {form}": 2}
    for i in (0, 1):
        assert base.read(Site("", str(i))).equal(model[i].weight.dequantize().float())
    assert set(base.others) == {Site("", "0", "bias"), Site("", "1", "bias")}


@pytest.fixture
def quanto(monkeypatch):
    """quanto, unpacking in Python: by itself it compiles a C++ extension for that."""
    quanto = pytest.importorskip("optimum.quanto")
    from optimum.quanto.tensor.packed import PackedTensor

    def in_python(self):
        height = len(self._data)
        rows = [self._data[r % height] >> self._bits * (r // height) for r in range(self.shape[0])]
        return torch.stack(rows) & (2**self._bits - 1)

    monkeypatch.setattr(PackedTensor, "unpack", in_python)
    return quanto


QUANTO = ("qint8", "qfloat8", "qint4", "qint2")


@pytest.mark.parametrize("kind", QUANTO)
@pytest.mark.parametrize("sizes", [(160, 64, 40), (256, 128, 96)])
def test_quanto(tmp_path, quanto, kind, sizes):
    torch.manual_seed(0)
    wide, middle, narrow = sizes
    model = nn.Sequential(nn.Linear(wide, middle), nn.Linear(middle, narrow))
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    base = open_base(tmp_path)
    assert sum(base.quantised.values()) == 2
    for i in (0, 1):
        own = model[i].weight.dequantize()
        assert base.at(Site("", str(i))).shape == tuple(own.shape)
        assert base.read(Site("", str(i))).equal(own), i
    # No scale of an activation is a parameter.
    assert set(base.others) == {Site("", "0", "bias"), Site("", "1", "bias")}


def test_quantos_groups_without_a_bias_need_the_config(tmp_path, quanto):
    model = nn.ModuleDict({"q_proj": nn.Linear(256, 64, bias=False)})
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(NotABase, match=r"config\.json"):
        open_base(tmp_path)
    folder = tmp_path / "with"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text('{"hidden_size": 256}')
    own = model["q_proj"].weight.dequantize()
    assert open_base(folder).read(Site("", "q_proj")).equal(own)
