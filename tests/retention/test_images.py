"""Picture metrics: the arithmetic against sums written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regraft.errors import BadOption
from regraft.retention.images import (
    Diversity,
    StyleSimilarity,
    diversity,
    paired_similarity,
    style_similarity,
)


class MeanColour:
    """Features are the three mean colours, not of length 1: the metrics must not assume it."""

    name = "mean colour"

    def encode(self, images: np.ndarray) -> Tensor:
        return torch.from_numpy(images.astype(np.float32).mean((1, 2)))


def pictures(seed: int, n: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (n, size, size, 3), dtype=np.uint8)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def features(images: np.ndarray) -> np.ndarray:
    return images.astype(float).mean((1, 2))


def test_style_similarity_is_the_mean_cosine_to_the_centre_of_the_real_ones() -> None:
    generated, real = pictures(0, 3), pictures(1, 5)
    units = [f / np.linalg.norm(f) for f in features(real)]
    centre = sum(units) / len(units)
    expected = np.mean([cosine(f, centre) for f in features(generated)])
    assert style_similarity(generated, real, MeanColour()) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_all_pairs_differ_from_the_centre_by_a_factor_of_the_real_ones_only(seed: int) -> None:
    real = pictures(seed, 4)
    ratios = []
    for k in (1, 2):
        generated = pictures(seed + k, 3)
        pairs = itertools.product(features(generated), features(real))
        over_pairs = np.mean([cosine(a, b) for a, b in pairs])
        ratios.append(over_pairs / style_similarity(generated, real, MeanColour()))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-5)


def test_a_picture_of_another_colour_is_less_similar() -> None:
    red = np.zeros((2, 4, 4, 3), np.uint8)
    red[..., 0] = 200
    blue = red[..., ::-1].copy()
    assert style_similarity(red, red, MeanColour()) == pytest.approx(1)
    assert style_similarity(blue, red, MeanColour()) == pytest.approx(0)


def test_paired_similarity_compares_picture_by_picture() -> None:
    first, second = pictures(0, 4), pictures(1, 4)
    expected = np.mean(
        [cosine(a, b) for a, b in zip(features(first), features(second), strict=True)]
    )
    assert paired_similarity(first, second, MeanColour()) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(BadOption, match="paired"):
        paired_similarity(first, second[:3], MeanColour())


def test_diversity_is_over_the_pairs_of_a_prompt_and_prompts_weigh_the_same() -> None:
    by_prompt = {"a fox": pictures(0, 2), "a car": pictures(1, 4, size=6)}
    expected = np.mean(
        [
            np.mean([1 - cosine(a, b) for a, b in itertools.combinations(features(images), 2)])
            for images in by_prompt.values()
        ]
    )
    assert diversity(by_prompt, MeanColour()) == pytest.approx(expected, abs=1e-6)


def test_the_same_picture_again_and_again_is_not_diverse() -> None:
    same = np.repeat(pictures(0, 1), 5, axis=0)
    assert diversity({"a": same, "b": same}, MeanColour()) == pytest.approx(0, abs=1e-9)


def test_too_few_pictures_are_an_error_that_says_so() -> None:
    with pytest.raises(BadOption, match=r"'a fox' has 1.*two seeds"):
        diversity({"a fox": pictures(0, 1)}, MeanColour())
    with pytest.raises(BadOption, match="at least one prompt"):
        diversity({}, MeanColour())
    with pytest.raises(BadOption, match="no real pictures"):
        style_similarity(pictures(0, 1), pictures(0, 0), MeanColour())


def test_scorers_carry_the_encoders_name_and_weigh_every_picture_the_same() -> None:
    by_prompt = {"a": pictures(0, 2), "b": pictures(1, 5)}
    real = pictures(2, 3)
    similarity = StyleSimilarity(MeanColour())
    together = np.concatenate(list(by_prompt.values()))
    assert similarity.name == "style similarity (mean colour)"
    assert similarity.score(by_prompt, real) == pytest.approx(
        style_similarity(together, real, MeanColour())
    )
    assert Diversity(MeanColour()).score(by_prompt, real) == diversity(by_prompt, MeanColour())
