"""Settings, and what cannot be trained: said before anything is done."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from regraft.errors import BadData, BadOption
from regraft.training import Settings, train
from regraft.training.settings import PRESETS, read_config
from tests.training.runs import DIFFUSION, LANGUAGE, short


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"family": "x-adapter"}, "no family"),
        ({"schedule": "linear"}, "no schedule"),
        ({"precision": "int8"}, "no precision"),
        ({"preset": "mine"}, "no preset"),
        ({"colour": 1}, "no setting 'colour'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": "many"}, "not of type int"),
        ({"batch": True}, "not of type int"),
        ({"lr": -1.0}, "lr is -1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"rank": 2.5}, "not a number of directions"),
        ({"rank": 1e300}, "beyond any layer"),
        ({"family": "svdiff", "rank": 4}, "no rank"),
        ({"family": "lora-x", "alpha": 4}, "no alpha"),
        ({"family": "prefix", "targets": "x"}, "changes no modules"),
        ({"validation": 1.0}, "validation is 1"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"cut_mix": 1.5}, "cut_mix is 1.5"),
        ({"cut_mix": float("nan")}, "cut_mix is nan"),
        ({"unmix_weight": 0.1}, "none are made"),
        ({"cut_mix": 0.6, "unmix_weight": 0.0}, "unmix_weight is 0"),
        ({"cut_mix_prompt": "{left} and"}, "lacks"),
        ({"prior_prompt": [3]}, "not of type list of texts"),
        ({"prior_prompt": " "}, "prompt is empty"),
        ({"prior_prompt": "a dog", "prior_count": 0}, "prior_count is 0"),
        ({"prior": "dogs", "prior_weight": -1.0}, "prior_weight is -1"),
        ({"validation_prompts": ["a"], "validation_seeds": 0}, "validation_seeds is 0"),
        ({"base": None}, "No base was named"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_anything_is_opened(more, words):
    with pytest.raises(BadOption, match=words):
        Settings.of({"base": "nowhere", "data": "nowhere", **more})


@pytest.mark.parametrize(
    ("where", "more", "words"),
    [
        (LANGUAGE, {"targets": "nothing"}, "name like 'nothing'"),
        (LANGUAGE, {"targets": "("}, "no regular expression"),
        (LANGUAGE, {"options": {"colour": 1}}, "does not take these options"),
        (LANGUAGE, {"precision": "fp16"}, "not trained on a CPU"),
        (LANGUAGE, {"device": "abacus"}, "no device here"),
        (LANGUAGE, {"family": "prefix", "gradient_checkpointing": True}, "PEFT cannot put prefix"),
        (DIFFUSION, {"family": "prompt", "targets": None}, "for language models"),
        (LANGUAGE, {"family": "prompt", "targets": None, "rank": 5000}, "no room for text"),
    ],
)
def test_what_the_base_cannot_do_is_said(where, more, words, tmp_path):
    given = {**where, **more}
    with pytest.raises(BadOption, match=words):
        train(short(given, family=more.get("family", "lora")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_that_name_keeps_what_is_not_the_runs(tmp_path):
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "mine.txt").write_text("mine")
    train(short(LANGUAGE, steps=1), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["mine.txt"]


_VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    *(st.lists(st.none(), max_size=2), st.lists(st.text(max_size=8), max_size=2)),
)
_NAMES = [field.name for field in fields(Settings)]


@given(st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=4))
def test_no_setting_gives_a_traceback(more):
    try:
        chosen = Settings.of({"base": "b", "data": "d", "preset": "paper", **more})
    except BadOption:
        return
    assert all(0 <= chosen.lr_at(step) <= chosen.rate for step in (0, 1, chosen.steps - 1))


def test_data_of_the_other_kind_is_refused(tmp_path):
    with pytest.raises(BadData):
        train(short({**LANGUAGE, "data": DIFFUSION["data"]}), tmp_path / "out")


def test_the_paper_preset_is_the_papers_recipe_and_what_is_given_wins():
    where = {"base": "b", "data": "d", "preset": "paper"}
    paper = Settings.of(where)
    assert (paper.family, paper.size, paper.batch, paper.rate) == ("lora-x", 320, 8, 1e-3)
    assert (paper.schedule, paper.snr_gamma, paper.steps) == ("constant", 5.0, 5000)
    assert (paper.judging_prompts, paper.judging_seeds) == (30, 30)
    assert Settings.of({**where, "family": "lora"}).size == 32
    other = Settings.of({**where, "lr": 1e-4, "schedule": "cosine"})
    assert (other.rate, other.schedule, other.steps) == (1e-4, "cosine", 5000)
    assert set(PRESETS) == {"paper"}


def test_what_a_config_has_wrong_is_said_with_its_file(tmp_path):
    """An option on the command line may be right while the file is not."""
    for text, words in (('steps = "many"', "not of type int"), ("stpes = 3", "'stpes'")):
        (tmp_path / "run.toml").write_text(text)
        with pytest.raises(BadOption, match=words) as caught:
            read_config(tmp_path / "run.toml")
        assert caught.value.file == str(tmp_path / "run.toml")


def test_families_that_are_known_include_short_names():
    with pytest.raises(BadOption) as caught:
        Settings.of({"base": "nowhere", "data": "nowhere", "family": "lorra"})
    assert "qlora" in caught.value.fix
