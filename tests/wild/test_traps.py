"""Files that other readers lose or misread: ours is right. What diffusers 0.42 does is said beside.

Each test first shows what diffusers' own loader makes of the file, as a record: it is not required
to stay wrong. What is required is that every site comes out as its writer meant.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file

from regraft.adapters import delta
from regraft.dialects import load_adapter
from tests.wild import pieces
from tests.wild.made import filed
from tests.wild.pieces import AB, KOHYA, dora, lora, lycoris
from tests.wild.places import (
    CLIP_FLUX,
    IMAGE_QKV,
    LDM,
    LINEAR1,
    NATIVE,
    SD,
    T5_FLUX,
    T5_SD3,
    at,
    dotted,
    flat,
)
from tests.wild.worlds import world

pytestmark = pytest.mark.filterwarnings("ignore")
FLUX = at("flux", "double_blocks.1.img_attn.qkv", *IMAGE_QKV)
NATIVE_PLACES = {what: place for what, _, place in NATIVE}


def theirs(pipeline, path, **options):
    """The keys that a diffusers pipeline makes of a file, or the error it raises."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = getattr(diffusers, pipeline).lora_state_dict(load_file(path), **options)
        except Exception as error:  # whatever it is, it is theirs
            return error
    return found[0] if isinstance(found, tuple) else found


def assert_ours(made):
    adapter = load_adapter(made.adapter, made.base)
    assert not adapter.refused
    assert {str(site) for site in adapter.updates} == set(made.wanted)
    for site, update in adapter.updates.items():
        wanted = made.wanted[str(site)].double()
        assert torch.allclose(delta(update).double(), wanted, atol=1e-5), site


def record(record_property, found):
    """Keep what diffusers does in the test report."""
    said = repr(found)[:200] if isinstance(found, Exception) else f"{len(found)} keys"
    record_property("diffusers", said)


def test_t5_keys_of_a_flux_file_vanish(tmp_path, record_property):
    """kohya's ``lora_te3_``: diffusers leaves them out without a word."""
    places = (flat("lora_unet_", FLUX), flat("lora_te1_", CLIP_FLUX), flat("lora_te3_", T5_FLUX))
    made = filed(*places, maker=lora())(tmp_path)
    record(record_property, theirs("FluxPipeline", made.adapter))
    assert_ours(made)
    assert any(site.startswith("text_encoder_2.") for site in made.wanted)


@pytest.mark.parametrize(
    ("what", "kind", "maker"),
    [
        ("LoHa", "linear", lycoris("LohaModule")),
        ("LoKr", "linear", lycoris("LokrModule", factor=4)),
        ("Tucker", "3×3 conv", lycoris("LoConModule", use_tucker=True)),
        ("full", "linear", pieces.difference(".diff")),
    ],
)
def test_lycoris_files_raise(what, kind, maker, tmp_path, record_property):
    """diffusers' converter of SD files raises on LoHa, LoKr, Tucker cores and whole changes."""
    made = filed(flat("lora_unet_", LDM[kind]), maker=maker)(tmp_path)
    config = world("xl").models["unet"].config
    record(record_property, theirs("StableDiffusionXLPipeline", made.adapter, unet_config=config))
    assert_ours(made)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_a_wan_file_with_some_layers_only(prefix, tmp_path, record_property):
    """diffusers asks for every layer of every block between the first and the last: KeyError."""
    place = NATIVE_PLACES["Wan self-attention"]
    named = flat(prefix, place) if prefix.endswith("_") else dotted(prefix, place)
    made = filed(named, maker=lora())(tmp_path)
    record(record_property, theirs("WanPipeline", made.adapter))
    assert_ours(made)


def test_sd3_kohya_names_pass_unchanged(tmp_path, record_property):
    """diffusers returns ``lora_unet_joint_blocks_…`` as it is, and nothing is loaded."""
    places = (
        flat("lora_unet_", NATIVE_PLACES["SD3 qkv"]),
        flat("lora_unet_", NATIVE_PLACES["SD3 mlp"]),
        flat("lora_te3_", T5_SD3),
    )
    made = filed(*places, maker=lora())(tmp_path)
    record(record_property, theirs("StableDiffusion3Pipeline", made.adapter))
    assert_ours(made)


@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("kind", ["linear", "3×3 conv"])
def test_dora_scale_is_stripped(out, kind, tmp_path, record_property):
    """Every loader of diffusers drops ``dora_scale``, and what is left is another change."""
    made = filed(flat("lora_unet_", SD[kind]), maker=dora(KOHYA, ".dora_scale", out=out))(tmp_path)
    record(record_property, theirs("StableDiffusionPipeline", made.adapter))
    assert_ours(made)
    plain = filed(flat("lora_unet_", SD[kind]), maker=lora())(tmp_path)
    site = next(iter(made.wanted))
    assert not torch.allclose(made.wanted[site], plain.wanted[site], atol=1e-2)


def test_z_image_fused_qkv_passes_unchanged(tmp_path, record_property):
    """ComfyUI's ``attention.qkv`` of Z-Image: diffusers has no module of that name."""
    made = filed(dotted("diffusion_model.", NATIVE_PLACES["Z-Image qkv"]), maker=lora(AB))(tmp_path)
    record(record_property, theirs("ZImagePipeline", made.adapter))
    assert_ours(made)


def test_comfyui_names_of_flux_pass_unchanged(tmp_path, record_property):
    """``diffusion_model.double_blocks…``: diffusers returns them as they are."""
    places = (
        dotted("diffusion_model.", FLUX),
        at("flux", "diffusion_model.single_blocks.1.linear1", *LINEAR1),
    )
    made = filed(*places, maker=lora(AB))(tmp_path)
    record(record_property, theirs("FluxPipeline", made.adapter))
    assert_ours(made)


def test_lokr_of_a_fused_layer(tmp_path, record_property):
    """A LoKr of fused qkv has no exact LoKr for each part: ΔW is built first, then cut."""
    made = filed(flat("lora_unet_", FLUX), maker=lycoris("LokrModule", factor=4))(tmp_path)
    record(record_property, theirs("FluxPipeline", made.adapter))
    assert_ours(made)


def test_musubi_hunyuan_names(tmp_path, record_property):
    """musubi-tuner's ``lora_unet_double_blocks_…`` of HunyuanVideo: ValueError in diffusers."""
    place = flat("lora_unet_", NATIVE_PLACES["HunyuanVideo qkv"])
    made = filed(place, maker=lora())(tmp_path)
    record(record_property, theirs("HunyuanVideoPipeline", made.adapter))
    assert_ours(made)
