"""GGUF files: the types of gguf, llama.cpp's names and what its conversion does to the numbers."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.adapters import Site
from regraft.bases import open_base
from regraft.bases.quantised.gguf_names import _LAYOUTS, to_transformers
from regraft.errors import InputNotFound, MalformedFile, NotABase, RegraftError
from regraft.files.gguffile import GGUFFile
from regraft.subspaces import Cache, SubspaceLibrary

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType

#: Types that gguf writes from Python; the others get random bytes.
WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
READ = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S")
READ += ("IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M")


def write(path, tensors, architecture="flux", settings=None):
    """``tensors``: name → fp32 array and type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (settings or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a word", "ß"])
    for name, (array, kind) in tensors.items():
        data = array
        if kind.name not in ("F32", "F16"):
            data = array if array.dtype == np.uint8 else gguf.quants.quantize(array, kind)
        elif kind.name == "F16":
            data = array.astype(np.float16)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def raw(kind: str, rows: int = 3, blocks: int = 2) -> np.ndarray:
    """Random codes of a type; its 16-bit scales are kept finite."""
    _, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    codes = np.random.default_rng(0).integers(0, 0x3C, (rows, blocks * size), dtype=np.uint8)
    return codes


@pytest.mark.parametrize("kind", [*WRITTEN, *READ])
def test_every_type_is_what_gguf_makes_of_it(tmp_path, kind):
    values = np.random.default_rng(1).standard_normal((6, 512)).astype(np.float32)
    data = raw(kind) if kind in READ else values
    name = "double_blocks.0.img_attn.qkv"
    path = write(tmp_path / "m.gguf", {f"{name}.weight": (data, Type[kind])})
    base = open_base(path)
    assert base.name == "m"
    (site,) = base.weights
    assert base.quantised == {f"GGUF {kind}": 1}
    tensor = gguf.GGUFReader(path).tensors[0]
    own = torch.from_numpy(gguf.quants.dequantize(tensor.data, Type[kind]))
    assert base.at(site).shape == tuple(int(n) for n in reversed(tensor.shape))
    assert base.read(site).equal(own.float())
    assert base.read(site).abs().sum() > 0


def test_a_reshaped_convolution_has_its_own_shape(tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 8, 3, 3)).astype(np.float32)
    tensors = {
        "conv.weight": (values.reshape(9, 32), Type.Q8_0),
        "norm.weight": (np.ones(4, dtype=np.float32), Type.F32),
        "proj.weight": (values.reshape(9, 32), Type.F16),
    }
    key = "comfy.gguf.orig_shape.conv.weight"
    base = open_base(write(tmp_path / "m.gguf", tensors, settings={key: [4, 8, 3, 3]}))
    assert base.at(Site("", "conv")).shape == (4, 8, 3, 3)
    torch.testing.assert_close(
        base.read(Site("", "conv")), torch.from_numpy(values), atol=0.02, rtol=0
    )
    # Plain numbers are what they are in any other file.
    assert base.quantised == {"GGUF Q8_0": 1}
    assert base.at(Site("", "proj")).dtype == torch.float16
    assert base.at(Site("", "proj")).quantised is None
    assert Site("", "norm") in base.others


def test_rows_of_a_fused_weight(tmp_path):
    """OpenCLIP's query, key and value are one stored tensor; adapters change them apart."""
    prefix = "cond_stage_model.model."
    values = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
    block = f"{prefix}transformer.resblocks.0.attn."
    tensors = {
        f"{block}in_proj_weight": (values, Type.Q8_0),
        f"{block}out_proj.weight": (values[:32], Type.Q8_0),
    }
    base = open_base(write(tmp_path / "sd2.gguf", tensors, "sd2"))
    inside = "text_model.encoder.layers.0.self_attn"
    for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
        site = Site("text_encoder", f"{inside}.{part}")
        own = torch.from_numpy(values[32 * i : 32 * (i + 1)])
        assert base.at(site).shape == (32, 32)
        torch.testing.assert_close(base.read(site), own, atol=0.02, rtol=0)
    library = SubspaceLibrary(Cache(tmp_path / "cache"), device="cpu")
    assert len({library.content_hash(base, site) for site in base.weights}) == 4


LLAMA = {
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.context_length": 16,
    "llama.vocab_size": 40,
}


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=40,
            max_position_embeddings=16,
        )
    )


def llama_file(path, kind=Type.Q8_0, settings=LLAMA):
    """A tiny Llama as llama.cpp's converter writes it."""
    names = {hf: own for own, hf in transformers_names(tiny_llama(), "llama").items()}
    tensors = {"rope_freqs.weight": (np.ones(4, dtype=np.float32), Type.F32)}
    for name, tensor in tiny_llama().state_dict().items():
        array = tensor.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:  # halves of each head become neighbours
                turned = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
                array = turned.swapaxes(1, 2).reshape(array.shape)
        tensors[names[name]] = (np.ascontiguousarray(array), kind if array.ndim > 1 else Type.F32)
    return write(path, tensors, "llama", settings)


def transformers_names(model, kind):
    """llama.cpp's name → transformers', as transformers itself maps them."""
    gg = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    processor = gg.TENSOR_PROCESSORS.get(kind, gg.TensorProcessor)(config={})
    return gg.get_gguf_hf_weights_map(model, processor)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0])
def test_a_language_model_is_the_base_it_was_made_from(tmp_path, kind):
    base = open_base(llama_file(tmp_path / "llama.gguf", kind))
    state = tiny_llama().state_dict()
    sites = {str(s): s for s in (*base.weights, *base.others)}
    assert {s if s.endswith("weight") else f"{s}.weight" for s in sites} == set(state)
    assert base.quantised == ({"GGUF Q8_0": 16} if kind is Type.Q8_0 else {})
    for site in sites.values():
        own = state[f"{site.module}.weight"]
        error = (base.read(site) - own).norm() / own.norm()
        assert error < {Type.F32: 1e-9, Type.F16: 5e-4, Type.Q8_0: 0.01}[kind], site
    native = base.at(Site("", "model.layers.1.self_attn.q_proj")).native
    assert native == "blk.1.attn_q"


@pytest.mark.filterwarnings("ignore")
def test_it_is_what_transformers_loads(tmp_path):
    from transformers import LlamaForCausalLM

    path = llama_file(tmp_path / "llama.gguf")
    own = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).state_dict()
    base = open_base(path)
    for site in base.weights:
        assert base.read(site).equal(own[f"{site.module}.weight"].float()), site


def models():
    import transformers as t

    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "pad_token_id": 0,
    }
    plain = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config),
        "stablelm": (t.StableLmForCausalLM, t.StableLmConfig),
        "gemma": (t.GemmaForCausalLM, t.GemmaConfig),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config),
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig),
        "phi3": (t.Phi3ForCausalLM, t.Phi3Config),
        "starcoder2": (t.Starcoder2ForCausalLM, t.Starcoder2Config),
    }
    made = {name: (cls, config(**small)) for name, (cls, config) in plain.items()}
    made["gpt2"] = (t.GPT2LMHeadModel, t.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=40))
    t5 = t.T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=4, vocab_size=40)
    gated = t.T5Config(**{**t5.to_dict(), "feed_forward_proj": "gated-gelu"})
    return made | {"t5": (t.T5ForConditionalGeneration, t5), "t5encoder": (t.T5EncoderModel, gated)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(_LAYOUTS))
def test_names_are_those_of_transformers(kind):
    cls, config = models()[kind]
    with torch.device("meta"):
        model = cls(config)
    names = transformers_names(model, kind)
    assert len(names) > 8
    for own, theirs in names.items():
        assert to_transformers(kind, own, names) == theirs


def test_gemmas_norms_lose_the_one_that_was_added(tmp_path):
    tensors = {
        "blk.0.attn_norm.weight": (np.full(32, 1.5, dtype=np.float32), Type.F32),
        "blk.0.attn_q.weight": (np.ones((32, 32), dtype=np.float32), Type.F32),
    }
    base = open_base(write(tmp_path / "m.gguf", tensors, "gemma2"))
    site = Site("", "model.layers.0.input_layernorm")
    assert base.read(site).equal(torch.full((32,), 0.5))


def test_gpt2s_conv1d_is_stored_the_other_way_round(tmp_path):
    array = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
    tensors = {"blk.0.attn_qkv.weight": (array, Type.Q8_0)}
    base = open_base(write(tmp_path / "m.gguf", tensors, "gpt2"))
    site = Site("", "transformer.h.0.attn.c_attn")
    assert base.at(site).shape == (32, 96)
    torch.testing.assert_close(base.read(site), torch.from_numpy(array.T), atol=0.05, rtol=0)


def test_an_architecture_without_a_table_is_refused(tmp_path):
    tensors = {"blk.0.attn_q.weight": (np.ones((32, 32), dtype=np.float32), Type.F32)}
    with pytest.raises(NotABase, match="mamba"):
        open_base(write(tmp_path / "m.gguf", tensors, "mamba"))


def test_llama_without_its_heads_is_malformed(tmp_path):
    settings = {k: v for k, v in LLAMA.items() if "head_count" not in k}
    with pytest.raises(MalformedFile, match="heads"):
        open_base(llama_file(tmp_path / "m.gguf", settings=settings))


def test_which_file_of_a_folder(tmp_path):
    values = {"layer.weight": (np.ones((32, 32), dtype=np.float32), Type.Q8_0)}
    write(tmp_path / "model-Q8_0.gguf", values)
    assert open_base(tmp_path).quantised == {"GGUF Q8_0": 1}
    write(tmp_path / "model-F16.gguf", values)
    with pytest.raises(InputNotFound, match="which one"):
        open_base(tmp_path)
    with pytest.raises(InputNotFound, match="No such file"):
        open_base("org/model.gguf")


def test_shards_of_a_split_file(tmp_path):
    for i in (1, 2):
        values = {f"layer{i}.weight": (np.ones((32, 32), dtype=np.float32), Type.Q8_0)}
        write(tmp_path / f"m-0000{i}-of-00002.gguf", values)
    assert open_base(tmp_path).quantised == {"GGUF Q8_0": 2}
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(InputNotFound, match="m-00002-of-00002"):
        open_base(tmp_path)


DAMAGED = {
    "empty": b"",
    "magic": b"GGML" + bytes(60),
    "version": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "counts": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
    "ends": b"GGUF" + struct.pack("<IQQ", 3, 4, 1),
    "long text": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62),
    "key's type": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77),
    "not text": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + struct.pack("<I", 0),
    "shape": b"GGUF"
    + struct.pack("<IQQQ", 3, 1, 0, 1)
    + b"t"
    + struct.pack("<IQIQ", 1, 1 << 63, 0, 0),
    "type": b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 32, 99, 0),
    "outside": b"GGUF"
    + struct.pack("<IQQQ", 3, 1, 0, 1)
    + b"t"
    + struct.pack("<IQIQ", 1, 32, 0, 0),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_headers(tmp_path, damage):
    (tmp_path / "m.gguf").write_bytes(DAMAGED[damage])
    with pytest.raises(MalformedFile) as caught:
        open_base(tmp_path / "m.gguf")
    assert "GGUF" in str(caught.value)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_changed_byte_is_read_or_refused(tmp_path, data):
    path = tmp_path / "m.gguf"
    good = tmp_path / "good.gguf"
    if not good.exists():
        llama_file(good)
    whole = bytearray(good.read_bytes())
    end = GGUFFile(good)["blk.0.attn_q.weight"].start
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, end - 1))
        whole[place] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.sampled_from([len(whole), end, end // 2]))])
    try:
        base = open_base(path)
        for site in base.weights:
            base.read(site)
    except RegraftError:
        pass
