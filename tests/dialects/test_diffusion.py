"""kohya, diffusers and LoRA-X files: ΔW as diffusers' own loaders have it, in both directions."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from regraft.bases import open_base
from regraft.bases.unet_names import to_ldm
from regraft.dialects import load_adapter
from regraft.dialects.names import flatten
from regraft.errors import (
    BadOption,
    MalformedFile,
    OutputFailed,
    ShapeMismatch,
    SitesNotInBase,
)
from tests.dialects.loaders import (
    TEXTS,
    UNET,
    assert_same,
    canonical,
    deltas_in,
    deltas_of,
    judge_diffusers,
    pipeline,
    random_adapter,
    sites_of,
    with_deltas,
    write,
)
from tests.factories import TINY_XL, UNET_1X1, UNET_3X3, UNET_LINEAR, ldm_file, unet

IN_XL = (*UNET, "add_embedding.linear_2", "down_blocks.1.attentions.0.proj_out")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


def kohya_state(base, names, alpha=None, rank=3):
    """A kohya file written by hand: site → kohya's name for it."""
    generator = torch.Generator().manual_seed(5)
    state, wanted = {}, {}
    for site, name in names.items():
        shape = base.weights[site].shape
        down = torch.randn(rank, *shape[1:], generator=generator) * 0.3
        up = torch.randn(shape[0], rank, *([1] * (len(shape) - 2)), generator=generator) * 0.3
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = down, up
        scale = 1.0
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(float(alpha))
            scale = alpha / rank if alpha else 1.0
        wanted[str(site)] = scale * (up.flatten(1) @ down.flatten(1)).reshape(shape)
    return state, wanted


def kohya_names(base, modules, *, ldm=False, te=("lora_te_",)):
    """site → name, by kohya's own rule: the module's path with underscores for dots."""
    table = to_ldm(s.module for s in base.weights if s.component == "unet") if ldm else {}
    by_text = {str(s): s for s in base.weights}
    names = {by_text[f"unet.{m}"]: f"lora_unet_{flatten(table.get(m, m))}" for m in modules}
    for component, prefix in zip(("text_encoder", "text_encoder_2"), te, strict=False):
        names |= {by_text[f"{component}.{m}"]: prefix + flatten(m) for m in TEXTS}
    return names


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_reading_kohya_sd(alpha, sd, sd_models, tmp_path):
    state, wanted = kohya_state(sd, kohya_names(sd, UNET), alpha)
    path = tmp_path / "style.safetensors"
    save_file(state, path)
    adapter = load_adapter(path, sd)
    assert (adapter.dialect, adapter.name, adapter.refused) == ("kohya", "style", {})
    assert_same(deltas_of(adapter), wanted)
    theirs = judge_diffusers(pipeline(*sd_models), path)
    assert_same(theirs, wanted)


def test_an_alpha_of_zero_means_the_rank(sd, tmp_path):
    # As sd-scripts reads it; diffusers would load a LoRA that does nothing.
    state, wanted = kohya_state(sd, kohya_names(sd, UNET), 0)
    save_file(state, tmp_path / "a.safetensors")
    assert_same(deltas_of(load_adapter(tmp_path / "a.safetensors", sd)), wanted)


@pytest.mark.parametrize("ldm", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_reading_kohya_sdxl(ldm, single, xl, xl_models, tmp_path):
    base = open_base(ldm_file(tmp_path / "xl.safetensors", TINY_XL)) if single else xl
    names = kohya_names(base, IN_XL, ldm=ldm, te=("lora_te1_", "lora_te2_"))
    if ldm:
        assert any("input_blocks_" in n for n in names.values())
    state, wanted = kohya_state(base, names, 2)
    save_file(state, tmp_path / "style.safetensors")
    adapter = load_adapter(tmp_path / "style.safetensors", base)
    assert_same(deltas_of(adapter), wanted)
    if ldm and not single:
        theirs = judge_diffusers(pipeline(*xl_models), tmp_path / "style.safetensors")
        assert_same(theirs, wanted)


def test_the_well_known_sdxl_name(xl, tmp_path):
    # The real names of a real file, against a real U-Net's names and shapes.
    from tests.factories import SDXL

    with torch.device("meta"):
        model = unet(SDXL)
    state = {k: torch.zeros(v.shape[0], 1).expand(v.shape[0], v[0].numel()).reshape(v.shape)
             for k, v in model.state_dict().items()
             if k.startswith(("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
                              "down_blocks.0.downsamplers", "down_blocks.0.resnets",
                              "conv_in", "add_embedding")) and k.endswith("weight")
             and v.ndim > 1}  # fmt: skip
    save_file({k: v.half().contiguous() for k, v in state.items()}, tmp_path / "b.safetensors")
    base = open_base(tmp_path / "b.safetensors")
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    lora = {f"{name}.lora_down.weight": torch.ones(2, 640),
            f"{name}.lora_up.weight": torch.ones(640, 2)}  # fmt: skip
    save_file(lora, tmp_path / "a.safetensors")
    (site,) = load_adapter(tmp_path / "a.safetensors", base).updates
    assert str(site) == "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def trained_pipeline(models, **config):
    """A pipeline with random LoRA on its U-Net and text encoder, by diffusers' own means."""
    torch.manual_seed(2)
    pipe = pipeline(*models)
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **config}
    pipe.unet.add_adapter(LoraConfig(target_modules=list(UNET), **config))
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj", "fc1"], **config))
    return pipe


def pipeline_deltas(pipe):
    return {
        f"{c}.{canonical(c, n)}": v
        for c in ("unet", "text_encoder")
        for n, v in deltas_in(getattr(pipe, c)).items()
    }


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"rank_pattern": {"conv_in": 2}}])
def test_reading_what_diffusers_saves(with_metadata, extra, sd, sd_models, tmp_path):
    config = {} if with_metadata else {"lora_alpha": 4}
    extra = extra if with_metadata else {}
    pipe = trained_pipeline(sd_models, **config, **extra)
    text = get_peft_model_state_dict(pipe.text_encoder)
    layers = {
        "unet_lora_layers": get_peft_model_state_dict(pipe.unet),
        "text_encoder_lora_layers": convert_state_dict_to_diffusers(text),
    }
    meta = {
        "unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict(),
        "text_encoder_lora_adapter_metadata": pipe.text_encoder.peft_config["default"].to_dict(),
    }
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path), **layers, **(meta if with_metadata else {})
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    adapter = load_adapter(path, sd)
    assert (adapter.dialect, adapter.prefixed) == ("diffusers", True)
    assert_same(deltas_of(adapter), pipeline_deltas(pipe))
    assert_same(judge_diffusers(pipeline(*sd_models), path), deltas_of(adapter))


@pytest.mark.parametrize("rslora", [True, False])
def test_reading_a_bare_unet_file(rslora, sd, sd_models, tmp_path):
    pipe = trained_pipeline(sd_models, use_rslora=rslora)
    pipe.unet.save_lora_adapter(str(tmp_path / "in"))
    adapter = load_adapter(tmp_path / "in", sd)
    assert (adapter.dialect, adapter.prefixed) == ("diffusers", False)
    assert_same(deltas_of(adapter, component=False), deltas_in(pipe.unet))
    # And what is written for it has no component in front either.
    write(adapter, sd, tmp_path / "out.safetensors", "diffusers")
    model = copy.deepcopy(sd_models[0])
    model.load_lora_adapter(str(tmp_path / "out.safetensors"), prefix=None)
    assert_same(deltas_in(model), deltas_in(pipe.unet))


def test_reading_old_diffusers_names(sd, tmp_path):
    inside = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor."
    state = {}
    for layer in ("to_q", "to_out"):
        state[f"{inside}{layer}_lora.down.weight"] = torch.randn(2, 32)
        state[f"{inside}{layer}_lora.up.weight"] = torch.randn(32, 2)
    save_file(state, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", sd)
    found = {s.module.rpartition("attn1.")[2]: u for s, u in adapter.updates.items()}
    assert set(found) == {"to_q", "to_out.0"}


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_what_is_written_loads_in_diffusers(dialect, sd, sd_models, tmp_path):
    adapter = random_adapter(sd, sites_of(sd, UNET, "text_encoder"))
    path = tmp_path / "out.safetensors"
    write(adapter, sd, path, dialect)
    assert_same(judge_diffusers(pipeline(*sd_models), path), deltas_of(adapter))
    assert_same(deltas_of(load_adapter(path, sd)), deltas_of(adapter))


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_sdxl_files_load_in_diffusers(dialect, xl, xl_models, tmp_path):
    adapter = random_adapter(xl, sites_of(xl, IN_XL, "text_encoder", "text_encoder_2"))
    path = tmp_path / "out.safetensors"
    write(adapter, xl, path, dialect)
    keys = list(load_file(path))
    if dialect == "kohya":
        assert any(k.startswith("lora_unet_middle_block_1_") for k in keys)
        assert {k[:8] for k in keys if k.startswith("lora_te")} == {"lora_te1", "lora_te2"}
    assert_same(judge_diffusers(pipeline(*xl_models), path), deltas_of(adapter))
    assert_same(deltas_of(load_adapter(path, xl)), deltas_of(adapter))


@torch.no_grad()
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_the_image_model_changes_by_exactly_the_reported_update(dialect, sd, sd_models, tmp_path):
    adapter = random_adapter(sd, sites_of(sd, UNET))
    write(adapter, sd, tmp_path / "out.safetensors", dialect)
    pipe = pipeline(*sd_models)
    pipe.load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    generator = torch.Generator().manual_seed(0)
    args = (torch.randn(1, 4, 8, 8, generator=generator), 7,
            torch.randn(1, 3, 16, generator=generator))  # fmt: skip
    told = with_deltas(sd_models[0], deltas_of(adapter, component=False))(*args).sample
    assert torch.allclose(pipe.unet(*args).sample, told, atol=1e-5)
    assert not torch.allclose(sd_models[0](*args).sample, told, atol=1e-2)


def test_a_linear_update_on_a_1x1_convolution_and_back(sd, sd_models, xl, xl_models, tmp_path):
    from dataclasses import replace

    name = f"unet.{UNET_1X1}"
    for base, models, layout in ((sd, sd_models, "linear"), (xl, xl_models, "conv")):
        adapter = random_adapter(base, {name: 2}, layouts={name: layout})
        for dialect in ("kohya", "diffusers"):
            path = tmp_path / f"{layout}-{dialect}.safetensors"
            write(adapter, base, path, dialect)
            assert_same(judge_diffusers(pipeline(*models), path), deltas_of(adapter))
    site, update = next(iter(adapter.updates.items()))
    assert replace(update, layout="linear").rank == adapter.updates[site].rank


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(dtype, sd, sd_models, tmp_path):
    adapter = random_adapter(sd, sites_of(sd, UNET))
    write(adapter, sd, tmp_path / "a.safetensors", "kohya", dtype=dtype)
    tolerance = 0.02 if dtype == torch.float16 else 0.1
    assert_same(
        deltas_of(load_adapter(tmp_path / "a.safetensors", sd)), deltas_of(adapter), tolerance
    )


def test_what_does_not_fit_the_dtype_is_an_error_and_no_file(sd, tmp_path):
    from dataclasses import replace

    adapter = random_adapter(sd, sites_of(sd, UNET[:1]))
    site, update = next(iter(adapter.updates.items()))
    adapter.updates[site] = replace(update, up=update.up * 1e6)
    with pytest.raises(OutputFailed, match="float16"):
        write(adapter, sd, tmp_path / "a.safetensors", "kohya", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dialect", ["kohya", "comfyui"])
def test_dialects_say_what_they_cannot_hold(dialect, llama_base, tmp_path):
    name = "model.embed_tokens"
    adapter = random_adapter(llama_base, {name: 2}, layouts={name: "embedding"})
    with pytest.raises(BadOption) as caught:
        write(adapter, llama_base, tmp_path / "a.safetensors", dialect)
    assert "peft" in caught.value.fix
    with pytest.raises(BadOption, match="No dialect"):
        write(adapter, llama_base, tmp_path / "a.safetensors", "pickle")


# ---------------------------------------------------------------- what does not fit


def test_names_of_another_base(sd, xl, tmp_path):
    state, _ = kohya_state(xl, kohya_names(xl, ["add_embedding.linear_2"], te=()))
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(SitesNotInBase, match="add_embedding_linear_2") as caught:
        load_adapter(tmp_path / "a.safetensors", sd)
    assert "the base given" in caught.value.fix
    assert caught.value.file == str(tmp_path / "a.safetensors")


def test_names_that_flatten_alike_are_not_guessed_at(tmp_path):
    names = ("down_blocks.0.a.b_c.weight", "down_blocks.0.a_b.c.weight")
    save_file({n: torch.ones(4, 4) for n in names}, tmp_path / "b.safetensors")
    base = open_base(tmp_path / "b.safetensors")
    state = {"lora_unet_down_blocks_0_a_b_c.lora_down.weight": torch.ones(2, 4),
             "lora_unet_down_blocks_0_a_b_c.lora_up.weight": torch.ones(4, 2)}  # fmt: skip
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(SitesNotInBase, match=r"a\.b_c.*a_b\.c"):
        load_adapter(tmp_path / "a.safetensors", base)


def test_a_base_without_its_text_encoder(sd, tmp_path):
    state, wanted = kohya_state(sd, kohya_names(sd, UNET[:1]))
    save_file(state, tmp_path / "a.safetensors")
    unet_only = open_base(sd.path / "unet")
    adapter = load_adapter(tmp_path / "a.safetensors", unet_only)
    assert set(adapter.refused) == {"lora_te_" + flatten(m) for m in TEXTS}
    assert "without its text_encoder" in next(iter(adapter.refused.values()))
    assert set(deltas_of(adapter)) == {n for n in wanted if n.startswith("unet.")}
    save_file({k: v for k, v in state.items() if "_te_" in k}, tmp_path / "te.safetensors")
    with pytest.raises(SitesNotInBase, match="without its text_encoder"):
        load_adapter(tmp_path / "te.safetensors", unet_only)


def test_text_encoder_names_without_a_component_are_not_guessed_at(xl, tmp_path):
    name = TEXTS[0]
    state = {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(SitesNotInBase, match="any of"):
        load_adapter(tmp_path / "a.safetensors", xl)


@pytest.mark.parametrize(
    ("down", "up"), [((3, 31), (32, 3)), ((3, 32), (31, 3)), ((3, 32), (32, 2)), ((32,), (32,)),
                     ((0, 32), (32, 0)), ((3, 32, 2, 2), (32, 3, 1, 1))]
)  # fmt: skip
def test_factors_of_another_shape(down, up, sd, tmp_path):
    name = f"lora_unet_{flatten(UNET_LINEAR)}"
    state = {f"{name}.lora_down.weight": torch.ones(down), f"{name}.lora_up.weight": torch.ones(up)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ShapeMismatch) as caught:
        load_adapter(tmp_path / "a.safetensors", sd)
    assert caught.value.file == str(tmp_path / "a.safetensors")
    assert caught.value.tensor.startswith(name)


def test_a_kernel_of_another_size(sd, tmp_path):
    name = f"lora_unet_{flatten(UNET_3X3)}"
    state = {f"{name}.lora_down.weight": torch.ones(2, 32, 1, 1),
             f"{name}.lora_up.weight": torch.ones(32, 2, 1, 1)}  # fmt: skip
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ShapeMismatch, match="3, 3"):
        load_adapter(tmp_path / "a.safetensors", sd)


def test_the_same_weight_under_two_names(xl, tmp_path):
    diffusers = kohya_names(xl, [UNET_LINEAR], te=())
    ldm = kohya_names(xl, [UNET_LINEAR], ldm=True, te=())
    state = kohya_state(xl, diffusers)[0] | kohya_state(xl, ldm)[0]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(MalformedFile, match="Two modules"):
        load_adapter(tmp_path / "a.safetensors", xl)


def test_an_alpha_that_is_no_number(sd, tmp_path):
    state, _ = kohya_state(sd, kohya_names(sd, UNET[:1], te=()), 1)
    key = next(k for k in state if k.endswith(".alpha"))
    save_file({**state, key: torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(MalformedFile, match="single number"):
        load_adapter(tmp_path / "a.safetensors", sd)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_ranks_that_differ_load_in_diffusers(dialect, sd, sd_models, xl, xl_models, tmp_path):
    for base, models, parts in (
        (sd, sd_models, ("text_encoder",)),
        (xl, xl_models, ("text_encoder", "text_encoder_2")),
    ):
        sites = sites_of(base, UNET, *parts)
        ranks = {name: 1 + i % 4 for i, name in enumerate(sites)}
        adapter = random_adapter(base, ranks)
        path = tmp_path / f"{base.name}.safetensors"
        write(adapter, base, path, dialect)
        assert_same(judge_diffusers(pipeline(*models), path), deltas_of(adapter))
        assert_same(deltas_of(load_adapter(path, base)), deltas_of(adapter))
