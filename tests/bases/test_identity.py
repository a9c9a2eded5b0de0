"""What a base is, and what an adapter file was made for."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.published import PUBLISHED, sizes
from regraft.adapters import Site
from regraft.bases import Base, Weight, architecture
from regraft.bases.made_for import Candidate, made_for
from regraft.bases.native_tables import module_of, table_of
from regraft.bases.published import published
from regraft.bases.spelling import family_of_spelling, same_made_for
from regraft.bases.unet_names import to_ldm
from tests.factories import SD15, SDXL, gpt2, llama

SD2 = {**SD15, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}
SSD_1B = {
    **SDXL,
    "transformer_layers_per_block": (1, 2, 4),
    "reverse_transformer_layers_per_block": ([4, 4, 10], [2, 1, 1], 1),
    "mid_block_type": None,
}
BY_LABEL = {p.label: p for p in published()}


def base_of(shapes, component, path="x", config=None):
    """A base with these weights, without a file."""
    weights = {
        site: Weight(site, shape, torch.float16, None, "", site.module)  # type: ignore[arg-type]
        for module, shape in shapes.items()
        for site in [Site(component, module)]
    }
    matrices = {s: w for s, w in weights.items() if len(w.shape) > 1}
    others = {s: w for s, w in weights.items() if len(w.shape) < 2}
    configs = {component: config} if config else {}
    return Base(str(path), Path(path), matrices, configs, others)


def weights_of(model):
    return {
        k.removesuffix(".weight"): tuple(v.shape)
        for k, v in model.state_dict().items()
        if k.endswith(".weight")
    }


def unet_shapes(config):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return weights_of(UNet2DConditionModel(**config))


@cache
def transformer_shapes(label):
    import diffusers

    _, _, _, _, class_name, config = next(p for p in PUBLISHED if p[0] == label)
    with torch.device("meta"):
        return weights_of(getattr(diffusers, class_name)(**config))


def adapter(shapes, like=r"", prefix="", flat=False):
    """The names and shapes an adapter of these layers has."""
    return {
        prefix + (m.replace(".", "_") if flat else m): (s[0], math.prod(s[1:]))
        for m, s in shapes.items()
        if len(s) == 2 and re.search(like, m)
    }


@pytest.mark.parametrize(
    ("config", "label", "modelspec", "kohya"),
    [
        (SD15, "Stable Diffusion 1.x", "stable-diffusion-v1", "sd_v1"),
        (SD2, "Stable Diffusion 2.x", "stable-diffusion-v2-512", "sd_v2"),
        (SDXL, "Stable Diffusion XL", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
        (SSD_1B, "SSD-1B", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
        (
            {**SD15, "in_channels": 9},
            "Stable Diffusion 1.x inpainting",
            "stable-diffusion-v1",
            "sd_v1",
        ),
    ],
)
def test_unets(config, label, modelspec, kohya):
    found = architecture(base_of(unet_shapes(config), "unet"))
    assert found is not None
    assert (found.label, found.modelspec, found.kohya) == (label, modelspec, kohya)


def test_a_v_prediction_model_is_told_by_its_scheduler(tmp_path):
    shapes = unet_shapes(SD2)
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"prediction_type": "v_prediction"}))
    found = architecture(base_of(shapes, "unet", tmp_path))
    assert found is not None
    assert found.kohya == "sd_v2_v"
    path.write_text(json.dumps({"prediction_type": "epsilon"}))
    found = architecture(base_of(shapes, "unet", tmp_path, {"sample_size": 96}))
    assert found is not None
    assert found.kohya == "sd_v2"


@pytest.mark.parametrize(
    "label", [p.label for p in published() if p.label not in ("HiDream-I1", "LTX-2")]
)
def test_transformers(label):
    found = architecture(base_of(transformer_shapes(label), "transformer", f"some {label}"))
    assert found is not None
    assert found.label == label
    assert found.modelspec == BY_LABEL[label].modelspec
    assert found.kohya == BY_LABEL[label].kohya


def test_wan_of_two_versions_has_one_shape(tmp_path):
    shapes = transformer_shapes("Wan 2.1 T2V 14B")
    found = architecture(base_of(shapes, "transformer"))
    assert found is not None
    assert found.label == "Wan 2.1 T2V 14B or 2.2 T2V A14B"
    (tmp_path / "transformer_2").mkdir()
    found = architecture(base_of(shapes, "transformer", tmp_path))
    assert found is not None
    assert found.label == "Wan 2.2 T2V A14B"


def test_hunyuan_from_images_is_told_by_its_config():
    shapes = transformer_shapes("HunyuanVideo")
    config = {"image_condition_type": "token_replace"}
    found = architecture(base_of(shapes, "transformer", config=config))
    assert found is not None
    assert found.label == "HunyuanVideo I2V"


def test_a_pruned_transformer_says_so():
    whole = transformer_shapes("Flux.1 dev")
    fewer = {m: s for m, s in whole.items() if not re.match(r"transformer_blocks\.1\d\.", m)}
    found = architecture(base_of(fewer, "transformer"))
    assert found is not None
    assert found.label == "Flux.1 dev with 48 of 57 blocks"


def test_unknown_sizes_have_no_name():
    assert architecture(base_of({"conv_in": (32, 4, 3, 3)}, "unet")) is None
    assert architecture(base_of(weights_of(llama()), "")) is None
    narrow = {m: (s[0], s[1] // 2) for m, s in transformer_shapes("Z-Image").items() if len(s) == 2}
    assert architecture(base_of(narrow, "transformer")) is None


@pytest.mark.parametrize("label", ["Wan 2.1 I2V 14B", "AuraFlow", "Stable Diffusion 3 Medium"])
def test_the_sizes_are_those_of_the_classes(label):
    _, names, _, _, class_name, config = next(p for p in PUBLISHED if p[0] == label)
    made = sizes(names, class_name, config)
    assert made["depths"] == BY_LABEL[label].depths
    assert set(made["shapes"]) == set(BY_LABEL[label].shapes)


# What an adapter was made for


def first(modules):
    found = made_for(modules)
    return found[0].label if found else None


@pytest.mark.parametrize(
    ("config", "label"),
    [
        (SD15, "Stable Diffusion 1.x"),
        (SD2, "Stable Diffusion 2.x"),
        (SDXL, "Stable Diffusion XL"),
        (SSD_1B, "Stable Diffusion XL or SSD-1B"),
    ],
)
def test_adapters_of_unets(config, label):
    shapes = unet_shapes(config)
    attention = adapter(shapes, r"attn[12]\.to_")
    assert first({f"unet.{m}": s for m, s in attention.items()}) == label
    assert first({f"lora_unet_{m.replace('.', '_')}": s for m, s in attention.items()}) == label
    ldm = to_ldm(shapes)
    flat = {f"lora_unet_{ldm[m].replace('.', '_')}": s for m, s in attention.items()}
    assert first(flat) == label
    width = str(config["cross_attention_dim"])
    assert width in made_for(attention)[0].evidence


def native_adapter(model):
    """All layers of a published transformer under their native names."""
    modules = {}
    for entry in table_of(model.names).entries:
        held = [module_of(c).replace("$", "#") for c, _ in entry.parts]
        if entry.native.endswith(".weight") and all(h in model.shapes for h in held):
            shapes = [max(model.shapes[h]) for h in held]
            stack = held[0].partition(".#")[0]
            for i in range(model.depths.get(stack, 0)) if "#" in held[0] else [0]:
                name = module_of(entry.filled(str(i)).native)
                modules[name] = (sum(s[0] for s in shapes), shapes[0][1])
    return modules


@pytest.mark.parametrize("model", published(), ids=lambda p: p.label)
def test_adapters_of_transformers(model):
    native = native_adapter(model)
    for modules in (
        {f"diffusion_model.{m}": s for m, s in native.items()},
        {f"lora_unet_{m.replace('.', '_')}": s for m, s in native.items()},
    ):
        assert first(modules) in (model.label, model.together)


@pytest.mark.parametrize(
    "label",
    [
        "Flux.1 dev", "Flux.2 dev", "Flux.2 klein 4B", "Stable Diffusion 3.5 Large",
        "Stable Diffusion 3.5 Medium", "HunyuanVideo", "Wan 2.1 T2V 1.3B", "Wan 2.1 T2V 14B",
        "Wan 2.2 TI2V 5B", "Qwen-Image", "Z-Image", "LTX-Video 2B", "LTX-Video 13B", "AuraFlow",
        "Lumina-Image 2.0",
    ],
)  # fmt: skip
def test_an_adapter_of_attention_alone_is_enough(label):
    found = made_for(adapter(transformer_shapes(label), r"attn|attention", "transformer."))
    assert found[0].label in (label, BY_LABEL[label].together)
    assert "blocks" in found[0].evidence
    assert found[0].family == BY_LABEL[label].names


def test_without_shapes_the_names_speak():
    names = adapter(transformer_shapes("Flux.1 dev"), r"attn\.to_q", "transformer.")
    found = made_for(dict.fromkeys(names, (None, None)))
    assert "Flux.1" in [c.label for c in found]
    ours = {m: s for m, s in names.items() if "single" in m}
    assert first(ours) == "Flux.1"


def test_chroma_and_flux_cannot_always_be_told_apart():
    names = adapter(transformer_shapes("Flux.1 dev"), r"attn\.", "transformer.")
    assert {c.label for c in made_for(names)} >= {"Flux.1", "Chroma"}
    modulated = adapter(transformer_shapes("Flux.1 dev"), r"attn\.|norm1\.linear", "transformer.")
    assert {c.label for c in made_for(modulated)} == {"Flux.1"}


def test_a_transformer_of_another_size():
    small = {f"transformer.single_transformer_blocks.{i}.attn.to_q": (64, 64) for i in range(3)}
    assert "Flux.1 of another size" in [c.label for c in made_for(small)]


def test_language_models():
    assert first(adapter(weights_of(gpt2()), r"\.h\.\d+\.(attn|mlp)")) == "GPT-2"
    own = adapter(weights_of(llama()), "proj", "base_model.model.")
    assert first(own) == "A Llama-, Qwen- or Gemma-like language model of width 16"
    layer = "base_model.model.model.layers.0"
    modules = {
        f"{layer}.self_attn.q_proj": (4096, 4096),
        f"{layer}.self_attn.v_proj": (1024, 4096),
    }
    labels = [c.label for c in made_for(modules)]
    assert labels == ["Llama 3 8B or Mistral 7B", "Qwen 3 8B"]
    modules[f"{layer}.mlp.up_proj"] = (12288, 4096)
    assert [c.label for c in made_for(modules)] == ["Qwen 3 8B"]


def test_adapters_of_text_encoders_alone():
    def names(prefix, width):
        return {f"{prefix}text_model_encoder_layers_0_self_attn_q_proj": (width, width)}

    assert first(names("lora_te_", 768)) == "Stable Diffusion 1.x"
    assert first(names("lora_te_", 1024)) == "Stable Diffusion 2.x"
    both = names("lora_te1_", 768) | names("lora_te2_", 1280)
    assert first(both) == "Stable Diffusion XL or SSD-1B"


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=40), st.tuples(st.none() | st.integers(), st.none())))
def test_any_names_at_all_do_no_harm(modules):
    made_for(modules)


@pytest.mark.parametrize(
    ("texts", "family"),
    [
        (("sd_v1", "sd_1.5", "stable-diffusion-v1/lora", "runwayml/stable-diffusion-v1-5"), "sd1"),
        (("sd_v2", "sd_v2_v", "sd_2.1", "stable-diffusion-v2-768-v/lora"), "sd2"),
        (("sdxl_base_v1-0", "sdxl_", "sdxl_1.0", "stable-diffusion-xl-v1-base/lora"), "sdxl"),
        (("stable-diffusion-3-5-large/lora", "stable-diffusion-v3-medium"), "sd3"),
        (("flux1", "flux-1-dev/lora", "Flux.1-dev/lora", "flux_kontext"), "flux"),
        (("flux_2_dev", "Flux.2-klein-9b/lora", "flux2_klein_9b"), "flux-2"),
        (("wan", "wan2.1/lora", "Wan-AI/Wan2.2-T2V-A14B"), "wan"),
        (("hunyuan_video", "hunyuan-video/lora"), "hunyuan-video"),
        (("qwen_image", "Qwen-Image-Edit/lora"), "qwen-image"),
        (("z_image", "Z-Image/lora"), "z-image"),
        (("lumina2", "lumina-2/lora"), "lumina-2"),
        (("chroma", "chroma/lora"), "chroma"),
        (("framepack", "framepack/lora"), "framepack"),
        (("", "something else"), None),
    ],
)
def test_spellings(texts, family):
    assert [family_of_spelling(t) for t in texts] == [family] * len(texts)


def test_metadata_against_layers():
    xl = [Candidate("Stable Diffusion XL", "sdxl", "cross-attention input 2048")]
    assert same_made_for({"ss_base_model_version": "sdxl_"}, xl) is None
    assert same_made_for({}, xl) is None
    assert same_made_for({"ss_base_model_version": "sd_v1"}, []) is None
    wrong = same_made_for({"modelspec.architecture": "stable-diffusion-v1/lora"}, xl)
    assert wrong is not None
    assert "stable-diffusion-v1/lora" in wrong
    assert "Stable Diffusion XL" in wrong
    packed = [Candidate("HunyuanVideo", "hunyuan-video", "")]
    assert same_made_for({"ss_base_model_version": "framepack"}, packed) is None
