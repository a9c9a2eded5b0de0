"""Held-out data as people have it: what is read, in which order and size, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("PIL")

from PIL import Image

from regraft.errors import BadData, InputNotFound, MalformedFile
from regraft.running import Text
from regraft.running.data import read_data, read_pictures, read_texts


def picture(path, size=(8, 8), colour="red", mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two pictures, a caption beside each, as kohya's scripts keep them."""
    picture(tmp_path / "10_style" / "b.png", colour="blue").with_suffix(".caption").write_text(
        "b\n"
    )
    picture(tmp_path / "10_style" / "a.jpg").with_suffix(".txt").write_text("a cat")
    (tmp_path / ".thumbs").mkdir()
    picture(tmp_path / ".thumbs" / "c.png")
    return tmp_path


def refused(call, says, *args, **options):
    with pytest.raises(BadData, match=says) as caught:
        call(*args, **options)
    assert caught.value.file
    return caught.value


def test_captions_beside_pictures(folder):
    found = read_pictures(folder, 8)
    assert list(found.captions) == ["a cat", "b"]
    assert found.images.shape == (2, 8, 8, 3)
    assert tuple(found.images[1, 0, 0]) == (0, 0, 255)
    assert len(read_pictures(folder, 8, limit=1)) == 1


@pytest.mark.parametrize("key", ["text", "caption"])
def test_metadata_jsonl_gives_order_and_captions(folder, key):
    rows = [{"file_name": f"10_style/{n}", key: n} for n in ("b.png", "a.jpg")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(read_pictures(folder, 8).captions) == ["b.png", "a.jpg"]
    assert list(read_pictures(folder / "metadata.jsonl", 8).captions) == ["b.png", "a.jpg"]


def test_pictures_are_scaled_by_their_shorter_side_and_cropped_in_the_middle(tmp_path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255  # the middle quarter
    Image.fromarray(wide).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("x")
    found = read_pictures(tmp_path, 5).images[0]
    assert found.shape == (5, 5, 3)
    assert found.mean() > 240


def test_transparency_becomes_white_and_grey_becomes_rgb(tmp_path):
    picture(tmp_path / "a.png", colour=(255, 0, 0, 0), mode="RGBA")
    picture(tmp_path / "b.png", colour=7, mode="L")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    first, second = read_pictures(tmp_path, 8).images
    assert (first == 255).all()
    assert (second == 7).all()


def test_exif_orientation_is_obeyed(tmp_path):
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180°
    Image.fromarray(half).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("x")
    found = read_pictures(tmp_path, 8).images[0]
    assert found[:4].max() == 0
    assert found[4:].min() == 255


def tensors(path, n=3, size=8, captions='["a", "b", "c"]', **change):
    images = torch.arange(n * size * size * 3).reshape(n, size, size, 3).to(torch.uint8)
    save_file({"images": images, **change}, path, {"captions": captions})
    return path


def test_a_safetensors_file_is_read_as_it_is_or_scaled(tmp_path):
    path = tensors(tmp_path / "d.safetensors")
    found = read_pictures(path, 8)
    assert list(found.captions) == ["a", "b", "c"]
    assert found.images[0, 0, 0].tolist() == [0, 1, 2]
    assert read_pictures(path, 4, limit=2).images.shape == (2, 4, 4, 3)


@pytest.mark.parametrize("captions", ["", "[", '["a"]', '{"a": 1}', "[1, 2, 3]"])
def test_a_safetensors_file_needs_its_captions(tmp_path, captions):
    refused(read_pictures, "captions", tensors(tmp_path / "d.safetensors", captions=captions), 8)


def test_a_safetensors_file_of_something_else(tmp_path):
    path = tmp_path / "d.safetensors"
    save_file({"images": torch.zeros(1, 8, 8, 3)}, path)
    refused(read_pictures, "uint8", path, 8)
    path.write_bytes(b"nothing")
    with pytest.raises(MalformedFile):
        read_pictures(path, 8)


def test_what_is_wrong_with_pictures_is_named(folder):
    extra = picture(folder / "new.png")
    assert refused(read_pictures, "no caption", folder, 8).file == str(extra)
    (folder / "new.txt").write_text("x")
    extra.write_bytes(extra.read_bytes()[:40])
    assert refused(read_pictures, "cannot be read", folder, 8).file == str(extra)
    extra.write_bytes(b"no picture at all")
    refused(read_pictures, "cannot be read", folder, 8)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "Line 2 is not JSON"),
        ("[" * 100_000, "Line 2 is not JSON"),
        ("[]", "Line 2 is not a JSON object"),
        ('{"file_name": "a.jpg"}', "Line 2 has no"),
        ('{"text": "x"}', "Line 2 has no"),
        ('{"file_name": "gone.png", "text": "x"}', "Line 2 names a picture"),
        ('{"file_name": "a\\u0000", "text": "x"}', "Line 2 names a picture"),
    ],
)
def test_a_bad_line_of_the_list_is_named(tmp_path, line, says):
    picture(tmp_path / "a.jpg")
    good = json.dumps({"file_name": "a.jpg", "text": "x"})
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{line}\n")
    refused(read_pictures, says, tmp_path, 8)


def test_empty_folders_and_lists(tmp_path):
    refused(read_pictures, "no pictures", tmp_path, 8)
    refused(read_texts, "no texts", tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    refused(read_pictures, "no pictures", tmp_path, 8)
    refused(read_texts, "no text in it", tmp_path)


def lines(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_texts_and_prompts(tmp_path):
    plain = lines(tmp_path / "a.jsonl", {"text": "one", "id": 3}, {"text": "two"})
    assert read_texts(plain).items == (Text("one"), Text("two"))
    asked = lines(tmp_path / "b.jsonl", {"prompt": "1 + 1 =", "completion": " 2"})
    assert read_texts(asked).items == (Text(" 2", "1 + 1 ="),)
    assert read_texts(asked).prompted
    assert not read_texts(tmp_path).prompted
    assert len(read_texts(tmp_path)) == 3
    assert len(read_texts(tmp_path, limit=2)) == 2


def test_a_blank_line_ends_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\ngoes on\r\n\r\ntwo ä\n\n\n".encode())
    assert read_texts(tmp_path / "a.txt").items == (Text("one\ngoes on"), Text("two ä"))


@pytest.mark.parametrize(
    "row",
    [{}, {"text": ""}, {"text": 3}, {"prompt": "x"}, {"prompt": "x", "completion": ""},
     {"text": "x", "prompt": "y", "completion": "z"}],
)  # fmt: skip
def test_a_bad_line_of_text_is_named(tmp_path, row):
    refused(read_texts, "Line 2", lines(tmp_path / "a.jsonl", {"text": "x"}, row))


def test_texts_that_are_none(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    refused(read_texts, "UTF-8", tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("x")
    refused(read_texts, "no texts", tmp_path / "a.csv")
    refused(read_pictures, "no pictures with captions", tmp_path / "a.csv", 8)


def test_pictures_for_a_language_model_are_refused(folder):
    refused(read_texts, "language model", folder)


def test_a_name_that_is_nothing(tmp_path):
    with pytest.raises(InputNotFound):
        read_data(tmp_path / "gone", None)
