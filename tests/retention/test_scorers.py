"""Scores from the user's weights: tiny models of the real classes, each against its formula.

``open_clip``, ``lpips`` and torchvision are not among the project's packages; small stand-ins with
the same calls take their place.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from regraft.errors import InputNotFound, MalformedFile, MissingDependency
from regraft.retention.encoders import load_clip, load_dinov2
from regraft.retention.images import StyleSimilarity
from regraft.retention.scorers import (
    ALEXNET,
    ClipScore,
    available_scorers,
    hps_pixels,
    load_hps,
    load_lpips,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 16},
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
    "resample": 3,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
}
PROMPTS = ("a fox", "fox fox a")


def pictures(seed: int, n: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    layers["num_attention_heads"] = 2
    text = {**layers, "vocab_size": 8, "max_position_embeddings": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config=text,
        vision_config={**layers, "image_size": 16, "patch_size": 4},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "fox</w>", "f", "o", "x", "fo"]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [("f", "o"), ("fo", "x</w>")]
    CLIPTokenizer(vocab={**vocabulary, "x</w>": 8}, merges=merges).save_pretrained(
        tmp_path / "clip"
    )
    saved = {"image_processor_type": "CLIPImageProcessor", **PROCESSOR}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(saved))
    return tmp_path / "clip"


@pytest.fixture
def dinov2_folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    saved = {"image_processor_type": "BitImageProcessor", **PROCESSOR}
    (tmp_path / "dinov2" / "preprocessor_config.json").write_text(json.dumps(saved))
    return tmp_path / "dinov2"


def pixels(images: np.ndarray) -> Tensor:
    """What the processor does to pictures that already have the model's size."""
    scaled = (images / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).float()


@torch.no_grad()
def test_clip_score_is_a_hundred_cosines(clip_folder: Path) -> None:
    scorer = ClipScore(load_clip(clip_folder))
    generated = {PROMPTS[0]: pictures(0, 2), PROMPTS[1]: pictures(1, 1)}
    model = CLIPModel.from_pretrained(clip_folder).eval()
    # <start>, words, <end>; padded with <end>, which the mask hides
    tokens = torch.tensor([[0, 2, 3, 1, 1], [0, 3, 3, 2, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    images = pixels(np.concatenate(list(generated.values())))
    out = model(input_ids=tokens, attention_mask=mask, pixel_values=images)
    cosines = functional.normalize(out.image_embeds) @ functional.normalize(out.text_embeds).T
    expected = 100 * (cosines[0, 0] + cosines[1, 0] + cosines[2, 1]) / 3
    found = scorer.score(generated, pictures(2, 1))
    assert found == pytest.approx(float(expected), abs=1e-3)
    # and the model's own logits are the same cosines times its learnt scale
    logits = cosines * model.logit_scale.exp()
    torch.testing.assert_close(out.logits_per_image, logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_clip_and_dinov2_features_are_those_of_the_models(
    clip_folder: Path, dinov2_folder: Path
) -> None:
    images = pictures(0, 3)
    projected = CLIPModel.from_pretrained(clip_folder).eval().get_image_features(pixels(images))
    projected = getattr(projected, "pooler_output", projected)  # a plain tensor before 5.0
    torch.testing.assert_close(
        load_clip(clip_folder).encode(images), functional.normalize(projected), rtol=1e-4, atol=1e-5
    )
    hidden = Dinov2Model.from_pretrained(dinov2_folder).eval()(pixels(images)).last_hidden_state
    torch.testing.assert_close(
        load_dinov2(dinov2_folder).encode(images),
        functional.normalize(hidden[:, 0]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_pictures_of_another_size_go_through_the_models_own_processor(dinov2_folder: Path) -> None:
    images = pictures(0, 2, 24, 32)
    processor = AutoImageProcessor.from_pretrained(dinov2_folder)
    x = processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")["pixel_values"]
    assert x.shape == (2, 3, 16, 16)
    encoder = load_dinov2(dinov2_folder)
    with torch.no_grad():
        expected = functional.normalize(encoder.model(x).last_hidden_state[:, 0])
    torch.testing.assert_close(encoder.encode(images), expected)


def test_another_model_or_none_is_refused_and_never_filled_at_random(
    clip_folder: Path, dinov2_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(MalformedFile, match="CLIP"):
        load_clip(dinov2_folder)
    with pytest.raises(InputNotFound, match="hf download"):
        load_dinov2(tmp_path / "nothing")
    model = Dinov2Model.from_pretrained(dinov2_folder)
    weights = model.state_dict()
    weights.pop("layernorm.weight")
    model.save_pretrained(dinov2_folder, state_dict=weights)
    with pytest.raises(MalformedFile, match="complete DINOv2"):
        load_dinov2(dinov2_folder)


def test_weights_in_a_pickle_are_refused(dinov2_folder: Path) -> None:
    (dinov2_folder / "model.safetensors").unlink()
    torch.save({}, dinov2_folder / "pytorch_model.bin")
    with pytest.raises(InputNotFound, match="safetensors"):
        load_dinov2(dinov2_folder)


class StandInClip(nn.Module):
    """The two calls of open_clip's CLIP that HPSv2 needs."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(3 * 16 * 16, 5)
        self.visual.image_size = (16, 16)  # type: ignore[assignment]
        self.text = nn.Embedding(10, 5)

    def encode_image(self, x: Tensor, normalize: bool = False) -> Tensor:
        out = self.visual(x.flatten(1))
        return functional.normalize(out) if normalize else out

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        out = self.text(tokens).mean(1)
        return functional.normalize(out) if normalize else out


@pytest.fixture
def open_clip(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    def tokens(texts: list[str]) -> Tensor:
        return torch.tensor([[len(text), text.count("f")] for text in texts])

    def create_model(name: str, **options: Any) -> StandInClip:
        assert (name, options["pretrained"]) == ("ViT-H-14", None)  # nothing may be downloaded
        return StandInClip()

    module = SimpleNamespace(create_model=create_model, get_tokenizer=lambda name: tokens)
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return module


@torch.no_grad()
def test_hps_is_the_cosine_of_picture_and_prompt(open_clip: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = StandInClip()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS_v2_compressed.pt")
    scorer = load_hps(tmp_path / "HPS_v2_compressed.pt")
    generated = {PROMPTS[0]: pictures(0, 2), PROMPTS[1]: pictures(1, 1)}
    image = model.encode_image(pixels(np.concatenate(list(generated.values()))))
    text = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    cosine = functional.cosine_similarity(image, text[[0, 0, 1]])
    assert scorer.score(generated, pictures(2, 1)) == pytest.approx(float(cosine.mean()), abs=1e-5)


def test_hps_pads_the_shorter_side_with_black() -> None:
    images = np.full((1, 8, 32, 3), 255, np.uint8)
    x = hps_pixels(images, SimpleNamespace(image_size=16))
    colours = x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert x.shape == (1, 3, 16, 16)
    torch.testing.assert_close(colours[0, :, 6:10], torch.ones(3, 4, 16))
    torch.testing.assert_close(colours[0, :, :6], torch.zeros(3, 6, 16), atol=1e-6, rtol=0)


class Armed:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("this ran",))


def test_a_checkpoint_with_code_in_it_is_not_run(
    open_clip: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": Armed()}, tmp_path / "hps.pt")
    with pytest.raises(MalformedFile, match="more than tensors"):
        load_hps(tmp_path / "hps.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "hps.pt").read_bytes()[:100])
    with pytest.raises(MalformedFile):
        load_hps(tmp_path / "cut.pt")
    torch.save({"state_dict": {"wrong": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(MalformedFile, match="ViT-H-14"):
        load_hps(tmp_path / "other.pt")
    assert "this ran" not in capsys.readouterr().out


class StandInLpips(nn.Module):
    """lpips.LPIPS as the loader sees it: ``net`` with slices of numbered layers, [-1, 1] inputs."""

    def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
        super().__init__()
        assert (net, pnet_rand, verbose) == ("alex", True, False)
        self.net = nn.Module()
        self.net.slice1 = nn.Sequential()
        self.net.slice1.add_module("0", nn.Conv2d(3, 2, 3))
        self.net.slice2 = nn.Sequential()
        self.net.slice2.add_module("3", nn.Conv2d(2, 2, 3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        assert float(a.min()) >= -1
        assert float(a.max()) <= 1
        gap = self.net.slice2(self.net.slice1(a)) - self.net.slice2(self.net.slice1(b))
        return gap.pow(2).mean((1, 2, 3), keepdim=True)


@pytest.fixture
def alexnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Tensor]:
    module = ModuleType("lpips")
    module.LPIPS = StandInLpips  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(0)
    weights = {
        "features.0.weight": torch.randn(2, 3, 3, 3),
        "features.0.bias": torch.randn(2),
        "features.3.weight": torch.randn(2, 2, 3, 3),
        "features.3.bias": torch.randn(2),
        "classifier.1.weight": torch.randn(4, 4),
    }
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(weights, folder / ALEXNET)
    return weights


def test_lpips_diversity_is_over_the_pairs_of_each_prompt(alexnet: dict[str, Tensor]) -> None:
    def features(image: np.ndarray) -> Tensor:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
        x = functional.conv2d(x, alexnet["features.0.weight"], alexnet["features.0.bias"])
        return functional.conv2d(x, alexnet["features.3.weight"], alexnet["features.3.bias"])

    generated = {"a": pictures(0, 2), "b": pictures(1, 9)}  # 36 pairs: more than one batch
    means = []
    for images in generated.values():
        pairs = itertools.combinations([features(image) for image in images], 2)
        means.append(np.mean([float((p - q).pow(2).mean()) for p, q in pairs]))
    found = load_lpips().score(generated, pictures(2, 1))
    assert found == pytest.approx(np.mean(means), rel=1e-4)


def test_weights_of_another_backbone_are_refused(
    alexnet: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "vgg.pth")
    with pytest.raises(MalformedFile, match="AlexNet"):
        load_lpips(tmp_path / "vgg.pth")
    with pytest.raises(InputNotFound, match=ALEXNET):
        load_lpips(tmp_path / ALEXNET)


def test_every_scorer_is_ready_or_skipped_with_a_reason(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for absent in ("open_clip", "lpips"):
        monkeypatch.setitem(sys.modules, absent, None)
    (tmp_path / "hps.pt").touch()
    with pytest.raises(MissingDependency, match="lpips"):
        load_lpips()
    ready, skipped = available_scorers(
        clip=str(clip_folder), dinov2=str(tmp_path / "absent"), hps=str(tmp_path / "hps.pt")
    )
    assert [scorer.name for scorer in ready] == ["CLIP score", "style similarity (CLIP)"]
    assert isinstance(ready[1], StyleSimilarity)
    assert set(skipped) == {"style similarity (DINOv2)", "HPSv2", "LPIPS diversity"}
    assert "absent" in skipped["style similarity (DINOv2)"]
    assert "pip install 'open_clip_torch'" in skipped["HPSv2"]
    assert "pip install 'lpips'" in skipped["LPIPS diversity"]
    ready, skipped = available_scorers(lpips=False)
    assert not ready
    assert len(skipped) == 5
    assert skipped["LPIPS diversity"] == "not asked for"
