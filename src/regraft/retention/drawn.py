"""Drawing from the target with every way's adapter, and scoring the pictures.

All ways get the same captions and seeds. A score is taken caption by caption, and the mean over
captions is what is reported; with the same number of seeds everywhere that equals the scorer's
figure for all pictures at once. As for the loss, R is defined where retraining moved the score, in
the right direction, by more than twice the standard error of its gain over the captions. Diversity
has no R: more of it is better only as long as the style is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from regraft.errors import BadOption
from regraft.report import Gallery, GalleryRow
from regraft.retention.figure import Retention, mean_error, ratio_error, retention
from regraft.retention.hosted import hosted
from regraft.retention.images import Diversity, Encoder, Scorer, StyleSimilarity
from regraft.retention.images import Pictures as Array
from regraft.retention.scorers import LPIPS, LpipsDiversity, available_scorers
from regraft.running import Diffusion, Pictures, optional

if TYPE_CHECKING:
    from regraft.retention.hosted import AnyAdapter

#: Captions of the strip of pictures on the page, and the longer side of a picture there (pixels).
SHOWN, SIDE = 6, 128
_TITLES = {"target": "target, bare", "retrained": "retrained adapter"}
_ONE_SEED = "diversity needs two seeds or more"


@dataclass(frozen=True)
class Drawing:
    """What to draw, and the weights to score it with.

    Attributes
    ----------
    seeds : int
        Pictures per caption; diversity needs two or more.
    captions : int
        Draw for the first so many different captions of the data.
    clip, dinov2 : str or None
        Folder, or hub id that is in the local cache: CLIP score, style similarity, diversity.
    hps : str or None
        HPSv2's own checkpoint file.

    Raises
    ------
    BadOption
        A number below 1.
    """

    seeds: int
    captions: int = 8
    clip: str | None = None
    dinov2: str | None = None
    hps: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("pictures per caption", self.seeds), ("captions", self.captions)):
            if value < 1:
                raise BadOption(f"The number of {name} {value} is not a positive number.")


@dataclass(frozen=True)
class PictureScore:
    """One scorer's figure of one way.

    ``value`` is the mean over captions; ``gain`` is the value above the bare target's, whatever
    direction is better, and ``gain_error`` its standard error over captions. ``retention`` is None
    without a retrained adapter and for diversity; its own value is None where R is not defined.
    """

    value: float
    gain: float
    gain_error: float | None
    retention: Retention | None = None


@dataclass(frozen=True)
class Drawn:
    """Pictures that were drawn, and their scores.

    Attributes
    ----------
    captions : tuple of str
    seeds : tuple of int
        The same for every caption.
    higher_is_better : dict
        Scorer -> direction.
    values : dict
        "target", "retrained" or a way -> scorer -> one value per caption.
    skipped : dict
        Scorer -> why it did not run.
    strip : dict
        "target", "retrained" or a way -> the first seed's picture of each of the first captions.
    """

    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    higher_is_better: dict[str, bool]
    values: dict[str, dict[str, tuple[float, ...]]]
    skipped: dict[str, str]
    drawing: Drawing
    strip: dict[str, list[Array]] = field(default_factory=dict, repr=False)

    def scores(self, name: str) -> dict[str, PictureScore]:
        """Scorer -> score of "target", "retrained" or a way."""
        return {scorer: self._score(scorer, name) for scorer in self.values[name]}

    def _score(self, scorer: str, name: str) -> PictureScore:
        own, bare = self.values[name][scorer], self.values["target"][scorer]
        gains = _minus(own, bare)
        gain, error = float(np.mean(gains)), mean_error(gains)
        reference = self.values.get("retrained", {}).get(scorer)
        found = None
        if reference is not None and name not in _TITLES and not _is_diversity(scorer):
            found = self._retention(own, bare, reference, better=self.higher_is_better[scorer])
        return PictureScore(float(np.mean(own)), gain, error, found)

    @staticmethod
    def _retention(
        own: Sequence[float], bare: Sequence[float], again: Sequence[float], *, better: bool
    ) -> Retention:
        below = _minus(again, bare)
        error = mean_error(below)
        found = retention(
            target=float(np.mean(bare)),
            transferred=float(np.mean(own)),
            retrained=float(np.mean(again)),
            margin=2 * (error or 0.0),
            better="higher" if better else "lower",
        )
        if error is None:
            why = "one caption does not say whether retraining moved the score"
            return replace(found, value=None, reason=why)
        return replace(found, error=None if found.reason else ratio_error(_minus(own, bare), below))

    def to_dict(self) -> dict[str, Any]:
        """JSON form: what was drawn and the references' values; each way has its own scores."""
        references = {name: self.scores(name) for name in _TITLES if name in self.values}
        return {
            "captions": list(self.captions),
            "seeds": list(self.seeds),
            "higher_is_better": self.higher_is_better,
            "references": {
                name: {scorer: score.value for scorer, score in found.items()}
                for name, found in references.items()
            },
            "skipped": self.skipped,
            "weights": {k: v for k, v in asdict(self.drawing).items() if isinstance(v, str)},
        }

    def gallery(self, ways: Sequence[str]) -> Gallery:
        """The strip for the page: the bare target, the ways (best first), the retrained adapter."""
        names = [name for name in ("target", *ways, "retrained") if name in self.strip]
        rows = [
            GalleryRow(_TITLES.get(n, n), "", [_png(p) for p in self.strip[n]], n == ways[0])
            for n in names
        ]
        captions = self.captions[: len(self.strip["target"])]
        return Gallery("Drawn pictures", captions, rows, paragraph=f"Shown: seed {self.seeds[0]}.")


def draw(model: Diffusion, captions: Sequence[str], seeds: Sequence[int]) -> dict[str, Array]:
    """Caption -> its pictures, one per seed, with the base's usual settings.

    Returns
    -------
    dict of str to uint8 array of shape (seeds, height, width, 3)
    """
    drawn = {}
    for caption in captions:
        rows: UInt8[np.ndarray, "n h w 3"] = model.sample([caption] * len(seeds), list(seeds))
        drawn[caption] = rows
    return drawn


def draw_all(
    model: Diffusion,
    data: Pictures,
    adapters: Mapping[str, AnyAdapter | None],
    drawing: Drawing,
    *,
    seed: int = 0,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Drawn:
    """Draw with every adapter at strength 1.0, and score with every scorer that can run.

    Parameters
    ----------
    model : Diffusion
        The target.
    data : Pictures
        The style's real pictures, whose captions are drawn.
    adapters : mapping
        "target" to None, perhaps "retrained", and the ways.
    drawing : Drawing
    seed : int
        The seeds are ``seed``, ``seed`` + 1, …
    step : callable
        Told how many of the adapters are done.

    Returns
    -------
    Drawn
        A scorer that cannot run is in ``skipped``; that is no error.
    """
    ready, skipped = scorers(drawing)
    captions = tuple(dict.fromkeys(data.captions))[: drawing.captions]
    seeds = tuple(range(seed, seed + drawing.seeds))
    found = Drawn(
        captions, seeds, {s.name: s.higher_is_better for s in ready}, {}, skipped, drawing
    )
    for done, (name, adapter) in enumerate(adapters.items(), 1):
        with hosted(model, adapter):
            pictures = draw(model, captions, seeds)
        found.values[name] = {
            scorer.name: tuple(scorer.score({c: pictures[c]}, data.images) for c in captions)
            for scorer in ready
        }
        found.strip[name] = [pictures[c][0] for c in captions[:SHOWN]]
        step(done, len(adapters))
    return found


def scorers(drawing: Drawing) -> tuple[list[Scorer], dict[str, str]]:
    """The scorers that can run, and name -> reason for those that cannot.

    Those of :func:`regraft.retention.scorers.available_scorers`, and the diversity over seeds by
    each encoder; LPIPS whenever it is installed.
    """
    ready, skipped = available_scorers(drawing.clip, drawing.dinov2, drawing.hps)
    several = drawing.seeds > 1
    found: list[Scorer] = []
    for scorer in ready:
        if isinstance(scorer, StyleSimilarity):
            encoder = _Remembering(scorer.encoder)
            found.append(StyleSimilarity(encoder))
            spread = Diversity(encoder)
            if several:
                found.append(spread)
            else:
                skipped[spread.name] = _ONE_SEED
        elif isinstance(scorer, LpipsDiversity) and not several:
            skipped[LPIPS] = _ONE_SEED
        else:
            found.append(scorer)
    return found, skipped


@dataclass(frozen=True)
class _Remembering:
    """An encoder that encodes the same pictures once: the real ones are asked for every time."""

    encoder: Encoder
    seen: dict[bytes, Tensor] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.encoder.name

    def encode(self, images: Array) -> Float[Tensor, "n d"]:
        key = hashlib.sha256(str(images.shape).encode() + images.tobytes()).digest()
        if key not in self.seen:
            self.seen[key] = self.encoder.encode(images)
        return self.seen[key]


def asked_for(
    draw: int,
    captions: int = 8,
    *,
    clip: str | None = None,
    dinov2: str | None = None,
    hps: str | Path | None = None,
) -> Drawing | None:
    """The drawing that options ask for; None if ``draw`` is 0.

    Raises
    ------
    BadOption
        Weights without anything to score, or a number that is not positive.
    """
    weights = {"clip": clip, "dinov2": dinov2, "hps": None if hps is None else str(hps)}
    if draw:
        return Drawing(draw, captions, **weights)
    named = ", ".join(f"--{name}" for name, ref in weights.items() if ref is not None)
    if named:
        raise BadOption(
            f"{named}: there are no pictures to score.",
            fix="Say how many to draw per caption with --draw, two or more for diversity.",
        )
    return None


def _is_diversity(scorer: str) -> bool:
    return "diversity" in scorer


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _png(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A PNG file, made smaller if its longer side is over :data:`SIDE` pixels."""
    with optional("Showing pictures"):
        from PIL import Image
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
