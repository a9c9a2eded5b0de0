"""Every shape a base comes in: same sites, same numbers, nothing read before it is asked."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.adapters import Site
from regraft.bases import architecture, open_base
from regraft.errors import InputNotFound, MalformedFile, NonFiniteTensor, NotABase, PickleRefused
from regraft.files import TensorFile
from regraft.files.select import pick_weights, weight_files
from tests.factories import (
    TINY_XL,
    UNET_3X3,
    clip,
    gpt2,
    ldm_file,
    ldm_state,
    llama,
    open_clip_state,
    pipeline_folder,
    save,
    unet,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pipeline_folder(tmp_path_factory.mktemp("bases") / "sd")


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return pipeline_folder(tmp_path_factory.mktemp("bases") / "xl", TINY_XL)


def same(a, b, without=()):
    """Two bases have the same sites with the same numbers."""
    sites = {s for s in a.weights if s.module not in without}
    assert sites == set(b.weights)
    for site in sites:
        assert a.weights[site].shape == b.weights[site].shape
        assert a.read(site).equal(b.read(site)), site


def test_a_pipeline_folder(folder):
    base = open_base(folder)
    assert base.components == ("unet", "text_encoder")
    model = unet()
    for name, tensor in model.state_dict().items():
        if name.endswith(".weight") and tensor.ndim >= 2:
            assert base.read(Site("unet", name.removesuffix(".weight"))).equal(tensor)
    assert base.name == "sd"
    assert base.configs["unet"]["cross_attention_dim"] == 16
    assert Site("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj") in base
    matrix = base.matrix(Site("unet", UNET_3X3))
    assert matrix.shape == (32, 32 * 9)


def test_an_original_single_file_is_the_same_base(folder, tmp_path):
    base = open_base(ldm_file(tmp_path / "sd.safetensors"))
    same(open_base(folder), base)
    assert base.components == ("text_encoder", "unet") or base.components == (
        "unet",
        "text_encoder",
    )
    assert base.name == "sd"
    site = Site("unet", UNET_3X3)
    assert base.weights[site].native == "middle_block.0.in_layers.2"


def test_sdxl_single_file_with_its_fused_text_encoder(xl_folder, tmp_path):
    base = open_base(ldm_file(tmp_path / "xl.safetensors", TINY_XL))
    assert set(base.components) == {"unet", "text_encoder", "text_encoder_2"}
    same(open_base(xl_folder), base, without=("text_projection",))


def test_sd2_single_file(tmp_path):
    state = ldm_state(unet()) | open_clip_state(clip(3), "cond_stage_model.model.")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "sd2.safetensors")
    base = open_base(tmp_path / "sd2.safetensors")
    own = clip(3).state_dict()
    q = "text_model.encoder.layers.1.self_attn.v_proj"
    site = Site("text_encoder", q)
    assert base.read(site).equal(own[f"{q.removeprefix('text_model.')}.weight"])


def test_a_bare_unet_folder_and_file(folder):
    for ref in (folder / "unet", folder / "unet" / "diffusion_pytorch_model.safetensors"):
        base = open_base(ref)
        assert base.components == ("unet",)
        assert Site("unet", UNET_3X3) in base


def test_a_bare_ldm_unet_file(folder, tmp_path):
    state = {k.removeprefix("model.diffusion_model."): v for k, v in ldm_state(unet()).items()}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "unet.safetensors")
    same(open_base(folder / "unet"), open_base(tmp_path / "unet.safetensors"))


def test_sharded_folders(tmp_path):
    model = llama()
    whole = open_base(save(model, tmp_path / "whole"))
    folder = save(model, tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    same(whole, open_base(folder))
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.rename(tmp_path / "kept")
    with pytest.raises(InputNotFound, match="shard") as caught:
        open_base(folder)
    assert lost.name in str(caught.value)
    # Without the index, the numbering of the names still tells.
    next(folder.glob("*.index.json")).unlink()
    with pytest.raises(InputNotFound, match=lost.name):
        open_base(folder)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(NotABase):
        open_base(folder)


def test_an_index_whose_shards_are_all_missing(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(InputNotFound, match="model-00001-of-00002"):
        open_base(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    for i in (1, 2):
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(MalformedFile, match="model-00001-of-00002"):
        open_base(tmp_path)


def test_gpt2_without_its_wrapper_is_the_same_base(tmp_path):
    whole = open_base(save(gpt2(), tmp_path / "whole"))
    folder = tmp_path / "hub"
    shutil.copytree(tmp_path / "whole", folder)
    state = load_file(folder / "model.safetensors")
    bare = {k.removeprefix("transformer."): v for k, v in state.items()}
    save_file(bare, folder / "model.safetensors")
    same(whole, open_base(folder))
    assert Site("", "transformer.h.0.attn.c_attn") in whole
    assert Site("", "lm_head") in open_base(folder)


def test_text_encoders_with_and_without_clips_wrapper(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sd")
    file = tmp_path / "sd/text_encoder/model.safetensors"
    state = load_file(file)
    other = {
        k.removeprefix("text_model.") if k.startswith("text_model.") else f"text_model.{k}": v
        for k, v in state.items()
    }
    save_file(other, file)
    same(open_base(folder), open_base(tmp_path / "sd"))


VARIANTS = [
    (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
    (["model.fp16.safetensors", "model.non_ema.safetensors"], ["model.fp16.safetensors"]),
    (["model.fp16.safetensors", "model.bf16.safetensors"], ["model.bf16.safetensors"]),
    (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
         "model.fp16-00001-of-00001.safetensors", "consolidated.safetensors"],
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    ),
    (
        ["unet/diffusion_pytorch_model-00001-of-00001.fp16.safetensors",
         "unet/diffusion_pytorch_model-00001-of-00001.safetensors"],
        ["unet/diffusion_pytorch_model-00001-of-00001.safetensors"],
    ),
    (
        ["v1-5-pruned.safetensors", "v1-5-pruned-emaonly.safetensors", "vae/m.safetensors",
         "unet/diffusion_pytorch_model.safetensors",
         "unet/diffusion_pytorch_model.fp16.safetensors",
         "text_encoder/model.fp16.safetensors", "safety_checker/model.safetensors",
         "unet/onnx/model.safetensors", "README.md"],
        ["text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors"],
    ),
    (["my-style.safetensors", "README.md"], ["my-style.safetensors"]),
    (["my.style.v2.safetensors"], ["my.style.v2.safetensors"]),
    (["README.md", "model.onnx"], []),
]  # fmt: skip


@pytest.mark.parametrize(("names", "wanted"), VARIANTS)
def test_which_files_are_picked(names, wanted):
    assert pick_weights(names) == wanted


def test_several_unlike_files_are_not_guessed_at(tmp_path):
    with pytest.raises(InputNotFound, match=r"epoch-1.*epoch-2") as caught:
        pick_weights(["epoch-1.safetensors", "epoch-2.safetensors"])
    assert "Name the file" in caught.value.fix
    for name in ("epoch-1", "epoch-2"):
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputNotFound, match="epoch-1") as caught:
        open_base(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_peft_folder_prefers_its_adapter(tmp_path):
    for name in ("adapter_model.safetensors", "model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in weight_files(tmp_path)] == ["adapter_model.safetensors"]


def test_the_root_copy_in_a_pipeline_folder_is_ignored(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sd")
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "sd" / "sd.safetensors")
    same(open_base(folder), open_base(tmp_path / "sd"))


def test_an_fp16_variant_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sd")
    whole = tmp_path / "sd/unet/diffusion_pytorch_model.safetensors"
    half = {k: v.half() for k, v in load_file(whole).items()}
    save_file(half, whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    base = open_base(tmp_path / "sd")
    assert base.weights[Site("unet", UNET_3X3)].dtype == torch.float32
    whole.unlink()
    base = open_base(tmp_path / "sd")
    assert base.weights[Site("unet", UNET_3X3)].dtype == torch.float16
    assert base.read(Site("unet", UNET_3X3)).dtype == torch.float32


@pytest.mark.parametrize("place", ["pytorch_model.bin", "unet/diffusion_pytorch_model.bin"])
def test_pickles_only(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(b"\x80\x02")
    with pytest.raises(PickleRefused, match="run code") as caught:
        open_base(tmp_path)
    assert place.rpartition("/")[2] in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "unet.mid_block.attentions.0.proj_in.lora_A.weight",
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a",
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        "unet.mid_block.attentions.0.proj_in.lora_x_U",
        "mid_block.attentions.0.attn1.processor.to_q_lora.down.weight",
    ],
)
def test_an_adapter_is_no_base(tmp_path, key):
    save_file({key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(NotABase, match="adapter") as caught:
        open_base(tmp_path / "a.safetensors")
    assert caught.value.tensor == key


@pytest.mark.parametrize(
    "state",
    [
        {"a.weight": torch.ones(4, 1, dtype=torch.uint8)},
        {"a.weight": torch.ones(4, 4, dtype=torch.int32)},
    ],
)
def test_integers_of_no_known_format_are_refused(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(NotABase, match="quantised") as caught:
        open_base(tmp_path / "a.safetensors")
    assert "16-bit" in caught.value.fix


@pytest.mark.parametrize("content", [{}, {"norm.weight": torch.ones(3)}, {"x": torch.ones(2, 2)}])
def test_a_file_without_weights(tmp_path, content):
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(NotABase, match="no weights"):
        open_base(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["{", "[1]", "\0", '{"a":' * 5000])
def test_a_broken_config(tmp_path, text):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MalformedFile, match="JSON") as caught:
        open_base(tmp_path)
    assert caught.value.file.endswith("config.json")


@pytest.mark.parametrize(
    "ref",
    ["", "nothing", "./nothing", "a/b/c", "/nothing/here", "x" * 5000, "nul\0byte", "~nobody9/x",
     "a/b.safetensors", "org/name.ckpt", "org/name@", "org/", "é/x", "C:\\models\\sd"],
)  # fmt: skip
def test_what_cannot_be_found_is_never_asked_of_the_hub(ref):
    with pytest.raises(InputNotFound, match="No such file"):
        open_base(ref)


def test_opening_reads_no_data(tmp_path, monkeypatch):
    # A file of 40 GB that is nearly all hole: only its header can have been read.
    shape = [100_000, 50_000]
    names = [f"layers.{i}.weight" for i in range(2)]
    size = 4 * shape[0] * shape[1]
    header = {
        n: {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, n in enumerate(names)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + 2 * size)
    reads = []
    monkeypatch.setattr(TensorFile, "_read_into", lambda self, view, name: reads.append(name))
    base = open_base(path)
    assert base.weights[Site("", "layers.1")].shape == tuple(shape)
    assert reads == []


def test_a_damaged_weight_is_named(tmp_path):
    save_file({"a.weight": torch.full((2, 2), float("nan"))}, tmp_path / "m.safetensors")
    base = open_base(tmp_path / "m.safetensors")
    with pytest.raises(NonFiniteTensor) as caught:
        base.read(Site("", "a"))
    assert caught.value.tensor == "a.weight"


def test_architectures_are_read_off_shapes(folder, tmp_path):
    assert architecture(open_base(folder)) is None
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    for width, label in ((768, "sd_v1"), (1024, "sd_v2"), (2048, "sdxl_base_v1-0"), (5, None)):
        state = {"conv_in.weight": torch.zeros(320, 4, 3, 3), attention: torch.zeros(320, width)}
        save_file(state, tmp_path / f"{width}.safetensors")
        found = architecture(open_base(tmp_path / f"{width}.safetensors"))
        assert (found.kohya if found else None) == label


def test_a_bare_text_encoder_folder(tmp_path):
    base = open_base(save(clip(), tmp_path / "clip"))
    assert base.components == ("",)
