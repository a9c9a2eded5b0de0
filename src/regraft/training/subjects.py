"""Which subject each picture is of, and pictures of two subjects made of pictures of one.

Cut-Mix (SVDiff, arXiv 2303.11305, section 3.3): with a probability, a picture is cut in half with
one of another subject, the subjects drawn without replacement, and the prompt says who is where.
Which words are a subject's is not in the paper: here the words of its caption that the other's
caption lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.errors import BadData, BadOption
from regraft.running import Diffusion, Pictures, optional
from regraft.running.data import read_data

_SIDES = re.compile(r"(\{left\}|\{right\})")
#: "10_sks dog": kohya's folders begin with how often they are repeated.
_REPEATS = re.compile(r"^\d+_(?=.)")


def read_subjects(ref: str, model: Diffusion) -> tuple[Pictures, list[str]]:
    """Pictures with captions, and the subject of each.

    A subject is a folder in the data's folder, without kohya's number of repeats in front; or the
    field ``subject`` of a ``metadata.jsonl``.

    Returns
    -------
    Pictures, and a str for each; all are empty if the data names no subjects.

    Raises
    ------
    BadData
        Some pictures have a subject and some have none.
    InputNotFound, MalformedFile, MissingDependency
    """
    path = Path(ref).expanduser()
    listed = path / "metadata.jsonl" if path.is_dir() else path
    if path.is_dir() and not listed.is_file():
        folders = [p for p in sorted(path.iterdir()) if p.is_dir() and p.name[0] != "."]
        if folders:
            return _folders(path, folders, model)
    pictures = read_data(ref, model)
    assert isinstance(pictures, Pictures)
    subjects = [""] * len(pictures)
    if listed.suffix.lower() == ".jsonl" and listed.is_file():
        lines = listed.read_text(encoding="utf-8-sig").split("\n")  # read_data has checked them
        found = [json.loads(line).get("subject") for line in lines if line.strip()]
        if any(found):
            wrong = [s for s in found if not isinstance(s, str) or not s]
            if wrong:
                raise BadData(
                    f'{len(wrong)} of {len(found)} lines have no "subject".',
                    file=listed,
                    fix="Name the subject of every picture, or of none.",
                )
            subjects = found
    return pictures, subjects


def _folders(path: Path, folders: list[Path], model: Diffusion) -> tuple[Pictures, list[str]]:
    whole = read_data(path, model)
    assert isinstance(whole, Pictures)
    images: list[np.ndarray] = []
    captions: list[str] = []
    subjects: list[str] = []
    for folder in folders:
        part = read_data(folder, model)
        assert isinstance(part, Pictures)
        images.append(part.images)
        captions += part.captions
        subjects += [_REPEATS.sub("", folder.name)] * len(part)
    if len(captions) != len(whole):
        raise BadData(
            f"{len(whole) - len(captions)} pictures beside the subjects' folders have no subject.",
            file=path,
            fix="Put every picture into the folder of its subject.",
        )
    return Pictures(np.concatenate(images), captions), subjects


def several(subjects: Sequence[str], rows: Sequence[int]) -> bool:
    """Whether these items are of two subjects or more."""
    return len({subjects[row] for row in rows}) > 1


@dataclass(frozen=True)
class TwoSubjects:
    """A picture of two subjects, as the denoiser sees it.

    Attributes
    ----------
    picture : uint8 array of shape (height, width, 3)
    prompt : str
    left, right : list of int
        Places of each subject's words in the tokenised prompt.
    mask : Tensor of shape (height, width)
        1 on the left half.
    """

    picture: np.ndarray
    prompt: str
    left: list[int]
    right: list[int]
    mask: Tensor


class Mixer:
    """Makes pictures of two subjects out of the training pictures.

    Parameters
    ----------
    model : Diffusion
        Its tokenizer says where words are.
    pictures : Pictures
    subjects : sequence of str, one for each
    rows : sequence of int
        The items that may be used.
    probability : float
    template : str
        The prompt, with ``{left}`` and ``{right}``.

    Raises
    ------
    BadData
        There is one subject only.
    BadOption
        The text encoder cannot read so long a prompt.
    """

    def __init__(
        self,
        model: Diffusion,
        pictures: Pictures,
        subjects: Sequence[str],
        rows: Sequence[int],
        probability: float,
        template: str,
    ) -> None:
        with optional("Cut-Mix"):
            from regraft.tuners.svdiff.cut_mix import CutMix

        self.tokenizer: Any = getattr(model, "pipeline").tokenizer  # noqa: B009
        self.pictures, self.subjects, self.template = pictures, subjects, template
        self.cut_mix = CutMix(probability, template)
        self.rows = {
            subject: [row for row in rows if subjects[row] == subject]
            for subject in sorted({subjects[row] for row in rows})
        }
        if len(self.rows) < 2:
            raise BadData(
                "Cut-Mix needs pictures of two subjects or more.",
                fix="Make a folder for each subject, or name it in metadata.jsonl; see the docs.",
            )
        self.too_long = self._check()

    def _check(self) -> bool:
        """Whether some prompts are longer than what the text encoder reads.

        Raises
        ------
        BadOption
            All of two subjects are.
        """
        captions = {
            subject: sorted({self.pictures.captions[row] for row in rows}, key=self._tokens)
            for subject, rows in self.rows.items()
        }
        for left, right in permutations(captions.values(), 2):
            if not all(self._words(left[0], right[0])[1:]):
                raise BadOption(
                    f"{self._prompt(left[0], right[0])[0]!r} is longer than the "
                    f"{self.tokenizer.model_max_length} tokens that the text encoder reads.",
                    fix="Shorten the captions, or the words between them: cut_mix_prompt.",
                )
        longest = [found[-1] for found in captions.values()]
        prompts = [self._prompt(*pair)[0] for pair in permutations(longest, 2)]
        return any(len(self._ids(p)) > self.tokenizer.model_max_length for p in prompts)

    def _ids(self, text: str, **more: Any) -> list[int]:
        found: list[int] = self.tokenizer(text, verbose=False, **more)["input_ids"]
        return found

    def _tokens(self, text: str) -> int:
        return len(self._ids(text, add_special_tokens=False))

    def __call__(self, row: int, draw: torch.Generator) -> TwoSubjects | None:
        """A picture of this item's subject and of another one, drawn; None: leave it as it is."""
        others = [s for s in self.rows if s != self.subjects[row]]
        other = self.rows[others[_one_of(others, draw)]]
        pair = (row, other[_one_of(other, draw)])
        first, second = (
            torch.from_numpy(self.pictures.images[i].copy()).permute(2, 0, 1) for i in pair
        )
        mixed = self.cut_mix(first, second, [self.pictures.captions[i] for i in pair], draw)
        if mixed is None:
            return None
        prompt, left, right = self._words(mixed.left, mixed.right)
        picture = mixed.image.permute(1, 2, 0).contiguous().numpy()
        return TwoSubjects(picture, prompt, left, right, mixed.mask)

    def _prompt(self, left: str, right: str) -> tuple[str, dict[str, tuple[int, int]]]:
        """The prompt, and from where to where each side's caption is in it.

        "photo of a V1 dog" and "photo of a V2 cat" share "photo of", which is said once, as in the
        paper.
        """
        words = right.split()
        same = (a == b for a, b in zip(left.split(), words, strict=False))
        shared = [word for word, _ in zip(words, takewhile(bool, same), strict=False)]
        if "of" in shared:
            right = " ".join(words[len(shared) - shared[::-1].index("of") :])
        said = {"{left}": left, "{right}": right}
        prompt, places = "", {}
        for piece in _SIDES.split(self.template):
            start = len(prompt)
            prompt += said.get(piece, piece)
            if piece in said:
                places[piece] = (start, len(prompt))
        return prompt, places

    def _words(self, left: str, right: str) -> tuple[str, list[int], list[int]]:
        """The prompt, and the tokens of each side's own words that the text encoder reads."""
        prompt, places = self._prompt(left, right)
        ids, bare = self._ids(prompt), self._ids(prompt, add_special_tokens=False)
        before = next(
            (i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), len(ids) - len(bare)
        )
        # The last token that is read is the end's.
        limit = self.tokenizer.model_max_length - (len(ids) - len(bare) - before)
        found = []
        for side, others in (("{left}", right), ("{right}", left)):
            start, end = places[side]
            words = [m for m in re.finditer(r"\S+", prompt) if start <= m.start() < end]
            foreign = set(others.lower().split())
            own = [m for m in words if m.group().lower() not in foreign] or words
            tokens = [
                before + i
                for m in own
                for i in range(self._tokens(prompt[: m.start()]), self._tokens(prompt[: m.end()]))
            ]
            found.append([i for i in tokens if i < limit])
        return prompt, found[0], found[1]


def _one_of(found: Sequence[Any], draw: torch.Generator) -> int:
    return int(torch.randint(len(found), (1,), generator=draw))
