"""The two names of every U-Net module, held against diffusers' own converter."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from regraft.bases.unet_names import to_diffusers, to_ldm
from tests.factories import SD15, SDXL, TINY_SD, TINY_XL

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"
CONFIGS = {
    "sd15": SD15,
    "sdxl": SDXL,
    "tiny sd": TINY_SD,
    "tiny xl": TINY_XL,
    "three layers a block": {**TINY_SD, "layers_per_block": 3},
    "one block": {
        **TINY_SD,
        "block_out_channels": (16,),
        "down_block_types": (CROSS,),
        "up_block_types": (UP_CROSS,),
    },
    "no attention at all": {
        **TINY_SD,
        "down_block_types": (PLAIN, PLAIN),
        "up_block_types": (UP_PLAIN, UP_PLAIN),
    },
    "attention everywhere": {
        **TINY_SD,
        "down_block_types": (CROSS, CROSS),
        "up_block_types": (UP_CROSS, UP_CROSS),
    },
}


def keys_of(config):
    with torch.device("meta"):
        return list(UNet2DConditionModel(**config).state_dict()), config


def module(key):
    return key.rpartition(".")[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_converter_turns_every_name_back(name):
    keys, config = keys_of(CONFIGS[name])
    names = to_ldm(map(module, keys))
    assert set(names) == set(map(module, keys))
    assert len(set(names.values())) == len(names)
    tagged = {
        f"model.diffusion_model.{names[module(k)]}.{k.rpartition('.')[2]}": torch.tensor(i)
        for i, k in enumerate(keys)
    }
    full = {"class_embed_type": None, "addition_embed_type": None, **config}
    back = convert_ldm_unet_checkpoint(tagged, config=full)
    assert {k: int(v) for k, v in back.items()} == {k: i for i, k in enumerate(keys)}


@pytest.mark.parametrize("name", [*CONFIGS, "uneven"])
def test_there_and_back(name):
    uneven = {**TINY_SD, "layers_per_block": (1, 2)}
    keys, _ = keys_of(CONFIGS.get(name, uneven))
    names = to_ldm(map(module, keys))
    back = to_diffusers(names.values())
    assert {names[m]: m for m in map(module, keys)} == back


def test_diffusers_names_are_no_ldm_names():
    keys, _ = keys_of(TINY_SD)
    assert to_diffusers(map(module, keys)) == {}


@pytest.mark.parametrize(
    "strange",
    ["input_blocks.99999999999999999999.0.op", "input_blocks.7.1.x", "output_blocks.3.9.conv"],
)
def test_strange_names_do_no_harm(strange):
    to_diffusers([strange, "input_blocks.0.1.x", "middle_block.7.x"])


def test_known_names():
    keys, _ = keys_of(SDXL)
    names = to_ldm(map(module, keys))
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names[attention] == "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert names["mid_block.resnets.1.conv1"] == "middle_block.2.in_layers.2"
