"""Splitting site names into component, depth and kind."""

from __future__ import annotations

import pytest

from regraft.report.places import component_of, split_site


@pytest.mark.parametrize(
    ("site", "component", "group", "label", "kind"),
    [
        (
            "unet.down_blocks.2.attentions.1.transformer_blocks.7.attn2.to_out.0",
            "unet", "down 2", "1.7", "attn2.to_out.0",
        ),
        ("unet.down_blocks.2.attentions.1.proj_in", "unet", "down 2", "1.0", "proj_in"),
        ("unet.down_blocks.0.resnets.1.conv1", "unet", "down 0", "1.0", "conv1"),
        ("unet.mid_block.resnets.0.time_emb_proj", "unet", "mid", "0.0", "time_emb_proj"),
        ("unet.down_blocks.0.downsamplers.0.conv", "unet", "down 0", "↓", "downsamplers.conv"),
        ("unet.up_blocks.1.upsamplers.0.conv", "unet", "up 1", "↑", "upsamplers.conv"),
        ("unet.conv_in", "unet", "in", "", "conv_in"),
        ("unet.conv_out", "unet", "out", "", "conv_out"),
        ("unet.time_embedding.linear_1", "unet", "in", "", "time_embedding.linear_1"),
        ("model.layers.12.self_attn.q_proj", "", "layers", "12", "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.17.up_proj", "", "layers", "3", "mlp.experts.#.up_proj"),
        ("model.embed_tokens", "", "in", "", "embed_tokens"),
        ("lm_head", "", "out", "", "lm_head"),
        ("transformer.h.5.attn.c_attn", "", "h", "5", "attn.c_attn"),
        (
            "text_encoder.text_model.encoder.layers.4.mlp.fc1",
            "text_encoder", "encoder.layers", "4", "mlp.fc1",
        ),
        (
            "transformer.single_transformer_blocks.9.attn.to_q",
            "transformer", "single_transformer_blocks", "9", "attn.to_q",
        ),
        ("weird", "", "in", "", "weird"),
        ("", "", "in", "", "weight"),
    ],
)  # fmt: skip
def test_split(site: str, component: str, group: str, label: str, kind: str) -> None:
    place = split_site(site)
    assert (place.component, place.group, place.label, place.kind) == (
        component,
        group,
        label,
        kind,
    )


def test_order_follows_the_data() -> None:
    names = [
        "unet.time_embedding.linear_1",
        "unet.down_blocks.0.resnets.0.conv1",
        "unet.down_blocks.0.resnets.1.conv1",
        "unet.down_blocks.0.downsamplers.0.conv",
        "unet.down_blocks.1.attentions.0.transformer_blocks.2.ff.net.2",
        "unet.down_blocks.1.attentions.0.transformer_blocks.10.ff.net.2",
        "unet.down_blocks.1.attentions.1.transformer_blocks.0.ff.net.2",
        "unet.mid_block.resnets.0.conv1",
        "unet.up_blocks.0.resnets.0.conv1",
        "unet.conv_out",
    ]
    assert sorted(names, key=lambda n: split_site(n).order) == names
    flux = ["transformer.transformer_blocks.18.ff", "transformer.single_transformer_blocks.0.ff"]
    assert sorted(flux, key=lambda n: split_site(n).order) == flux


def test_an_attention_shares_the_column_of_its_resnet() -> None:
    column = split_site("unet.down_blocks.1.resnets.0.conv1").order
    assert split_site("unet.down_blocks.1.attentions.0.proj_in").order == column
    inner = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert split_site(inner).order == column


def test_component() -> None:
    assert component_of("text_encoder_2.text_model.encoder.layers.0.mlp.fc1") == "text_encoder_2"
    assert component_of("transformer.transformer_blocks.0.attn.to_q") == "transformer"
    assert component_of("transformer.wte") == ""
    assert component_of("unet") == ""
