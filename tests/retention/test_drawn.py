"""Pictures by every way on the embedded pair, scored by tiny encoders of the real classes."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from regraft.demo import pair
from regraft.dialects import load_adapter
from regraft.errors import BadOption
from regraft.report import Gallery
from regraft.retention.drawn import Drawing, Drawn, asked_for, draw, draw_all
from regraft.retention.encoders import load_clip, load_dinov2
from regraft.retention.images import Diversity, StyleSimilarity
from regraft.retention.measure import measure
from regraft.retention.scorers import ClipScore
from regraft.running import Pictures, applied, open_model
from regraft.running.emoji import Emoji, sample
from tests.retention.test_scorers import clip_folder, dinov2_folder  # noqa: F401  (fixtures)

CLIP_I, DINO = "style similarity (CLIP)", "style similarity (DINOv2)"
DIVERSE = "diversity (DINOv2)"


@pytest.fixture
def fast(monkeypatch):
    """One step and no guidance: what is drawn still depends on weights, captions and seeds."""
    monkeypatch.setattr(
        Emoji,
        "sample",
        lambda self, captions, seeds=0: sample(
            self.pipeline, captions, seeds, steps=1, guidance=1.0
        ),
    )


@pytest.fixture(scope="module")
def target():
    return open_model(pair.TARGET)


@pytest.fixture(scope="module")
def adapters():
    return {
        "target": None,
        "copy": load_adapter(pair.ADAPTER, pair.TARGET),
        "retrained": load_adapter(pair.RETRAINED, pair.TARGET),
    }


@pytest.fixture(scope="module")
def data():
    images, captions = pair.load_heldout()
    return Pictures(images[:4], [captions[0], captions[0], captions[1], captions[2]])


def test_values_are_the_scorers_own_on_pictures_drawn_by_hand(
    fast,
    target,
    adapters,
    data,
    clip_folder,  # noqa: F811
    dinov2_folder,  # noqa: F811
):
    drawing = Drawing(2, 2, clip=str(clip_folder), dinov2=str(dinov2_folder))
    found = draw_all(target, data, adapters, drawing, seed=5)
    assert found.captions == (data.captions[0], data.captions[2])  # different ones only
    assert found.seeds == (5, 6)
    clip, dino = load_clip(clip_folder), load_dinov2(dinov2_folder)
    by_hand = [ClipScore(clip), StyleSimilarity(clip), StyleSimilarity(dino), Diversity(dino)]
    values = {}
    for name, adapter in adapters.items():
        with nullcontext() if adapter is None else applied(target, adapter):
            pictures = {
                caption: sample(target.pipeline, [caption] * 2, [5, 6], steps=1, guidance=1.0)
                for caption in (data.captions[0], data.captions[2])
            }
        scores = found.scores(name)
        for scorer in by_hand:
            values[name, scorer.name] = scorer.score(pictures, data.images)
            wanted = pytest.approx(values[name, scorer.name], abs=1e-4)
            assert scores[scorer.name].value == wanted, (name, scorer.name)
    assert values["copy", DINO] != pytest.approx(values["target", DINO], abs=1e-6)
    assert set(found.skipped) == {"HPSv2", "LPIPS diversity"}


def drawn(seeds=(0,), **values):
    """What drawing found, with values of two scorers per caption."""
    rows = {n: {DINO: tuple(v), DIVERSE: tuple(v)} for n, v in values.items()}
    captions = tuple(str(i) for i in range(len(values["target"])))
    directions = dict.fromkeys((DINO, DIVERSE), True)
    strip = {n: [np.zeros((300, 200, 3), np.uint8)] * len(captions) for n in values}
    return Drawn(captions, seeds, directions, rows, {}, Drawing(len(seeds)), strip)


def test_r_is_of_the_means_and_diversity_has_none():
    found = drawn(target=[0.1, 0.2, 0.3], copy=[0.4, 0.6, 0.5], retrained=[0.6, 0.8, 0.7])
    score = found.scores("copy")[DINO]
    assert score.value == pytest.approx(0.5)
    assert score.gain == pytest.approx(0.3)
    assert score.gain_error == pytest.approx(np.std([0.3, 0.4, 0.2], ddof=1) / 3**0.5)
    assert score.retention.value == pytest.approx(0.3 / 0.5)
    assert score.retention.error > 0
    assert found.scores("copy")[DIVERSE].retention is None
    assert found.scores("retrained")[DINO].retention is None
    assert drawn(target=[0.1], copy=[0.2]).scores("copy")[DINO].retention is None


@pytest.mark.parametrize(
    ("retrained", "reason"),
    [
        ([0.3, 0.0, 0.5], "margin"),  # by 0.07, with an error of 0.13
        ([0.0, 0.1, 0.2], "worse"),
        ([0.1, 0.2, 0.3], "margin"),
    ],
)
def test_where_retraining_did_not_move_the_score_r_is_not_defined(retrained, reason):
    found = drawn(target=[0.1, 0.2, 0.3], copy=[0.4, 0.6, 0.5], retrained=retrained)
    kept = found.scores("copy")[DINO].retention
    assert (kept.value, kept.error) == (None, None)
    assert reason in kept.reason


def test_one_caption_is_too_few_for_r():
    kept = drawn(target=[0.1], copy=[0.4], retrained=[0.6]).scores("copy")[DINO].retention
    assert kept.value is None
    assert "one caption" in kept.reason


def test_the_strip_has_a_row_per_way_and_small_pictures():
    found = drawn(target=[0.1] * 2, lora=[0.4] * 2, retrained=[0.6] * 2).gallery(["lora"])
    assert isinstance(found, Gallery)
    assert [row.label for row in found.rows] == ["target, bare", "lora", "retrained adapter"]
    assert [row.highlight for row in found.rows] == [False, True, False]
    png = found.rows[0].images[0]
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (85, 128)


def test_the_same_captions_and_seeds_give_the_same_pictures(fast, target):
    first = draw(target, ["a fox", "fox"], [0, 1])
    assert {k: v.shape for k, v in first.items()} == dict.fromkeys(first, (2, 32, 32, 3))
    again = draw(target, ["a fox"], [0, 1])["a fox"]
    assert np.array_equal(first["a fox"], again)
    assert not np.array_equal(again[0], again[1])


def test_one_seed_has_no_diversity_and_says_so(fast, target, data, dinov2_folder):  # noqa: F811
    found = draw_all(target, data, {"target": None}, Drawing(1, 1, dinov2=str(dinov2_folder)))
    assert set(found.values["target"]) == {DINO}
    assert "two seeds" in found.skipped[DIVERSE]


def test_measuring_draws_every_way_and_the_page_shows_it(fast, tmp_path, dinov2_folder):  # noqa: F811
    before = torch.get_num_threads()
    found = measure(
        pair.ADAPTER,
        target=pair.TARGET,
        retrained=pair.RETRAINED,
        data="demo",
        drawing=Drawing(2, 2, clip=str(tmp_path / "absent"), dinov2=str(dinov2_folder)),
        report=tmp_path / "page.html",
        limit=2,
        timesteps=1,
        strengths=(1.0,),
    )
    assert torch.get_num_threads() == before
    data = json.loads(json.dumps(found.to_dict()))
    drawn = data["pictures"]
    assert set(drawn["references"]) == {"target", "retrained"}
    assert set(drawn["references"]["target"]) == {DINO, DIVERSE}
    assert set(data["ways"][0]["pictures"]) == {DINO, DIVERSE}
    assert data["ways"][0]["pictures"][DIVERSE]["retention"] is None
    assert "reason" in data["ways"][0]["pictures"][DINO]["retention"]
    assert (data["parameters"]["draw"], data["parameters"]["captions"]) == (2, 2)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 3 * 2
    assert DINO in page
    assert "no weights were named" in page
    assert str(tmp_path) not in page
    assert "--draw 2 --captions 2" in page


def test_options_that_do_not_go_together_are_errors():
    assert asked_for(0) is None
    assert asked_for(2, clip="a") == Drawing(2, clip="a")
    for given in ((-1,), (2, 0)):
        with pytest.raises(BadOption, match="not a positive number"):
            asked_for(*given)
    with pytest.raises(BadOption, match="--clip, --hps"):
        asked_for(0, clip="a", hps="b")
