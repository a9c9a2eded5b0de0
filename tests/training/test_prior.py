"""Prior preservation: its half of the loss, its pictures, and where it makes no sense."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from regraft.errors import BadData, BadOption
from regraft.running.stable_diffusion import StableDiffusion
from regraft.training import train
from tests.training.runs import LANGUAGE, Stop, logged, short, stopping_at

MID = r"mid.*attn2\.to_q"


def test_the_loss_is_that_of_the_items_and_a_weight_times_that_of_the_class(tiny, tmp_path):
    more = {"steps": 1, "batch": 2, "targets": MID, "validation": 0}
    train(short(tiny, **more), tmp_path / "without")
    chosen = short(tiny, **more, prior=tiny["data"], prior_weight=0.25)
    train(chosen, tmp_path / "with")
    alone, both = (logged(tmp_path / name)[0] for name in ("without", "with"))
    assert both["prior"] > 0
    assert both["loss"] == pytest.approx(alone["loss"] + 0.25 * both["prior"], rel=1e-6)
    facts = json.loads((tmp_path / "with" / "training.json").read_text())
    assert facts["data"]["prior"]["items"] == 6
    assert facts["data"]["prior"]["name"] == "pictures"
    assert str(tmp_path) not in json.dumps(facts)


def test_class_pictures_are_drawn_once_from_the_bare_base(tiny, tmp_path, monkeypatch):
    asked, sample = [], StableDiffusion.sample

    def counted(self, captions, seeds=0, *, steps=25):
        asked.append((list(captions), list(seeds)))
        return sample(self, captions, seeds, steps=1)

    monkeypatch.setattr(StableDiffusion, "sample", counted)
    chosen = short(tiny, steps=2, batch=1, targets=MID, prior_prompt="d", prior_count=9)
    with pytest.raises(Stop):
        train(chosen, tmp_path / "out", progress=stopping_at(1))
    assert [captions for captions, _ in asked] == [["d"] * 8, ["d"]]
    seeds = [seed for _, chunk in asked for seed in chunk]
    assert len(set(seeds)) == 9
    kept = sorted((tmp_path / "out.training" / "prior").iterdir())
    assert len(kept) == 9
    kept[3].unlink()  # as a kill would leave it: what is missing is drawn again, with its chunk
    train(chosen, tmp_path / "out", resume=True)
    assert len(asked) == 3
    assert asked[2] == asked[0]
    assert not (tmp_path / "out.training").exists()


def test_pictures_of_the_class_are_for_pictures(tmp_path, tiny):
    for more in ({"prior_prompt": "a"}, {"cut_mix": 0.5}):
        with pytest.raises(BadOption, match="for pictures"):
            train(short(LANGUAGE, **more), tmp_path / "out")
    with pytest.raises(BadData, match="two subjects"):
        train(short(tiny, cut_mix=0.5), tmp_path / "out")
    assert not list(tmp_path.iterdir())
