"""``inspect`` says what a file is, and stops at nothing that can still be told."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from regraft.dialects import inspect_file
from regraft.dialects.kinds import component_of_name
from regraft.dialects.shapes import weight_shape
from regraft.errors import MalformedFile, NotAnAdapter
from regraft.files import data_sha256

SD = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def kohya(*names, width=768, rows=320, rank=8, alpha=8.0):
    torch.manual_seed(0)
    found = {}
    for name in names:
        found[f"{name}.lora_down.weight"] = torch.randn(rank, width)
        found[f"{name}.lora_up.weight"] = torch.randn(rows, rank)
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


@pytest.fixture
def facts(tmp_path):
    """Write tensors (and metadata, and a PEFT config) and inspect them."""

    def inspect(tensors, metadata=None, config=None, **options):
        path = tmp_path / "adapter_model.safetensors"
        save_file(tensors, path, metadata)
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        found = inspect_file(path, **options)
        json.loads(json.dumps(found))
        return found

    return inspect


def test_a_kohya_file(facts):
    tensors = kohya(SD, TE)
    meta = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "8.0",
        "ss_steps": "1200",
        "ss_learning_rate": "0.0001",
        "ss_base_model_version": "sd_v1",
        "ss_tag_frequency": json.dumps({"10_mycat": {"cat": 20, " fur": 3}, "dog": {"cat": 1}}),
        "sshs_model_hash": data_sha256(tensors),
        "modelspec.trigger_phrase": "zzz",
    }
    found = facts(tensors, meta)
    assert (found["dialect"], found["families"]) == ("kohya", {"lora": 2})
    assert found["made_for"][0].startswith("Stable Diffusion 1.x")
    assert found["made_for_conflict"] == ""
    assert found["sites_by_component"] == {"unet": 1, "text_encoder": 1}
    assert found["sites_by_kind"] == {"attn2.to_k": 1, "self_attn.q_proj": 1}
    assert (found["alpha"], found["alpha_from"]) == ({"8": 2}, "tensors")
    assert found["scale"] == {"smallest": 1.0, "largest": 1.0}
    assert found["trigger_words"] == "zzz"
    assert found["concepts"] == ["mycat", "dog"]
    assert found["tags"] == {"cat": 21, "fur": 3}
    assert found["training"]["steps"] == "1200"
    assert found["hash_matches"] is True
    assert found["warnings"] == []
    assert found["autov3"] == meta["sshs_model_hash"][:12]


def test_metadata_of_another_base_are_a_conflict(facts):
    found = facts(kohya(SD), {"ss_base_model_version": "sdxl_base_v1-0"})
    assert found["made_for"][0].startswith("Stable Diffusion 1.x")
    assert "sdxl_base_v1-0" in found["made_for_conflict"]
    assert found["made_for_conflict"] in found["warnings"]


def test_tensors_that_were_changed_after_their_hash(facts):
    found = facts(kohya(SD), {"sshs_model_hash": hashlib.sha256(b"").hexdigest()})
    assert found["hash_matches"] is False
    assert any("hash" in w for w in found["warnings"])


@pytest.mark.parametrize(
    ("alpha", "rank", "says"),
    [
        (1.0, 128, "alpha 1 with rank 128: strength 0.00781"),
        (-4.0, 4, "is -4"),
        (float("nan"), 4, "is nan"),
        (400.0, 4, "unusually strong"),
    ],
)
def test_odd_alphas_are_warned_of(facts, alpha, rank, says):
    found = facts(kohya(SD, rank=rank, alpha=alpha))
    assert any(says in w for w in found["warnings"])


def test_an_alpha_that_only_the_metadata_know(facts):
    found = facts(kohya(SD, alpha=None), {"ss_network_alpha": "4", "ss_network_dim": "8"})
    assert found["alpha_from"] == "none"
    assert any("no alpha tensors" in w for w in found["warnings"])
    assert facts(kohya(SD, alpha=0.0))["scale"] == {"smallest": 1.0, "largest": 1.0}


def test_a_peft_folder_with_patterns(facts):
    name = "base_model.model.model.layers.{}.self_attn.q_proj"
    tensors = {}
    for layer, rank in ((0, 4), (1, 8)):
        tensors[f"{name.format(layer)}.lora_A.weight"] = torch.randn(rank, 64)
        tensors[f"{name.format(layer)}.lora_B.weight"] = torch.randn(64, rank)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"layers.1.self_attn.q_proj": 8},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 32},
        "base_model_name_or_path": "org/tiny",
    }
    found = facts(tensors, None, config)
    assert found["alpha_from"] == "adapter_config.json"
    assert found["alpha"] == {"8": 1, "32": 1}
    assert found["scale"] == {"smallest": 2.0, "largest": 4.0}
    assert found["ranks"] == {"4": 1, "8": 1}
    assert found["made_for_by_metadata"] == ["org/tiny"]
    assert found["sites_by_component"] == {"model": 2}
    found = facts(tensors, None, {**config, "alpha_pattern": {"(a+)+$": 4}})
    assert any("too long" in w for w in found["warnings"])


def test_damage_is_listed_and_is_no_error(facts):
    tensors = kohya(SD, TE)
    tensors[f"{SD}.lora_up.weight"].zero_()
    tensors[f"{TE}.lora_down.weight"][0, 0] = float("nan")
    found = facts(tensors, spectrum=True)
    assert found["zero_sites"] == [SD]
    assert found["nonfinite_tensors"] == [f"{TE}.lora_down.weight"]
    assert found["spectrum"] == {"kinds": {}, "left_out": {"NaN or infinity": 1, "zero": 1}}
    assert len(found["warnings"]) == 2


def test_zero_is_what_changes_nothing(facts):
    found = facts(
        {
            "unet.a.diff": torch.zeros(4, 4),
            "unet.a.diff_b": torch.ones(4),
            "unet.b.lora_down.weight": torch.zeros(2, 4),
            "unet.b.lora_up.weight": torch.ones(4, 2),
            "unet.b.diff_b": torch.ones(4),
            "unet.c.diff": torch.zeros(4, 4),
            "unet.c.diff_b": torch.zeros(4),
        }
    )
    assert found["zero_sites"] == ["unet.c"]


def test_unknown_keys_are_listed(facts):
    found = facts({**kohya(SD), "something.else": torch.ones(2)})
    assert found["unknown_keys"] == ["something.else"]
    assert any("--allow-unknown" in w for w in found["warnings"])
    assert "something.else" not in found["refused"]


def test_a_family_that_is_not_read_is_still_described(facts):
    found = facts({"prompt_embeddings": torch.ones(4, 768)}, {"modelspec.title": "soft"})
    assert (found["kind"], found["readable"], found["title"]) == ("adapter", False, "soft")
    assert "prompt" in found["family"]
    assert found["why"] in found["warnings"]
    assert (found["keys"], found["parameters"]) == (["prompt_embeddings"], 4 * 768)


def test_what_is_no_adapter_is_an_error(facts):
    with pytest.raises(NotAnAdapter):
        facts({"model.layers.0.weight": torch.ones(4, 4)})
    with pytest.raises(MalformedFile):
        facts({f"{SD}.lora_down.weight": torch.ones(4, 4)})


def test_junk_metadata_are_no_error(facts):
    junk = {
        "ss_tag_frequency": '{"a": {"b": NaN, "c": -1, "d": [1]}, "e": 3}',
        "ss_dataset_dirs": "[" * 100_000,
        "regraft": '{"adapter": 3, "energy_kept": Infinity}',
        "ss_network_alpha": "many",
        "sshs_model_hash": "0xnothing",
    }
    found = facts(kohya(SD), junk)
    assert found["tags"] == {}
    assert found["provenance"] == {"operation": "transfer"}


def test_spectrum_of_a_known_update(facts):
    u, v = torch.linalg.qr(torch.randn(32, 3))[0], torch.linalg.qr(torch.randn(16, 3))[0]
    s = torch.tensor([3.0, 2.0, 1.0])
    tensors = {
        f"{SD}.lora_down.weight": (v * s).T.contiguous(),
        f"{SD}.lora_up.weight": u.contiguous(),
        f"{SD}.alpha": torch.tensor(6.0),  # scale 2
        f"{TE}.lora_down.weight": torch.ones(1, 16),
        f"{TE}.lora_up.weight": torch.ones(32, 1),
        f"{TE}.dora_scale": torch.ones(32, 1),
    }
    found = facts(tensors, spectrum=True)["spectrum"]
    row = found["kinds"]["attn2.to_k"]
    assert row["sites"] == 1
    assert row["energy"] == pytest.approx(4 * 14)
    assert row["share"] == {"1": pytest.approx(9 / 14, abs=1e-4), "2": 0.9286, "4": 1.0}
    assert row["rank_for_90"] == {"median": 2, "largest": 2}
    assert row["rank_for_99"] == {"median": 3, "largest": 3}
    p = s / s.sum()
    assert row["effective_rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()), abs=0.01)
    assert list(found["left_out"].values()) == [1]
    assert "base's weights" in next(iter(found["left_out"]))


SHAPES = {
    "convolution": ({"down": (4, 8, 3, 3), "up": (16, 4, 1, 1)}, (16, 8, 3, 3)),
    "tucker": ({"down": (4, 8, 1, 1), "mid": (4, 4, 3, 3), "up": (16, 4, 1, 1)}, (16, 8, 3, 3)),
    "embedding": ({"embedding_a": (4, 100), "embedding_b": (16, 4)}, (100, 16)),
    "loha": ({"hada_w1_a": (16, 2), "hada_w1_b": (2, 8)}, (16, 8)),
    "lokr": ({"lokr_w1": (4, 2), "lokr_w2": (4, 4, 3, 3)}, (16, 8, 3, 3)),
    "unknown": ({"oft_blocks": (4, 4, 4)}, None),
    "empty": ({"down": (0, 8), "up": (16, 0)}, None),
}


@pytest.mark.parametrize(("shapes", "weight"), SHAPES.values(), ids=SHAPES)
def test_the_weight_behind_the_factors(shapes, weight):
    assert weight_shape(shapes) == weight


def test_components():
    assert component_of_name("transformer.h.0.attn.c_attn") == "model"
    assert component_of_name("transformer.single_transformer_blocks.0.attn.to_q") == "transformer"
    assert component_of_name("lora_te1_text_model_encoder_layers_0_mlp_fc1") == "text_encoder"
