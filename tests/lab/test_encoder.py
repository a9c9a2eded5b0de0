"""The lab's encoder: its shipped file on held-out pictures, and how it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lab.encoder import (
    ASSETS,
    FILE,
    LOOK,
    SUBJECT,
    EmojiNet,
    batch_loss,
    load_encoder,
    to_pixels,
)
from regraft.demo.captions import HELD_OUT_SUBJECTS
from regraft.demo.pair import HELDOUT, load_heldout
from regraft.retention.images import diversity, style_similarity

DATA = Path(__file__).parents[2] / "lab" / "assets" / "diffusion" / "data"
LINE = "fluent-emoji-high-contrast"


def held_out(style: str) -> tuple[np.ndarray, list[str]]:
    if style == "line":
        return load_heldout(HELDOUT)  # the embedded pair's: the same look and subjects
    with safe_open(DATA / f"{style}.safetensors", framework="numpy") as file:
        return file.get_tensor("images"), json.loads(file.metadata()["captions"])


def test_the_pictures_judged_here_were_not_trained_on() -> None:
    assert set(held_out("line")[1]) <= set(HELD_OUT_SUBJECTS)


@pytest.mark.parametrize("other", ["outlined", "duotone"])
def test_held_out_pictures_are_like_their_own_style_and_unlike_another(other: str) -> None:
    encoder = load_encoder(part="look")
    line, other_style = held_out("line")[0], held_out(other)[0]
    own = style_similarity(line[:20], line[20:], encoder)
    assert own > 0.8
    assert style_similarity(other_style[:20], line[20:], encoder) < own - 0.2
    assert style_similarity(line[:20], other_style[20:], encoder) < own - 0.2


def test_looks_are_named_and_noise_is_none_of_them() -> None:
    encoder = load_encoder()
    named = encoder.look_of(held_out("line")[0])
    assert named.count(LINE) >= 0.9 * len(named)
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    assert encoder.look_of(noise).count("none") >= 18


def test_the_more_a_picture_is_spoilt_the_less_it_is_in_the_style() -> None:
    encoder, line = load_encoder(part="look"), held_out("line")[0]
    noise = np.random.default_rng(0).normal(0, 255, line.shape)
    values = [
        style_similarity((line + s * noise).clip(0, 255).astype(np.uint8), line, encoder)
        for s in (0.0, 0.1, 0.3, 1.0)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[1] < 0.2  # a little noise does not make it another style
    assert values[3] < 0.2


def test_the_same_subject_is_nearer_than_another_one() -> None:
    encoder, line = load_encoder(part="subject"), held_out("line")[0]
    shifted = np.roll(line, (1, 1), axis=(1, 2))
    closeness = encoder.encode(line) @ encoder.encode(shifted).T
    assert float((closeness.argmax(1) == torch.arange(len(line))).float().mean()) > 0.9


def test_different_drawings_of_one_style_are_diverse_and_one_drawing_is_not() -> None:
    encoder, line = load_encoder(), held_out("line")[0]
    assert diversity({"one": line[[0, 0, 0]]}, encoder) == pytest.approx(0, abs=1e-6)
    assert diversity({"several": line[:3]}, encoder) > 0.1


def test_features_have_length_one_and_their_parts_add_up() -> None:
    line = held_out("line")[0][:4]
    parts = {part: load_encoder(part=part) for part in ("look", "subject", "both")}
    features = {part: encoder.encode(line) for part, encoder in parts.items()}
    assert {part: tuple(f.shape) for part, f in features.items()} == {
        "look": (4, LOOK),
        "subject": (4, SUBJECT),
        "both": (4, LOOK + SUBJECT),
    }
    for f in features.values():
        torch.testing.assert_close(f.norm(dim=1), torch.ones(4))
    closeness = {part: f @ f.T for part, f in features.items()}
    mean = (closeness["look"] + closeness["subject"]) / 2
    torch.testing.assert_close(closeness["both"], mean, atol=1e-5, rtol=0)
    assert len({encoder.name for encoder in parts.values()}) == 3
    assert parts["both"].encode(line[:0]).shape == (0, LOOK + SUBJECT)


def test_other_sizes_are_resampled() -> None:
    line = held_out("line")[0][:4]
    large = line.repeat(3, axis=1).repeat(3, axis=2)
    encoder = load_encoder(part="look")
    assert style_similarity(large, line, encoder) > 0.9 * style_similarity(line, line, encoder)


def test_the_file_is_small_and_its_record_says_how_it_was_made() -> None:
    record = json.loads((ASSETS / "encoder.json").read_text())
    assert FILE.stat().st_size < 800_000
    assert record["parameters"] < 400_000
    assert record["recipe"]["seed"] == 0
    assert record["held_out_subjects"] == len(HELD_OUT_SUBJECTS)
    assert [point["step"] for point in record["curve"]][-1] == record["recipe"]["steps"]
    own = record["similarity"][LINE][LINE]
    assert all(own > v for look, v in record["similarity"][LINE].items() if look != LINE)
    assert min(record["look_by_look"][look] for look in (LINE, "outlined", "duotone")) > 0.9
    blend = list(record["blend_flat_to_line"].values())
    assert blend == sorted(blend)


def test_a_batch_is_the_same_for_the_same_draw_and_trains_every_weight() -> None:
    torch.manual_seed(0)
    network = EmojiNet(3)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3 * 64, 32, 32, 3), dtype=np.uint8)
    pixels = to_pixels(images).view(3, 64, 3, 32, 32)
    first, second, other = (
        batch_loss(network, pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == second != other
    first.backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in network.parameters())


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="look, subject or both"):
        load_encoder(part="style")
