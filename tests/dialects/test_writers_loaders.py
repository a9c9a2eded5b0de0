"""What PEFT, diffusers' transformer pipelines and LyCORIS make of the files that are written."""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
from diffusers import loaders
from safetensors.torch import load_file

from lab.native_models import ARCHITECTURES
from lab.native_names import build
from regraft.adapters import Adapter, Site, delta
from regraft.bases import open_base
from regraft.bases.unet_names import to_ldm
from regraft.dialects import holdable, load_adapter
from tests.dialects import rules
from tests.dialects.adapters import (
    assert_close,
    changed,
    every_kind,
    native_state,
    only,
    own_state,
    some_update,
)
from tests.dialects.loaders import (
    judge_peft,
    random_adapter,
    write,
)
from tests.factories import UNET_LINEAR, clip, save

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]
MIXINS = {
    "flux": "FluxLoraLoaderMixin",
    "sd3": "SD3LoraLoaderMixin",
    "hunyuan-video": "HunyuanVideoLoraLoaderMixin",
    "wan": "WanLoraLoaderMixin",
    "qwen-image": "QwenImageLoraLoaderMixin",
    "z-image": "ZImageLoraLoaderMixin",
}


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            class_name, config = ARCHITECTURES[name].models[0]
            model = build(class_name, config)
            folder = tmp_path_factory.mktemp("bases") / name
            save(model, folder / "transformer")
            made[name] = model, open_base(folder)
        return made[name]

    return get


def judge_mixin(name, model, file):
    """ΔW and Δb after diffusers' own loader of this pipeline has read the file."""
    mixin = getattr(loaders, MIXINS[name])
    state = mixin.lora_state_dict(load_file(file))
    state, alphas = state if isinstance(state, tuple) else (state, None)
    changed = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        changed.load_lora_adapter(state, network_alphas=alphas, prefix="transformer")
    before = dict(model.state_dict())
    changed.fuse_lora()
    changed.unload_lora()
    after = changed.state_dict()
    return {k: after[k] - v for k, v in before.items() if not torch.equal(after[k], v)}


def wanted_of(adapter):
    return {f"{s.module}.{s.parameter}": delta(u) for s, u in adapter.updates.items()}


@pytest.mark.parametrize("name", MIXINS)
def test_diffusers_loads_transformers(name, transformers, tmp_path):
    model, base = transformers(name)
    adapter = every_kind(base, share=0.3)
    weights = only(adapter, {s for s in adapter.updates if s in base.weights})
    write(weights, base, tmp_path / "a.safetensors", "diffusers")
    assert_close(judge_mixin(name, model, tmp_path / "a.safetensors"), wanted_of(weights))


#: Of the layers that diffusers' converters of native files know.
BLOCKS = {
    "flux": "single_transformer_blocks.",
    "hunyuan-video": "transformer_blocks.",
    "wan": "blocks.",
    "qwen-image": "transformer_blocks.",
}


@pytest.fixture
def narrow(monkeypatch):
    """diffusers' converters of native LoRA names, for the width of the tiny models."""
    from diffusers.loaders import lora_conversion_utils as conversion

    sizes = {3072: 24, 12288: 96}

    def swap(constant):
        if isinstance(constant, tuple):
            return tuple(map(swap, constant))
        if isinstance(constant, types.CodeType):
            return constant.replace(co_consts=swap(constant.co_consts))
        return sizes.get(constant, constant) if type(constant) is int else constant

    for name in ("kohya_flux", "hunyuan_video"):
        function = getattr(conversion, f"_convert_{name}_lora_to_diffusers")
        monkeypatch.setattr(function, "__code__", swap(function.__code__))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "dialect"),
    [("flux", "kohya"), ("hunyuan-video", "comfyui"), ("wan", "comfyui"), ("wan", "kohya"),
     ("qwen-image", "comfyui"), ("qwen-image", "kohya")],
)  # fmt: skip
def test_diffusers_loads_native_names(name, dialect, transformers, tmp_path):
    model, base = transformers(name)
    sites = [s for s in base.weights if BLOCKS[name] in s.module and "norm" not in s.module]
    updates = {s: some_update(base.at(s).shape, "low rank", 1) for s in sites}
    adapter = Adapter(updates, name="a")
    write(adapter, base, tmp_path / "a.safetensors", dialect)
    assert_close(judge_mixin(name, model, tmp_path / "a.safetensors"), wanted_of(adapter))


@pytest.mark.parametrize("dialect", ["peft", "diffusers"])
def test_biases_travel_where_every_layer_has_one(dialect, transformers, tmp_path):
    model, base = transformers("flux")
    layers = [s for s in base.weights if "transformer_blocks.0." in s.module][:6]
    adapter = Adapter({}, name="a")
    for i, site in enumerate(layers):
        if i != 2:  # one whose bias alone changes
            adapter.updates[site] = some_update(base.at(site).shape, "low rank", i)
        if i != 1:
            bias = site.with_parameter("bias")
            adapter.updates[bias] = some_update(base.at(bias).shape, "dense", i)
    assert holdable(adapter, base, dialect) == {}
    out = tmp_path / ("out" if dialect == "peft" else "a.safetensors")
    write(adapter, base, out, dialect)
    if dialect == "diffusers":
        assert_close(judge_mixin("flux", model, out), wanted_of(adapter))
    else:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = PeftModel.from_pretrained(copy.deepcopy(model), str(out)).merge_and_unload()
        state = {k: v - model.state_dict()[k] for k, v in merged.state_dict().items()}
        assert_close(state, wanted_of(adapter))
    again = load_adapter(out, base)
    assert_close(changed(base, again), changed(base, adapter))


@pytest.mark.parametrize("dialect", ["peft", "diffusers"])
def test_what_peft_layers_cannot_hold_is_refused_by_name(dialect, transformers, tmp_path):
    _, base = transformers("sd3")
    adapter = every_kind(base)
    refused = holdable(adapter, base, dialect)
    out = tmp_path / ("out" if dialect == "peft" else "a.safetensors")
    assert write(adapter, base, out, dialect).refused == refused
    norms = {str(s) for s in adapter.updates if s in base.others and s.parameter == "weight"}
    assert norms
    assert all("normalisations" in refused[n] for n in norms)
    again = load_adapter(out, base)
    held = only(adapter, {s for s in adapter.updates if str(s) not in refused})
    assert_close(changed(base, again), changed(base, held))


def test_one_layer_without_a_bias_refuses_them_all(sd, tmp_path):
    with_bias = f"unet.{UNET_LINEAR.replace('to_q', 'to_out.0')}"
    adapter = random_adapter(sd, {f"unet.{UNET_LINEAR}": 2, with_bias: 2})
    bias = next(s for s in adapter.updates if str(s) == with_bias).with_parameter("bias")
    adapter.updates[bias] = some_update(sd.at(bias).shape, "dense", 1)
    refused = write(adapter, sd, tmp_path / "a.safetensors", "diffusers").refused
    assert set(refused) == {str(bias)}
    assert UNET_LINEAR in refused[str(bias)]
    assert not any(k.endswith("bias") for k in load_file(tmp_path / "a.safetensors"))


def test_every_form_loads_in_peft(llama_model, llama_base, tmp_path):
    adapter = every_kind(llama_base, share=0.4)
    held = only(adapter, {s for s in adapter.updates if s in llama_base.weights})
    write(held, llama_base, tmp_path / "out", "peft")
    wanted = {s.module: delta(u) for s, u in held.updates.items()}
    found = judge_peft(llama_model, tmp_path / "out")
    assert_close(found, wanted)


def test_an_embedding_read_from_lora_x_is_one_for_peft(llama_model, llama_base, tmp_path):
    site = Site("", "model.embed_tokens")
    shape = llama_base.at(site).shape
    adapter = Adapter({site: some_update(shape, "low rank", 2)}, name="a")
    write(adapter, llama_base, tmp_path / "x.safetensors", "lora-x")
    again = load_adapter(tmp_path / "x.safetensors", llama_base)
    write(again, llama_base, tmp_path / "out", "peft")
    wanted = {site.module: delta(adapter.updates[site])}
    assert_close(judge_peft(llama_model, tmp_path / "out"), wanted)


def test_conv1d_and_embeddings_in_lora_x(gpt2_model, gpt2_base, tmp_path):
    kinds = ("low rank", "dense", "kronecker")
    adapter = every_kind(gpt2_base, share=0.6, kinds=kinds)
    held = only(adapter, {s for s in adapter.updates if s in gpt2_base.weights})
    write(held, gpt2_base, tmp_path / "x.safetensors", "lora-x")
    again = load_adapter(tmp_path / "x.safetensors", gpt2_base)
    assert_close(changed(gpt2_base, again, ""), changed(gpt2_base, held, ""))
    write(again, gpt2_base, tmp_path / "out", "peft")
    wanted = {s.module: delta(u) for s, u in held.updates.items()}
    assert_close(judge_peft(gpt2_model, tmp_path / "out"), wanted)


# ---------------------------------------------------------------- U-Nets


@pytest.mark.parametrize("form", ["lora", "diff"])
@pytest.mark.parametrize("name", ["sd", "xl"])
@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
def test_unets_by_the_readers_rules(dialect, name, form, request, tmp_path):
    base = request.getfixturevalue(name)
    adapter = every_kind(base, share=0.3)
    sites = {s for s in adapter.updates if s.component == "unet"}
    adapter = only(adapter, sites)
    write(adapter, base, tmp_path / "a.safetensors", dialect, form=form)
    file = load_file(tmp_path / "a.safetensors")
    if dialect == "kohya" and name == "sd":
        found = rules.kohya(file, own_state(base, "unet"))
        assert_close(found, changed(base, adapter, "unet"))
    else:
        found = (rules.kohya if dialect == "kohya" else rules.comfyui)(
            file, native_state(base, "unet")
        )
        assert_close(found, renamed(changed(base, adapter, "unet")))
    again = load_adapter(tmp_path / "a.safetensors", base)
    assert_close(changed(base, again, "unet"), changed(base, adapter, "unet"))


def renamed(state):
    table = to_ldm({key.rpartition(".")[0] for key in state})
    return {f"{table[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in state.items()}


@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
def test_text_encoders_by_the_readers_rules(dialect, xl, tmp_path):
    adapter = every_kind(xl, share=0.5)
    refused = holdable(adapter, xl, dialect)
    write(adapter, xl, tmp_path / "a.safetensors", dialect)
    file = load_file(tmp_path / "a.safetensors")
    for component, te, encoder in (
        ("text_encoder", "lora_te1_", "clip_l"),
        ("text_encoder_2", "lora_te2_", "clip_g"),
    ):
        front = te if dialect == "kohya" else f"text_encoders.{encoder}.transformer."
        own = {k: v for k, v in file.items() if k.startswith(front)}
        state = own_state(xl, component)
        found = (
            rules.kohya(own, state, front)
            if dialect == "kohya"
            else rules.comfyui(own, state, front=front)
        )
        held = only(adapter, {s for s in adapter.updates if str(s) not in refused})
        assert_close(found, changed(xl, held, component))
    tables = {n for n in refused if n.endswith("_embedding")}
    assert bool(tables) == (dialect == "kohya")


def flux_pipeline(folder):
    """Flux: a transformer, a CLIP and a T5 of tiny size."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    t5 = T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
    save(build(*ARCHITECTURES["flux"].models[0]), folder / "transformer")
    save(clip(), folder / "text_encoder")
    save(T5EncoderModel(t5), folder / "text_encoder_2")
    return open_base(folder)


@pytest.mark.parametrize("dialect", ["kohya", "comfyui", "diffusers", "lora-x"])
def test_flux_with_its_text_encoders(dialect, tmp_path):
    base = flux_pipeline(tmp_path / "base")
    adapter = every_kind(base, share=0.2)
    path = tmp_path / "a.safetensors"
    refused = write(adapter, base, path, dialect).refused
    file = load_file(path)
    fronts = {"kohya": ("lora_te1_", "lora_te3_"),
              "comfyui": ("text_encoders.clip_l.transformer.",
                          "text_encoders.t5xxl.transformer."),
              }.get(dialect, ("text_encoder.", "text_encoder_2."))  # fmt: skip
    held = only(adapter, {s for s in adapter.updates if str(s) not in refused})
    again = load_adapter(path, base)
    for component, front in zip(("text_encoder", "text_encoder_2"), fronts, strict=True):
        own = {k: v for k, v in file.items() if k.startswith(front)}
        assert own
        state, wanted = own_state(base, component), changed(base, held, component)
        if dialect == "kohya":
            assert_close(rules.kohya(own, state, front), wanted)
        elif dialect == "comfyui":
            assert_close(rules.comfyui(own, state, front=front), wanted)
        assert_close(changed(base, again, component), wanted)


@pytest.mark.parametrize("form", ["lora", "diff"])
def test_lycoris_reads_kohya_files(form, sd, sd_models, tmp_path):
    from lycoris.modules import get_module, make_module

    adapter = every_kind(sd, share=0.25)
    norms = [s for s in sd.others if s.parameter == "weight" and s.component == "unet"][:3]
    kept = {s for s in adapter.updates if s.component == "unet" and s in sd.weights}
    adapter = only(adapter, kept)
    for i, site in enumerate(norms):
        for one in (site, site.with_parameter("bias")):
            adapter.updates[one] = some_update(sd.at(one).shape, "dense", i)
    write(adapter, sd, tmp_path / "a.safetensors", "kohya", form=form)
    file = load_file(tmp_path / "a.safetensors")
    unet = copy.deepcopy(sd_models[0])
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    read = set()
    for name, module in unet.named_modules():  # as lycoris.kohya.create_network_from_weights does
        flat = f"lora_unet_{name.replace('.', '_')}"
        kind, tensors = get_module(file, flat)
        if kind is not None:
            make_module(kind, tensors, flat, module).merge_to(1.0)
            read.add(flat)
    assert read == {k.partition(".")[0] for k in file}
    found = {k: v - before[k] for k, v in unet.state_dict().items()}
    assert_close(found, wanted_of(adapter))
