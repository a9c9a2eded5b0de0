"""The data to measure on: held-out pictures with captions, or texts.

Pictures: a folder as trainers use it (a caption beside each picture in ``NAME.txt`` or
``NAME.caption``, or one ``metadata.jsonl`` with ``file_name`` and ``text`` or ``caption``), such a
``.jsonl`` file itself, or a ``.safetensors`` file with a uint8 tensor ``images`` [n, h, w, 3] and
``captions`` (JSON) in its metadata. Texts: ``.jsonl`` with ``text``, or with ``prompt`` and
``completion``, or ``.txt`` (a blank line ends a text); one file or a folder of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.errors import BadData, InputNotFound
from regraft.files import TensorFile
from regraft.running.model import Diffusion, Model, Pictures, Text, Texts, optional

#: ``--data demo``: the style pictures that come with the embedded pair.
DEMO = "demo"
_PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CAPTION_ENDINGS = (".txt", ".caption")
_METADATA = "metadata.jsonl"
_CAPTION_KEYS = ("text", "caption")


def read_data(ref: str | Path, model: Model, *, limit: int | None = None) -> Pictures | Texts:
    """Read held-out data for a base.

    Parameters
    ----------
    ref : str or Path
        File or folder; or "demo" for the pictures of the embedded pair.
    model : Model
        Says whether pictures or texts are wanted, and the size of the pictures.
    limit : int, optional
        Take the first so many only.

    Raises
    ------
    InputNotFound
    BadData
        Empty, unreadable, without captions, or texts for a diffusion base and the other way round.
    """
    path = Path(ref).expanduser()
    if not path.exists():
        if str(ref) != DEMO:
            raise InputNotFound(
                "No such file or folder of data.",
                file=path,
                fix="Give a folder of pictures with captions, or texts; or demo.",
            )
        path = Path(str(files("regraft") / "demo" / "assets" / "heldout.safetensors"))
    if isinstance(model, Diffusion):
        return read_pictures(path, model.size, limit=limit)
    return read_texts(path, limit=limit)


def digest(items: Pictures | Texts) -> str:
    """SHA-256 of the items themselves, whatever files held them."""
    if isinstance(items, Texts):
        pairs = [(item.prompt, item.completion) for item in items.items]
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    told = json.dumps([list(items.images.shape), list(items.captions)])
    found = hashlib.sha256(told.encode())
    found.update(items.images.tobytes())
    return found.hexdigest()


def read_pictures(path: Path, size: int, *, limit: int | None = None) -> Pictures:
    """Pictures with captions, each scaled and cropped to ``size`` × ``size`` pixels.

    The shorter side is scaled to ``size`` (Lanczos) and the middle of the longer one is kept, as
    trainers do with a centre crop. Transparency becomes white; EXIF orientation is obeyed. Order:
    by name, or as in the file that lists them.

    Raises
    ------
    BadData, MalformedFile, MissingDependency
    """
    if path.suffix.lower() == ".safetensors":
        return _from_tensors(path, size, limit)
    rows: Sequence[tuple[Path, str]]
    if path.is_dir():
        listed = path / _METADATA
        rows = _listed(listed) if listed.is_file() else _beside(path)
    elif path.suffix.lower() == ".jsonl":
        rows = _listed(path)
    else:
        raise BadData(
            "This holds no pictures with captions, which this diffusion base needs.",
            file=path,
            fix="Give a folder of pictures, each with a caption in a .txt file of its name.",
        )
    rows = rows[:limit]
    return Pictures(np.stack([_picture(file, size) for file, _ in rows]), [c for _, c in rows])


def _beside(folder: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of every picture in a folder and those in it."""
    found = []
    for path in _files_in(folder, _PICTURE_ENDINGS):
        captions = [path.with_suffix(e) for e in _CAPTION_ENDINGS if path.with_suffix(e).is_file()]
        if not captions:
            raise BadData(
                "The picture has no caption.",
                file=path,
                fix=f"Write one into {path.stem}.txt beside it, or list all in {_METADATA}.",
            )
        found.append((path, _read(captions[0]).strip()))
    if not found:
        raise BadData(
            "The folder holds no pictures.",
            file=folder,
            fix=f"Regraft reads {', '.join(_PICTURE_ENDINGS)}, each with a caption.",
        )
    return found


def _listed(path: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of every line of a ``metadata.jsonl``; names are relative to it."""
    found = []
    for number, row in _lines(path):
        caption = next((row[k] for k in _CAPTION_KEYS if isinstance(row.get(k), str)), None)
        name = row.get("file_name")
        if not isinstance(name, str) or caption is None:
            raise BadData(
                f'Line {number} has no "file_name", or no "text" or "caption".',
                file=path,
                fix="A picture's line names its file and its caption.",
            )
        picture = path.parent / name
        if "\0" in name or not picture.is_file():
            raise BadData(f"Line {number} names a picture that is not there: {name}.", file=path)
        found.append((picture, caption))
    if not found:
        raise BadData("The file lists no pictures.", file=path)
    return found


def _from_tensors(path: Path, size: int, limit: int | None) -> Pictures:
    file = TensorFile(path)
    info = file.get("images")
    if info is None or info.dtype != torch.uint8 or len(info.shape) != 4 or info.shape[-1] != 3:
        raise BadData(
            "The file has no tensor of pictures: images, uint8 [n, height, width, 3].", file=path
        )
    try:
        captions = json.loads(file.metadata.get("captions", ""))
    except (ValueError, RecursionError):
        captions = None
    good = isinstance(captions, list) and all(isinstance(c, str) for c in captions)
    if not good or len(captions) != info.shape[0]:
        raise BadData(
            f"The metadata need captions: a JSON list of {info.shape[0]} texts, one per picture.",
            file=path,
        )
    if 0 in info.shape:
        raise BadData("The file holds no pictures.", file=path)
    images = file.read("images").numpy()[:limit]
    if images.shape[1:3] != (size, size):
        with optional("Scaling pictures"):
            from PIL import Image
        images = np.stack([_fit(Image.fromarray(image), size) for image in images])
    return Pictures(images, captions[:limit])


def _picture(path: Path, size: int) -> np.ndarray:
    """One picture file as uint8 [size, size, 3]."""
    with optional("Reading pictures"):
        from PIL import Image, ImageOps
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return _fit(image.convert("RGB"), size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadData(
            f"The picture cannot be read: {error}.", file=path, fix="Save it again, or remove it."
        ) from error


def _fit(image: Any, size: int) -> np.ndarray:
    """Scale the shorter side to ``size`` and keep the middle; as it is if it has the size."""
    from PIL import Image, ImageOps

    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)
    return np.asarray(image)


def read_texts(path: Path, *, limit: int | None = None) -> Texts:
    """Texts, or prompts with completions.

    Raises
    ------
    BadData
    """
    endings = (".jsonl", ".txt")
    if path.is_dir():
        found = _files_in(path, endings)
        pictures = _files_in(path, _PICTURE_ENDINGS)
        if pictures:
            raise BadData(
                "The folder holds pictures, but the base is a language model.",
                file=pictures[0],
                fix="Give .jsonl or .txt files of texts.",
            )
    else:
        found = [path] if path.suffix.lower() in endings else []
    if not found:
        raise BadData(
            "This holds no texts, which this language model needs.",
            file=path,
            fix='Give .jsonl lines with "text", or with "prompt" and "completion", or .txt files.',
        )
    items = [item for file in found for item in _texts(file)]
    if not items:
        raise BadData(
            "There is no text in it.",
            file=path,
            fix='Write lines with "text", or with "prompt" and "completion"; or .txt files.',
        )
    return Texts(tuple(items[:limit]))


def _texts(path: Path) -> list[Text]:
    if path.suffix.lower() == ".txt":
        parts = _read(path).replace("\r\n", "\n").split("\n\n")
        return [Text(part.strip("\n")) for part in parts if part.strip()]
    found = []
    for number, row in _lines(path):
        values = [row.get(key) for key in ("prompt", "completion", "text")]
        match values:
            case [str(prompt), str(completion), None] if prompt and completion:
                found.append(Text(completion, prompt))
            case [None, None, str(text)] if text:
                found.append(Text(text))
            case _:
                raise BadData(
                    f'Line {number} has neither "text" nor "prompt" with "completion", '
                    "or one of them is empty.",
                    file=path,
                )
    return found


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank."""
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadData(f"Line {number} is not JSON ({error}).", file=path) from error
        if not isinstance(row, dict):
            raise BadData(f"Line {number} is not a JSON object.", file=path)
        yield number, row


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"The file is not UTF-8 text ({error.reason}).", file=path) from error
    except OSError as error:
        raise BadData(f"The file cannot be read: {error.strerror or error}.", file=path) from error


def _files_in(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files with these endings in a folder and the folders in it, by name; hidden ones are not."""
    found = [
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in endings
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())
