"""The embedded pair: intact files, real classes, a deterministic sampler, the expected losses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel

from regraft.demo import pair
from regraft.demo.captions import HELD_OUT_SUBJECTS, STYLE_SUBJECTS
from regraft.demo.sampler import (
    attach,
    denoising_loss,
    detach,
    noise_for,
    sample,
    to_images,
    to_model,
)


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads(pair.MANIFEST.read_text())


@pytest.fixture(scope="module")
def source() -> pair.EmojiPipeline:
    return pair.load_pipeline(pair.SOURCE)


@pytest.fixture(scope="module")
def target() -> pair.EmojiPipeline:
    return pair.load_pipeline(pair.TARGET)


def test_files_match_the_manifest(manifest: dict) -> None:
    for name, entry in manifest["files"].items():
        data = (pair.assets_dir() / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
    assert manifest["total_bytes"] < 15_000_000


def test_every_asset_is_in_the_manifest(manifest: dict) -> None:
    root = pair.assets_dir()
    shipped = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    shipped = {name for name in shipped if not Path(name).name.startswith(".")}
    assert shipped - {"manifest.json"} == set(manifest["files"])


def test_no_absolute_paths_in_the_configs() -> None:
    for path in pair.assets_dir().rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


def test_bases_are_real_library_classes(
    source: pair.EmojiPipeline, target: pair.EmojiPipeline
) -> None:
    for pipeline in (source, target):
        assert isinstance(pipeline.unet, UNet2DConditionModel)
        assert isinstance(pipeline.text_encoder, CLIPTextModel)
        assert pipeline.tokenizer("dog face")["input_ids"][0] == pipeline.tokenizer.bos_token_id
    old, new = source.unet.state_dict(), target.unet.state_dict()
    assert {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}


@pytest.mark.parametrize("path", [pair.ADAPTER, pair.RETRAINED], ids=lambda p: p.stem)
def test_adapters_have_diffusers_metadata(path: Path) -> None:
    with safe_open(str(path), framework="numpy") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
        ranks = {file.get_slice(k).get_shape()[0] for k in file.keys() if "lora_A" in k}  # noqa: SIM118
        dims = {len(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert ranks == {8}
    assert dims == {2, 4}  # linear and convolution sites


def test_held_out_file_has_only_unseen_subjects() -> None:
    images, captions = pair.load_heldout()
    assert images.shape == (len(captions), 32, 32, 3)
    assert images.dtype == np.uint8
    assert tuple(captions) == HELD_OUT_SUBJECTS
    assert not set(captions) & set(STYLE_SUBJECTS)
    assert len(pair.default_captions()) == 8
    assert set(pair.default_captions()) <= set(captions)


def test_every_word_is_in_the_vocabulary(source: pair.EmojiPipeline) -> None:
    unknown = source.tokenizer.unk_token_id
    for caption in (*STYLE_SUBJECTS, *HELD_OUT_SUBJECTS):
        assert unknown not in source.tokenizer(caption)["input_ids"], caption


def test_folding_is_lossless() -> None:
    images, _ = pair.load_heldout()
    assert np.array_equal(to_images(to_model(images)), images)


def test_noise_depends_on_its_own_seed_only() -> None:
    assert noise_for([3, 7])[1].equal(noise_for([7])[0])


def test_sampling_is_deterministic_and_seeded(source: pair.EmojiPipeline) -> None:
    captions = ["guitar", "panda"]
    first = sample(source, captions, [1, 2], steps=3)
    assert first.shape == (2, 32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, sample(source, captions, [1, 2], steps=3))
    assert not np.array_equal(first, sample(source, captions, [3, 4], steps=3))
    with pytest.raises(ValueError, match="seeds"):
        sample(source, captions, [1], steps=3)


def test_attach_changes_the_output_and_detach_restores_it(source: pair.EmojiPipeline) -> None:
    before = sample(source, ["rocket"], 5, steps=4)
    attach(source, pair.ADAPTER)
    styled = sample(source, ["rocket"], 5, steps=4)
    attach(source, pair.ADAPTER, strength=0.0)
    silent = sample(source, ["rocket"], 5, steps=4)
    detach(source)
    after = sample(source, ["rocket"], 5, steps=4)
    assert np.abs(styled.astype(int) - before).mean() > 5
    assert np.abs(silent.astype(int) - before).max() <= 1
    assert np.array_equal(before, after)


def test_style_is_black_and_white_on_unseen_subjects(source: pair.EmojiPipeline) -> None:
    captions = pair.default_captions()

    def colour(images: np.ndarray) -> float:
        """Mean spread between the channels, 0..255."""
        return float((images.max(-1).astype(int) - images.min(-1)).mean())

    plain = colour(sample(source, captions, 0, steps=8))
    attach(source, pair.ADAPTER)
    styled = colour(sample(source, captions, 0, steps=8))
    detach(source)
    assert styled < 0.4 * plain


def test_losses_are_ordered(
    source: pair.EmojiPipeline, target: pair.EmojiPipeline, manifest: dict
) -> None:
    images, captions = pair.load_heldout()
    images, captions = images[:24], captions[:24]

    def loss(pipeline: pair.EmojiPipeline, lora: Path | None) -> float:
        detach(pipeline)
        if lora is not None:
            attach(pipeline, lora)
        value = denoising_loss(pipeline, images, captions, timesteps=4)
        detach(pipeline)
        return value

    assert loss(source, pair.ADAPTER) < loss(source, None)
    bare, copied, retrained = (loss(target, f) for f in (None, pair.ADAPTER, pair.RETRAINED))
    assert retrained < copied < bare
    assert 0.3 < manifest["heldout_style_loss"]["recovery_of_copying"] < 0.97
