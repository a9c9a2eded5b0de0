"""Several subjects: who is on which picture, and pictures of two."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from regraft.errors import BadData, BadOption
from regraft.running import Pictures, open_model
from regraft.training.settings import SIDES
from regraft.training.subjects import Mixer, read_subjects
from tests.running import bases

LETTERS = ("a", "b", "c", "d", "e")


def picture(path, colour):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)
    path.with_suffix(".txt").write_text("a")


def mixer(captions, subjects, template="{left} + {right}", length=16, probability=1.0):
    """A mixer of 4-pixel pictures, each of one shade."""
    shades = [np.full((4, 4, 3), 10 * i, dtype=np.uint8) for i in range(len(captions))]
    model = SimpleNamespace(pipeline=SimpleNamespace(tokenizer=bases.tokenizer(length)))
    pictures = Pictures(np.stack(shades), captions)
    return Mixer(model, pictures, subjects, range(len(captions)), probability, template)


def test_subjects_are_folders_or_a_field(tiny, tmp_path):
    model = open_model(tiny["base"])
    picture(tmp_path / "data" / "10_dog" / "1.png", "red")
    picture(tmp_path / "data" / "10_dog" / "2.png", "red")
    picture(tmp_path / "data" / "cat" / "1.png", "blue")
    pictures, subjects = read_subjects(str(tmp_path / "data"), model)
    assert subjects == ["dog", "dog", "cat"]
    assert [int(image[0, 0, 0]) for image in pictures.images] == [255, 255, 0]
    rows = [
        {"file_name": f"{name}.png", "text": "a", "subject": name.split("/")[0]}
        for name in ("cat/1", "10_dog/2")
    ]
    listed = tmp_path / "data" / "metadata.jsonl"
    listed.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    for ref in (listed, listed.parent):
        assert read_subjects(str(ref), model)[1] == ["cat", "10_dog"]
    listed.write_text(json.dumps(rows[0]) + '\n{"file_name": "10_dog/1.png", "text": "a"}')
    with pytest.raises(BadData, match='1 of 2 lines have no "subject"'):
        read_subjects(str(listed), model)
    listed.unlink()
    picture(tmp_path / "data" / "stray.png", "red")
    with pytest.raises(BadData, match="1 pictures beside"):
        read_subjects(str(tmp_path / "data"), model)
    assert set(read_subjects(tiny["data"], model)[1]) == {""}


def test_the_prompt_is_the_papers():
    made = mixer(["a", "b"], ["x", "y"], SIDES, length=64)
    prompt, places = made._prompt("photo of a V1 dog", "photo of a V2 sculpture")
    assert prompt == "photo of a V1 dog on the left and a V2 sculpture on the right"
    start, end = places["{right}"]
    assert prompt[start:end] == "a V2 sculpture"
    assert made._prompt("V1 dog", "V2 cat")[0] == "V1 dog on the left and V2 cat on the right"


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(LETTERS), min_size=1, max_size=5),
    st.lists(st.sampled_from(LETTERS), min_size=1, max_size=5),
)
def test_tokens_are_those_of_each_sides_own_words(left, right):
    made = mixer([" ".join(left), " ".join(right)], ["x", "y"], length=64)
    prompt, *found = made._words(" ".join(left), " ".join(right))
    ids = made.tokenizer(prompt)["input_ids"]
    for tokens, words, others in zip(found, (left, right), (right, left), strict=True):
        said = made.tokenizer.decode([ids[i] for i in tokens]).split()
        assert said == ([w for w in words if w not in others] or words)


def test_a_picture_is_mixed_with_one_of_another_subject_that_is_trained_on():
    made = mixer(["a", "b", "c", "d"], ["x", "x", "y", "z"], template="{left} {right}")
    made.rows.pop("z")
    draw = torch.Generator().manual_seed(0)
    for _ in range(8):
        two = made(0, draw)
        shades = {int(two.picture[0, 0, 0]), int(two.picture[0, -1, 0])}
        assert shades == {0, 20}
        left = "a" if two.picture[0, 0, 0] == 0 else "c"
        assert re.match(left, two.prompt)
        assert (two.left, two.right) == ([1], [2])


def test_what_cannot_be_mixed_is_said():
    with pytest.raises(BadData, match="two subjects"):
        mixer(["a", "b"], ["x", "x"])
    with pytest.raises(BadOption, match="longer than the 4 tokens"):
        mixer(["a", "b"], ["x", "y"], "{left} + + {right}", length=4)
    assert not mixer(["a", "b"], ["x", "y"], length=4).too_long
    assert mixer(["a", "b", "b c d"], ["x", "y", "y"], length=4).too_long
